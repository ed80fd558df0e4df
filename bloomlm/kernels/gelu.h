// GELU and its gradient, number by number: what the driver (gelu.cpp) gives to the code of each level of instructions, and
// the oracle of gelu_rows.h in plain C++.

#ifndef BLOOMLM_GELU_H
#define BLOOMLM_GELU_H

#include <cstdint>

#include "scalar.h"

namespace bloomlm {

namespace scalar {

template <class T>
void gelu_of(const T* x, int64_t count, T* results) {
  for (int64_t i = 0; i < count; ++i) assign(results[i], gelu(to_float(x[i])));
}

// gradient * d gelu(x) / d x
template <class T>
void gelu_gradient(const T* gradient, const T* x, int64_t count, T* results) {
  for (int64_t i = 0; i < count; ++i) {
    // in double: 1 - tanh^2 cancels
    const double v = to_float(x[i]), tanh = std::tanh(kGeluFactor * (v + kGeluCubic * v * v * v));
    const double slope = kGeluFactor * (1.0 + 3.0 * kGeluCubic * v * v);
    assign(results[i], static_cast<float>(to_float(gradient[i]) * 0.5 * (1.0 + tanh + v * (1.0 - tanh * tanh) * slope)));
  }
}

}  // namespace scalar
}  // namespace bloomlm

#endif
