// bloomlm::adamw and bloomlm::norm: an update reads and writes masters, moments and weights once, and a gradient in bfloat16
// needs no copy in float32, not even for its norm.

#include <cmath>

#include "adamw.h"
#include "few_rows.h"
#include "pieces.h"

namespace bloomlm {

// Each piece is added up in float, as its numbers are in the same range.
template <class G>
double norm(AtenTensorHandle numbers) {
  const auto run = kLevel >= kAvx512 ? avx512::sum_of_squares<G>
                   : kLevel >= kAvx2 ? avx2::sum_of_squares<G>
                                     : scalar::sum_of_squares<G>;
  const G* from = data_of<G>(numbers);
  const int64_t count = count_of(numbers);
  double sum = 0.0;
#pragma omp parallel for schedule(static) reduction(+ : sum)
  for (int64_t start = 0; start < count; start += kNumbersAtOnce)
    sum += run(from + start, std::min(kNumbersAtOnce, count - start));
  return std::sqrt(sum);
}

template <class G>
void adamw(AtenTensorHandle gradient, AtenTensorHandle master, AtenTensorHandle mean, AtenTensorHandle squares,
           AtenTensorHandle weight, const AdamW& constants) {
  const auto run = kLevel >= kAvx512 ? avx512::adamw<G> : kLevel >= kAvx2 ? avx2::adamw<G> : scalar::adamw<G>;
  const Updated<G> all = {data_of<G>(gradient), data_of<float>(master), data_of<float>(mean), data_of<float>(squares),
                          weight ? data_of<Bfloat16>(weight) : nullptr};
  for_pieces(count_of(gradient), [&](int64_t start, int64_t count) { run(constants, all.at(start), count); });
}

}  // namespace bloomlm
