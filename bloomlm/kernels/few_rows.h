// x [N, ins] times the transpose of a matrix [outs, ins] for few rows of x: the matrix is read once, at the memory's speed.

#ifndef BLOOMLM_FEW_ROWS_H
#define BLOOMLM_FEW_ROWS_H

#include <omp.h>

#include <algorithm>
#include <memory>

#include "level.h"
#include "scalar.h"

namespace bloomlm {

// Four rows of the matrix are read at a time, each in order and so far from the next. Several rows of x with int4 take one row
// after another.
constexpr int64_t kFarBytes = 256 << 10, kFarBytesOfInt4 = 64 << 10;

// Whether rows fill the vectors of every level.
inline bool fills_vectors(const Matrix& matrix) {
  constexpr int64_t kColumns[] = {16, 16, 32, 64 * kInt8Parts, kChunk};
  const int64_t columns = kColumns[matrix.format];
  return matrix.ins % columns == 0;
}

struct Kernels {
  decltype(&scalar::few_rows) few_rows;
  decltype(&scalar::round_row) round_row;
  decltype(&scalar::decode_row) decode_row;
  decltype(&scalar::finish) finish;
  decltype(&scalar::turn) turn;
  decltype(&scalar::to_bfloat16) to_bfloat16;
  decltype(&scalar::from_bfloat16) from_bfloat16;
};

#define KERNELS(level)                                                                                     \
  { level::few_rows, level::round_row, level::decode_row, level::finish, level::turn, level::to_bfloat16, \
    level::from_bfloat16 }

inline Kernels kernels_of_level() {
  if (kLevel == kScalar) return KERNELS(scalar);
  if (kLevel == kAvx512Bf16) return KERNELS(avx512_bf16);
  if (kLevel == kAvx512) return KERNELS(avx512);
  if (kLevel == kAvxVnni) return KERNELS(avxvnni);
  return KERNELS(avx2);
}

inline Kernels kernels_for(const Matrix& matrix) {
  if (!fills_vectors(matrix)) return KERNELS(scalar);
  return kernels_of_level();
}

// Room for some numbers, which are not set, and begin at a cache line.
template <class T>
class Room {
 public:
  explicit Room(int64_t count) : room_(new char[count * sizeof(T) + 63]) {}
  T* data() { return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(room_.get()) + 63) & ~uintptr_t{63}); }

 private:
  std::unique_ptr<char[]> room_;
};

// What is done with a product: a bias [outs] is added, or none; then GELU is applied.
struct Finish {
  const float* bias;
  bool is_gelu;
};

inline Activations activations_for(const Matrix& matrix) {
  switch (matrix.format) {
    case Matrix::kInt8: return kShorts;
    case Matrix::kInt4: return kBytes;
    case Matrix::kBfloat16: return kLevel == kAvx512Bf16 && fills_vectors(matrix) ? kBfloat16s : kFloats;
    default: return kFloats;
  }
}

// The distance of rows that are read at a time, by which all threads have equally many units of 4 times so many rows.
inline int64_t spread_of(const Matrix& matrix) {
  const int64_t far_bytes = matrix.format == Matrix::kInt4 ? kFarBytesOfInt4 : kFarBytes;
  const int64_t threads = omp_get_max_threads(), far_rows = std::max<int64_t>(1, far_bytes / row_bytes(matrix));
  const int64_t share = (matrix.outs + 4 * threads - 1) / (4 * threads), units = (share + far_rows - 1) / far_rows;
  return (share + units - 1) / units;
}

inline void few_rows(const float* x, const Matrix& matrix, int64_t rows, const Finish& end, float* results) {
  constexpr int64_t kBytesOf[] = {4, 2, 2, 1};
  const int64_t ins = matrix.ins, lanes = ins / kLaneColumns;
  const Activations activations = activations_for(matrix);
  // rows whose distance is a power of two would share few places of the first cache
  const int64_t stride = ins + 64, row_size = stride * kBytesOf[activations];
  const int64_t num_scales = activations == kShorts ? 1 : activations == kBytes ? lanes : 0;
  const int64_t num_offsets = activations == kBytes ? 2 * lanes : 0;
  Room<char> numbers(rows * row_size);
  Room<float> scales(rows * num_scales);
  Room<int32_t> offsets(rows * num_offsets);
  const Operands p{matrix, rows, stride, numbers.data(), scales.data(), offsets.data(), results};
  const Kernels kernels = kernels_for(matrix);
  const int64_t unit = 4 * spread_of(matrix);
  const auto round = [&](int64_t row) {
    kernels.round_row(x + row * ins, matrix,
                      {numbers.data() + row * row_size, scales.data() + row * num_scales, offsets.data() + row * num_offsets});
  };
  if (rows == 1) round(0);  // threads would have to wait for each other
#pragma omp parallel
  {
    if (rows > 1) {
#pragma omp for schedule(static)
      for (int64_t row = 0; row < rows; ++row) round(row);
    }
#pragma omp for schedule(static)
    for (int64_t start = 0; start < matrix.outs; start += unit) {
      const int64_t count = std::min(unit, matrix.outs - start);
      kernels.few_rows(p, start, (count + 3) / 4);
      if (end.bias == nullptr && !end.is_gelu) continue;
      for (int64_t row = 0; row < rows; ++row)
        kernels.finish(results + row * matrix.outs + start, end.bias ? end.bias + start : nullptr, end.is_gelu, count);
    }
  }
}

}  // namespace bloomlm

#endif
