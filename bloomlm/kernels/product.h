// What product.cpp gives to the code of each level.

#ifndef BLOOMLM_PRODUCT_H
#define BLOOMLM_PRODUCT_H

#include <immintrin.h>

#include <cstdint>

#include "matrix.h"

#define INLINE inline __attribute__((always_inline))

namespace bloomlm {

// How a kernel takes activations: as they are, or rounded to bfloat16, to 16-bit numbers (for int8), or to bytes in the order
// (chunk, half, step, lane, j) (for int4).
enum Activations { kFloats, kBfloat16s, kShorts, kBytes };

// A product of `rows` activations with a matrix.
struct Operands {
  Matrix matrix;
  int64_t rows;
  int64_t x_stride;         // elements from one row of x to the next
  const void* x;            // [N, ins]: see Activations
  const float* x_scale;     // of int8 [N]; of int4 [N, lanes]
  const int32_t* x_offset;  // of int4, [N, chunk, half, lane]: -8 times the sum of the half's activations
  float* results;           // [N, outs]
};

INLINE void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

template <class T>
INLINE constexpr T least(T a, T b) {
  return a < b ? a : b;
}

// A row of activations rounded to whole numbers; see Operands.
struct RoundedRow {
  void* numbers;
  float* scales;
  int32_t* offsets;
};

// The factor that brings the largest magnitude to `most`.
INLINE float factor_to(float most, float largest) { return largest > 0.0f ? most / largest : 0.0f; }

// Copies a row, or rounds it for a matrix of whole numbers. largest(x, count) is the largest magnitude, or NaN or infinite if one of the
// numbers is, and so are then the scale and the results; round(x, count, factor, numbers) gives 16-bit numbers.
template <class Largest, class Round>
INLINE void round_row(const float* x, const Matrix& matrix, const RoundedRow& row, Largest largest, Round round) {
  if (matrix.format == Matrix::kInt8) {
    const float most = largest(x, matrix.ins);
    row.scales[0] = most / 32767.0f;
    return round(x, matrix.ins, factor_to(32767.0f, most), static_cast<int16_t*>(row.numbers));
  }
  if (matrix.format != Matrix::kInt4) {
    std::memcpy(row.numbers, x, matrix.ins * sizeof(float));
    return;
  }
  const int64_t lanes = lanes_of(matrix.ins);
  for (int64_t number = 0; number < matrix.ins / kLaneColumns; ++number, x += kLaneColumns) {
    const int64_t place = 2 * (number - number % lanes), lane = number % lanes;
    const float most = largest(x, kLaneColumns);
    alignas(16) int16_t whole[kLaneColumns];
    row.scales[number] = most / 127.0f;
    round(x, kLaneColumns, factor_to(127.0f, most), whole);
    for (int64_t half = 0; half < 2; ++half) {
      const auto eights = reinterpret_cast<const __m128i*>(whole + half * kHalfColumns);
      const __m128i bytes = _mm_packs_epi16(_mm_load_si128(eights), _mm_load_si128(eights + 1));
      const int32_t steps[4] = {_mm_extract_epi32(bytes, 0), _mm_extract_epi32(bytes, 1), _mm_extract_epi32(bytes, 2),
                                _mm_extract_epi32(bytes, 3)};
      char* numbers = static_cast<char*>(row.numbers) + (place + half * lanes) * kHalfColumns + 4 * lane;
      for (int64_t step = 0; step < 4; ++step) std::memcpy(numbers + 4 * step * lanes, steps + step, 4);
      // sums of eight unsigned bytes, each 128 too large
      const __m128i sums = _mm_sad_epu8(_mm_xor_si128(bytes, _mm_set1_epi8(-128)), _mm_setzero_si128());
      const int32_t sum = _mm_extract_epi32(sums, 0) + _mm_extract_epi32(sums, 2) - 128 * static_cast<int32_t>(kHalfColumns);
      row.offsets[place + half * lanes + lane] = -8 * sum;
    }
  }
}

// A row of a matrix of whole numbers in float32; decode(numbers, count, scale, values) does so for numbers of one scale.
template <class Decode>
INLINE void decode_row(const Matrix& matrix, int64_t row, float* values, Decode decode) {
  if (matrix.format == Matrix::kInt8) {
    const auto* numbers = static_cast<const int8_t*>(matrix.data) + row * matrix.ins;
    const auto* scales = static_cast<const float*>(matrix.scale) + row * kInt8Parts;
    const int64_t columns = matrix.ins / kInt8Parts;
    for (int64_t i = 0; i < kInt8Parts; ++i) decode(numbers + i * columns, columns, scales[i], values + i * columns);
    return;
  }
  const int64_t lanes = lanes_of(matrix.ins), all_lanes = matrix.ins / kLaneColumns;
  const auto* bytes = static_cast<const uint8_t*>(matrix.data) + row * matrix.ins / 2;
  const auto* scales = static_cast<const int8_t*>(matrix.scale) + row * 2 * all_lanes;
  for (int64_t first = 0; first < all_lanes; first += lanes, bytes += lanes * kHalfColumns, scales += 2 * lanes) {
    for (int64_t lane = 0; lane < lanes; ++lane, values += kLaneColumns) {
      int32_t steps[4];
      for (int64_t step = 0; step < 4; ++step) std::memcpy(steps + step, bytes + (step * lanes + lane) * 4, 4);
      // in a register: one load of four separate stores would have to wait for them
      const __m128i both = _mm_setr_epi32(steps[0], steps[1], steps[2], steps[3]);
      const __m128i mask = _mm_set1_epi8(15), eight = _mm_set1_epi8(8);
      alignas(16) int8_t numbers[kLaneColumns];
      const auto halves = reinterpret_cast<__m128i*>(numbers);
      _mm_store_si128(halves, _mm_sub_epi8(_mm_and_si128(both, mask), eight));
      _mm_store_si128(halves + 1, _mm_sub_epi8(_mm_and_si128(_mm_srli_epi16(both, 4), mask), eight));
      decode(numbers, kHalfColumns, matrix.row_scale[row] * scales[lane], values);
      decode(numbers + kHalfColumns, kHalfColumns, matrix.row_scale[row] * scales[lanes + lane], values + kHalfColumns);
    }
  }
}

}  // namespace bloomlm

#endif
