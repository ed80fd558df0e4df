// AdamW of weights in float32: what the driver (adamw.cpp) gives to the code of each level of instructions, and the oracle of
// adamw_rows.h in plain C++.

#ifndef BLOOMLM_ADAMW_H
#define BLOOMLM_ADAMW_H

#include <cmath>
#include <cstdint>

#include "scalar.h"

namespace bloomlm {

// The constants of an update.
struct AdamW {
  float kept;             // 1 - learning rate * weight decay
  float new_mean;         // 1 - beta1
  float beta2, new_square;  // new_square: 1 - beta2
  float step_size;        // learning rate / (1 - beta1^t)
  float inverse_root;     // 1 / sqrt(1 - beta2^t)
  float epsilon;
};

// What an update reads and writes, `count` numbers of each.
template <class G>
struct Updated {
  const G* gradient;
  float *master, *mean, *squares;  // squares: the mean of the squared gradient
  Bfloat16* weight;                // the master rounded; null: there is none
  Updated at(int64_t start) const {
    return {gradient + start, master + start, mean + start, squares + start, weight ? weight + start : nullptr};
  }
};

namespace scalar {

template <class G>
void adamw(const AdamW& c, const Updated<G>& u, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const float gradient = to_float(u.gradient[i]);
    u.mean[i] += c.new_mean * (gradient - u.mean[i]);
    u.squares[i] = c.beta2 * u.squares[i] + c.new_square * gradient * gradient;
    u.master[i] = c.kept * u.master[i] - c.step_size * u.mean[i] / (std::sqrt(u.squares[i]) * c.inverse_root + c.epsilon);
  }
  if (u.weight) to_bfloat16(u.master, count, u.weight);
}

template <class G>
double sum_of_squares(const G* numbers, int64_t count) {
  double sum = 0.0;
  for (int64_t i = 0; i < count; ++i) sum += static_cast<double>(to_float(numbers[i])) * to_float(numbers[i]);
  return sum;
}

}  // namespace scalar
}  // namespace bloomlm

#endif
