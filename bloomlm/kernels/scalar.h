// The oracle of rows.h in plain C++, which also computes rows whose length does not fill vectors.

#ifndef BLOOMLM_SCALAR_H
#define BLOOMLM_SCALAR_H

#include <algorithm>
#include <cmath>

#include "product.h"

namespace bloomlm {

constexpr float kGeluFactor = 0.7978845608f;  // sqrt(2 / pi)
constexpr float kGeluCubic = 0.044715f;

}  // namespace bloomlm

namespace bloomlm::scalar {

template <class W>
float dense(const Operands& p, int64_t row, int64_t out) {
  const auto* x = static_cast<const float*>(p.x) + row * p.x_stride;
  const auto* w = static_cast<const W*>(p.matrix.data) + out * p.matrix.ins;
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < p.matrix.ins; ++i) sum += x[i] * to_float(w[i]);
  return sum;
}

inline float eight_bits(const Operands& p, int64_t row, int64_t out) {
  const int64_t columns = p.matrix.ins / kInt8Parts;
  float sum = 0.0f;
  for (int64_t part = 0; part < kInt8Parts; ++part) {
    const auto* x = static_cast<const int16_t*>(p.x) + row * p.x_stride + part * columns;
    const auto* w = static_cast<const int8_t*>(p.matrix.data) + out * p.matrix.ins + part * columns;
    int64_t whole = 0;
    for (int64_t i = 0; i < columns; ++i) whole += x[i] * w[i];
    sum += static_cast<float>(whole) * static_cast<const float*>(p.matrix.scale)[out * kInt8Parts + part];
  }
  return sum * p.x_scale[row];
}

inline float four_bits(const Operands& p, int64_t row, int64_t out) {
  const int64_t lanes = lanes_of(p.matrix.ins), all_lanes = p.matrix.ins / kLaneColumns;
  const auto* w = static_cast<const uint8_t*>(p.matrix.data) + out * p.matrix.ins / 2;
  const auto* scales = static_cast<const int8_t*>(p.matrix.scale) + out * 2 * all_lanes;
  const auto* x = static_cast<const int8_t*>(p.x) + row * p.x_stride;
  float sum = 0.0f;
  for (int64_t number = 0; number < all_lanes; ++number) {
    const int64_t chunk = number / lanes, lane = number % lanes;
    for (int64_t half = 0; half < 2; ++half) {
      const int64_t place = (2 * chunk + half) * lanes;  // in units of 16 columns
      int32_t whole = p.x_offset[row * 2 * all_lanes + place + lane];
      for (int64_t step = 0; step < 4; ++step)
        for (int64_t j = 0; j < 4; ++j) {
          const int64_t at = (step * lanes + lane) * 4 + j;
          whole += (w[chunk * lanes * 16 + at] >> 4 * half & 15) * x[place * 16 + at];
        }
      sum += static_cast<float>(whole) * scales[place + lane] * p.x_scale[row * all_lanes + number];
    }
  }
  return sum * p.matrix.row_scale[out];
}

inline float one(const Operands& p, int64_t row, int64_t out) {
  switch (p.matrix.format) {
    case Matrix::kFloat32: return dense<float>(p, row, out);
    case Matrix::kFloat16: return dense<Float16>(p, row, out);
    case Matrix::kBfloat16: return dense<Bfloat16>(p, row, out);
    case Matrix::kInt8: return eight_bits(p, row, out);
    default: return four_bits(p, row, out);
  }
}

inline void few_rows(const Operands& p, int64_t start, int64_t spread) {
  for (int64_t out = start; out < std::min(start + 4 * spread, p.matrix.outs); ++out)
    for (int64_t row = 0; row < p.rows; ++row) p.results[row * p.matrix.outs + out] = one(p, row, out);
}

inline float largest_of(const float* x, int64_t count) {
  float largest = 0.0f, zero = 0.0f;
  for (int64_t i = 0; i < count; ++i) {
    largest = std::max(largest, std::fabs(x[i]));
    zero += 0.0f * x[i];  // NaN where x is, which a maximum would lose
  }
  return largest + zero;
}

inline void round_numbers(const float* x, int64_t count, float factor, int16_t* numbers) {
  for (int64_t i = 0; i < count; ++i) numbers[i] = static_cast<int16_t>(std::lrintf(x[i] * factor));
}

inline void round_row(const float* x, const Matrix& matrix, const RoundedRow& row) {
  bloomlm::round_row(x, matrix, row, largest_of, round_numbers);
}

template <class W>
void decode_numbers(const W* numbers, int64_t count, float scale, float* values) {
  for (int64_t i = 0; i < count; ++i) values[i] = scale * to_float(numbers[i]);
}

inline void decode_row(const Matrix& matrix, int64_t row, float* values) {
  const int64_t start = row * matrix.ins;
  if (matrix.format == Matrix::kFloat16)
    return decode_numbers(static_cast<const Float16*>(matrix.data) + start, matrix.ins, 1.0f, values);
  if (matrix.format == Matrix::kBfloat16)
    return decode_numbers(static_cast<const Bfloat16*>(matrix.data) + start, matrix.ins, 1.0f, values);
  bloomlm::decode_row(matrix, row, values, decode_numbers<int8_t>);
}

// GELU in its tanh form: x (1 + tanh u) / 2 with u = kGeluFactor (x + kGeluCubic x^3).
inline float gelu(float x) { return 0.5f * x * (1.0f + std::tanh(kGeluFactor * (x + kGeluCubic * x * x * x))); }

// Adds the bias, if there is one, and applies GELU, if asked.
inline void finish(float* results, const float* bias, bool is_gelu, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const float sum = bias ? results[i] + bias[i] : results[i];
    results[i] = is_gelu ? gelu(sum) : sum;
  }
}

// The transpose of a block [rows, columns] of numbers of 32 bits.
inline void turn(const float* from, int64_t from_stride, int64_t rows, int64_t columns, float* to, int64_t to_stride) {
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t column = 0; column < columns; ++column) to[column * to_stride + row] = from[row * from_stride + column];
}

// The nearest, to the even one of two; NaN stays NaN.
inline void to_bfloat16(const float* from, int64_t count, Bfloat16* to) {
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    std::memcpy(&bits, from + i, sizeof bits);
    const uint32_t rounded = from[i] == from[i] ? bits + 0x7fff + (bits >> 16 & 1) : 0x7fc00000;
    to[i] = {static_cast<uint16_t>(rounded >> 16)};
  }
}

inline void from_bfloat16(const Bfloat16* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = to_float(from[i]);
}

}  // namespace bloomlm::scalar

namespace bloomlm {

inline void assign(float& to, float number) { to = number; }
inline void assign(Bfloat16& to, float number) { scalar::to_bfloat16(&number, 1, &to); }

}  // namespace bloomlm

#endif
