// x [N, ins] times the transpose of a matrix [outs, ins] for few rows of x: the matrix is read once, at the memory's speed.

#ifndef BLOOMLM_FEW_ROWS_H
#define BLOOMLM_FEW_ROWS_H

#include <algorithm>
#include <memory>

#include "level.h"
#include "scalar.h"

namespace bloomlm {

// Four rows of the matrix are read at a time, each in order and so far from the next: that is the pattern that processors
// prefetch by themselves.
constexpr int64_t kFarBytes = 16 << 10;

// Whether rows fill the vectors of every level.
inline bool fills_vectors(const Matrix& matrix) {
  const int64_t columns = matrix.format == Matrix::kInt4 ? kChunk : matrix.format == Matrix::kInt8 ? 32 * kInt8Parts : 16;
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
  if (kLevel >= kAvx512) return KERNELS(avx512);
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

inline void few_rows(const float* x, const Matrix& matrix, int64_t rows, const Finish& end, float* results) {
  const int64_t ins = matrix.ins, lanes = ins / kLaneColumns;
  const bool is_int8 = matrix.format == Matrix::kInt8, is_int4 = matrix.format == Matrix::kInt4;
  const bool is_whole = is_int8 || is_int4;
  // rows whose distance is a power of two would share few places of the first cache
  const int64_t stride = ins + 64;
  Room<float> floats(is_whole ? 0 : rows * stride), scales(is_int8 ? rows * kInt8Parts : is_int4 ? rows * lanes : 0);
  Room<int16_t> shorts(is_whole ? rows * stride : 0);
  Room<int32_t> offsets(is_int4 ? rows * 2 * lanes : 0);
  auto* bytes = reinterpret_cast<int8_t*>(shorts.data());
  const Operands p{matrix, rows, stride, is_whole ? shorts.data() : static_cast<const void*>(floats.data()), scales.data(),
                   offsets.data(), results};
  const Kernels kernels = kernels_for(matrix);
  const int64_t unit = 4 * std::max<int64_t>(1, kFarBytes / row_bytes(matrix));
#pragma omp parallel
  {
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
      if (is_int8)
        kernels.round_row(x + row * ins, matrix,
                          {shorts.data() + row * stride, scales.data() + row * kInt8Parts, nullptr});
      else if (is_int4)
        kernels.round_row(x + row * ins, matrix,
                          {bytes + row * stride, scales.data() + row * lanes, offsets.data() + row * 2 * lanes});
      else std::copy_n(x + row * ins, ins, floats.data() + row * stride);
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
