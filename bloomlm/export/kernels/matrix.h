// A matrix [outs, ins] in any of the formats of export/weights.py, and its rows in float32.

#ifndef BLOOMLM_MATRIX_H
#define BLOOMLM_MATRIX_H

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace bloomlm {

constexpr int64_t kInt8Parts = 4;  // parts of a row, each with its own scale

// The number that 16 bits of a bfloat16 stand for.
inline float bfloat16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

struct Matrix {
  enum Format { kFloat32, kFloat16, kBfloat16, kInt8, kInt4 } format;
  const void* data;
  const void* scale;
  int64_t outs, ins;

  void decode_row(int64_t row, float* values) const;
};

// int8 has a scale for each part of a row. int4 keeps columns j and j + ins / 2 in byte j, and has G = ins / 32 scales
// for a row, of which columns g, g + G, g + 2 G, ... share number g.
inline void Matrix::decode_row(int64_t row, float* values) const {
  const int64_t start = row * ins, half = ins / 2, groups = ins / 32;
  const auto* bytes = static_cast<const int8_t*>(data) + start;
  const auto* nibbles = static_cast<const uint8_t*>(data) + row * half;
  const auto* bits = static_cast<const uint16_t*>(data) + start;
  const auto* scales = static_cast<const float*>(scale) + kInt8Parts * row;
  const auto* group_scales = static_cast<const uint16_t*>(scale) + row * groups;
  switch (format) {
    case kInt8:
      for (int64_t part = 0, i = 0; part < kInt8Parts; ++part)
        for (const int64_t end = (part + 1) * ins / kInt8Parts; i < end; ++i) values[i] = scales[part] * bytes[i];
      break;
    case kInt4:
      for (int64_t first = 0; first < half; first += groups) {
        for (int64_t g = 0; g < groups; ++g) {
          const float factor = bfloat16(group_scales[g]);
          values[first + g] = factor * ((nibbles[first + g] & 15) - 8);
          values[half + first + g] = factor * ((nibbles[first + g] >> 4) - 8);
        }
      }
      break;
    case kBfloat16:
      for (int64_t i = 0; i < ins; ++i) values[i] = bfloat16(bits[i]);
      break;
    case kFloat16:
      for (int64_t i = 0; i < ins; ++i) values[i] = _cvtsh_ss(bits[i]);
      break;
    case kFloat32:
      std::copy_n(static_cast<const float*>(data) + start, ins, values);
  }
}

inline Matrix matrix_of(AtenTensorHandle weight, AtenTensorHandle* scale) {
  int32_t dtype = 0;
  int64_t* sizes = nullptr;
  void *data = nullptr, *scales = nullptr;
  AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(weight, &dtype));
  AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(weight, &sizes));
  AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(weight, &data));
  if (scale) AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(*scale, &scales));
  const auto format = dtype == aoti_torch_dtype_float32()    ? Matrix::kFloat32
                      : dtype == aoti_torch_dtype_float16()  ? Matrix::kFloat16
                      : dtype == aoti_torch_dtype_bfloat16() ? Matrix::kBfloat16
                      : dtype == aoti_torch_dtype_int8()     ? Matrix::kInt8
                                                             : Matrix::kInt4;
  return {format, data, scales, sizes[0], format == Matrix::kInt4 ? 2 * sizes[1] : sizes[1]};
}

}  // namespace bloomlm

#endif
