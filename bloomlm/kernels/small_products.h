// C (+)= A B for small matrices, by oneDNN's kernels, on the thread that calls.

#ifndef BLOOMLM_SMALL_PRODUCTS_H
#define BLOOMLM_SMALL_PRODUCTS_H

#include <cstdint>
#include <exception>

#include "matrix.h"

// Matrices in rows of lda, ldb and ldc numbers. They are a part of PyTorch's library that its headers declare and its
// documentation does not name; where one is missing, it is a null pointer.
namespace c10 {
struct BFloat16;
}
namespace at::native::cpublas {
__attribute__((weak)) void brgemm(int64_t rows, int64_t columns, int64_t inner, int64_t lda, int64_t ldb, int64_t ldc,
                                  bool adds, const float* a, const float* b, float* c, bool is_vnni);
// b has two rows side by side: [inner / 2, columns, 2]
__attribute__((weak)) void brgemm(int64_t rows, int64_t columns, int64_t inner, int64_t lda, int64_t ldb, int64_t ldc,
                                  bool adds, const c10::BFloat16* a, const c10::BFloat16* b, float* c, bool is_vnni);
__attribute__((weak)) void brgemm_release(bool is_vnni);
}  // namespace at::native::cpublas

namespace bloomlm {

// The library generates code for each new shape and keeps it, so callers have few of them.
inline void multiply(int64_t rows, int64_t columns, int64_t inner, const float* a, int64_t lda, const float* b, int64_t ldb,
                     float* c, int64_t ldc, bool adds) {
  at::native::cpublas::brgemm(rows, columns, inner, lda, ldb, ldc, adds, a, b, c, false);
}
inline void multiply(int64_t rows, int64_t columns, int64_t inner, const Bfloat16* a, int64_t lda, const Bfloat16* b,
                     int64_t ldb, float* c, int64_t ldc, bool adds) {
  at::native::cpublas::brgemm(rows, columns, inner, lda, ldb, ldc, adds, reinterpret_cast<const c10::BFloat16*>(a),
                              reinterpret_cast<const c10::BFloat16*>(b), c, true);
}

// Gives back the state of the processor that products in bfloat16 may need (AMX); each thread calls it after its last one.
inline void end_products(const float*) {}
inline void end_products(const Bfloat16*) { at::native::cpublas::brgemm_release(true); }

inline bool is_declared(const float*) {
  using Function = void (*)(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, bool, const float*, const float*, float*, bool);
  return static_cast<Function>(at::native::cpublas::brgemm) != nullptr;
}
inline bool is_declared(const Bfloat16*) {
  using Function = void (*)(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, bool, const c10::BFloat16*,
                            const c10::BFloat16*, float*, bool);
  return static_cast<Function>(at::native::cpublas::brgemm) != nullptr && at::native::cpublas::brgemm_release != nullptr;
}

// Whether products of T can be had: PyTorch has them, oneDNN supports them here, and nobody has turned it off.
template <class T>
bool has_products() {
  const T* none = nullptr;
  if (!is_declared(none)) return false;
  const T one[256] = {};
  float result[256];
  try {
    multiply(16, 16, 16, one, 16, one, 16, result, 16, false);
    end_products(none);
  } catch (const std::exception&) {
    return false;
  }
  return true;
}

}  // namespace bloomlm

#endif
