// Matrices [outs, ins] in the formats of export/weights.py.
//
// | format   | stored numbers            | scales                                  | activations are rounded to             |
// |----------|---------------------------|-----------------------------------------|----------------------------------------|
// | float32  | float                     |                                         |                                        |
// | float16  | 16 bits                   |                                         |                                        |
// | bfloat16 | 16 bits                   |                                         |                                        |
// | int8     | int8                      | a float for each quarter of a row       | 16 bits, a scale for a row             |
// | int4     | two numbers + 8 in a byte | int8 for 16 columns and a float for all | 8 bits, a scale for 32 columns          |
//
// int4: a chunk of a row has L lanes of 32 columns, L = 16 or, in a row of other length, the greatest common divisor of
// 16 and the number of lanes. Byte (step, lane, j) of its 4 * L * 4 bytes holds columns 4 * step + j (low half) and
// 16 + 4 * step + j (high half) of the lane, so that vectors hold the same four columns of all lanes.
// Scales are in the order (chunk, half, lane).

#ifndef BLOOMLM_MATRIX_H
#define BLOOMLM_MATRIX_H

#include <cstdint>
#include <cstring>

namespace bloomlm {

constexpr int64_t kInt8Parts = 4;     // parts of a row, each with a scale
constexpr int64_t kLaneColumns = 32;  // of int4: columns that share a scale of the activations
constexpr int64_t kHalfColumns = 16;  // of int4: columns that share a scale of the matrix
constexpr int64_t kMostLanes = 16;    // lanes of a chunk
constexpr int64_t kChunk = kMostLanes * kLaneColumns;  // columns of a chunk of kMostLanes lanes

struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

struct Matrix {
  enum Format { kFloat32, kFloat16, kBfloat16, kInt8, kInt4 } format;
  const void* data;
  const void* scale;
  const float* row_scale;
  int64_t outs, ins;
};

inline int64_t row_bytes(const Matrix& matrix) {
  constexpr int64_t kHalfBytes[] = {8, 4, 4, 2, 1};
  return matrix.ins * kHalfBytes[matrix.format] / 2;
}

// Lanes of each chunk of int4.
inline int64_t lanes_of(int64_t ins) {
  int64_t lanes = kMostLanes;
  while (ins / kLaneColumns % lanes) lanes /= 2;
  return lanes;
}

inline float to_float(float number) { return number; }
inline float to_float(int8_t number) { return number; }
inline float to_float(Bfloat16 number) {
  const uint32_t wide = static_cast<uint32_t>(number.bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}
// By the integer value of the bits: the exponent's bias is corrected by a product, which is exact for subnormal numbers too.
inline float to_float(Float16 number) {
  const uint32_t magnitude = static_cast<uint32_t>(number.bits & 0x7fff) << 13;
  const bool is_finite = magnitude < 0x0f800000;
  const uint32_t wide = is_finite ? magnitude : magnitude | 0x70000000;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  if (is_finite) value *= 0x1p112f;
  return number.bits & 0x8000 ? -value : value;
}

}  // namespace bloomlm

#endif
