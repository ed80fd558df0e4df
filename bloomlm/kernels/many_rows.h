// x [N, ins] times the transpose of a matrix [outs, ins] for many rows of x, by oneDNN's kernels for small matrices: in
// bfloat16 where the processor has products of it and the matrix has no more bits, otherwise in float32.
//
// Tiles of results are computed transposed, so that rows of the matrix are multiplied as they are stored or decoded, and
// x alone is turned over, once. Tiles are turned back while they are in the first cache.

#ifndef BLOOMLM_MANY_ROWS_H
#define BLOOMLM_MANY_ROWS_H

#include <algorithm>

#include "few_rows.h"
#include "small_products.h"

namespace bloomlm {

constexpr int64_t kPanel = 64;         // rows of the matrix, and of x, that make a tile of results
constexpr int64_t kUnit = 16;          // rows of x are filled up to a multiple, since each number of rows is a kernel
constexpr int64_t kStepBytes = 4096;   // of rows that are multiplied at a time: so much of x stays in the second cache

inline void convert(const Kernels&, const float* from, int64_t count, float* to) { std::copy_n(from, count, to); }
inline void convert(const Kernels&, const Bfloat16* from, int64_t count, Bfloat16* to) { std::copy_n(from, count, to); }
inline void convert(const Kernels& kernels, const float* from, int64_t count, Bfloat16* to) {
  kernels.to_bfloat16(from, count, to);
}
inline void convert(const Kernels& kernels, const Bfloat16* from, int64_t count, float* to) {
  kernels.from_bfloat16(from, count, to);
}

// Up to kUnit rows of x from `first` on as columns of `packed`: numbers of 32 bits, kPanel of them in a row.
template <class T, class X>
void pack(const Kernels& kernels, const X* x, int64_t first, int64_t count, int64_t ins, T* rows, float* packed) {
  for (int64_t row = 0; row < count; ++row) convert(kernels, x + (first + row) * ins, ins, rows + row * ins);
  std::fill(rows + count * ins, rows + kUnit * ins, T{});
  const int64_t words = ins * sizeof(T) / sizeof(float);
  kernels.turn(reinterpret_cast<const float*>(rows), words, kUnit, words,
               packed + first / kPanel * kPanel * words + first % kPanel, kPanel);
}

// Rows of the matrix as T: where they lie, or decoded.
template <class T>
const T* panel_of(const Kernels& kernels, const Matrix& matrix, int64_t start, int64_t count, T* decoded, float* values) {
  constexpr auto kSame = sizeof(T) == sizeof(float) ? Matrix::kFloat32 : Matrix::kBfloat16;
  if (matrix.format == kSame) return static_cast<const T*>(matrix.data) + start * matrix.ins;
  for (int64_t row = 0; row < count; ++row) {
    kernels.decode_row(matrix, start + row, values);
    convert(kernels, values, matrix.ins, decoded + row * matrix.ins);
  }
  return decoded;
}

template <class T, class X>
void many_rows(const X* x, const Matrix& matrix, int64_t rows, const Finish& end, X* results) {
  constexpr int64_t kPair = sizeof(float) / sizeof(T), kStep = kStepBytes / sizeof(T);
  const int64_t ins = matrix.ins, words = ins / kPair;
  const Kernels kernels = kernels_for(matrix);
  Room<float> packed((rows + kPanel - 1) / kPanel * kPanel * words);
#pragma omp parallel
  {
    Room<T> decoded(kPanel * ins);
    Room<float> values(ins), tile(kPanel * kPanel), turned(kPanel * kPanel);
#pragma omp for schedule(static)
    for (int64_t first = 0; first < rows; first += kUnit)
      pack(kernels, x, first, std::min(kUnit, rows - first), ins, decoded.data(), packed.data());
#pragma omp for schedule(dynamic)
    for (int64_t start = 0; start < matrix.outs; start += kPanel) {
      const int64_t count = std::min(kPanel, matrix.outs - start);
      const T* panel = panel_of(kernels, matrix, start, count, decoded.data(), values.data());
      for (int64_t first = 0; first < rows; first += kPanel) {
        const int64_t here = std::min(kPanel, rows - first), columns = (here + kUnit - 1) / kUnit * kUnit;
        const auto* block = reinterpret_cast<const T*>(packed.data() + first * words);
        for (int64_t i = 0; i < ins; i += kStep)
          multiply(count, columns, std::min(kStep, ins - i), panel + i, ins, block + i * kPanel, kPanel, tile.data(), kPanel,
                   i > 0);
        kernels.turn(tile.data(), kPanel, count, columns, turned.data(), kPanel);
        for (int64_t row = 0; row < here; ++row) {
          float* found = turned.data() + row * kPanel;
          kernels.finish(found, end.bias ? end.bias + start : nullptr, end.is_gelu, count);
          convert(kernels, found, count, results + (first + row) * matrix.outs + start);
        }
      }
    }
    end_products(decoded.data());
  }
}

}  // namespace bloomlm

#endif
