// Passes over all numbers of tensors, on all threads.

#ifndef BLOOMLM_PIECES_H
#define BLOOMLM_PIECES_H

#include <algorithm>
#include <cstdint>

#include "tensors.h"

namespace bloomlm {

constexpr int64_t kNumbersAtOnce = 4096;

inline int64_t count_of(AtenTensorHandle tensor) {
  int64_t count = 0;
  AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_numel(tensor, &count));
  return count;
}

// Calls function(start, length) for pieces of `count` numbers, on all threads.
template <class F>
void for_pieces(int64_t count, F function) {
#pragma omp parallel for schedule(static)
  for (int64_t start = 0; start < count; start += kNumbersAtOnce)
    function(start, std::min(kNumbersAtOnce, count - start));
}

}  // namespace bloomlm

#endif
