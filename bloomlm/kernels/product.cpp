// bloomlm::product: x [N, ins] times the transpose of a matrix [outs, ins] in any format, plus a bias [outs], and GELU of it
// -> [N, outs]. x and the bias are in float32 or bfloat16, and the result is what x is.

#include <type_traits>

#include "few_rows.h"
#include "many_rows.h"
#include "tensors.h"

namespace bloomlm {

// The most rows that few_rows computes faster than many_rows does.
constexpr int64_t kFewRows = 24;

inline Matrix matrix_of(AtenTensorHandle weight, AtenTensorHandle* scale, AtenTensorHandle* row_scale) {
  const int32_t dtype = dtype_of(weight);
  int64_t* sizes = nullptr;
  AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(weight, &sizes));
  const auto format = dtype == aoti_torch_dtype_float32()    ? Matrix::kFloat32
                      : dtype == aoti_torch_dtype_float16()  ? Matrix::kFloat16
                      : dtype == aoti_torch_dtype_bfloat16() ? Matrix::kBfloat16
                      : dtype == aoti_torch_dtype_int8()     ? Matrix::kInt8
                                                             : Matrix::kInt4;
  return {format, data_of<void>(weight), scale ? data_of<void>(*scale) : nullptr,
          row_scale ? data_of<float>(*row_scale) : nullptr, sizes[0],
          format == Matrix::kInt4 ? 2 * sizes[1] : sizes[1]};
}

}  // namespace bloomlm

namespace bloomlm {

template <class X>
void product(const X* x, const Matrix& matrix, int64_t rows, const Finish& end, X* results) {
  const bool is_wide = matrix.format == Matrix::kFloat32 || matrix.format == Matrix::kFloat16;
  const bool in_bfloat16 = kLevel == kAvx512Bf16 && !is_wide && matrix.ins % 2 == 0;
  if (rows > kFewRows && in_bfloat16 && has_products<Bfloat16>()) return many_rows<Bfloat16>(x, matrix, rows, end, results);
  if (rows > kFewRows && has_products<float>()) return many_rows<float>(x, matrix, rows, end, results);
  if constexpr (std::is_same_v<X, float>) {
    few_rows(x, matrix, rows, end, results);
  } else {
    const Kernels kernels = kernels_for(matrix);
    Room<float> wide(rows * matrix.ins), found(rows * matrix.outs);
    kernels.from_bfloat16(x, rows * matrix.ins, wide.data());
    few_rows(wide.data(), matrix, rows, end, found.data());
    kernels.to_bfloat16(found.data(), rows * matrix.outs, results);
  }
}

// A bias in float32 or bfloat16 as floats.
inline const float* bias_of(AtenTensorHandle bias, int64_t count, Room<float>& room) {
  if (dtype_of(bias) == aoti_torch_dtype_float32()) return data_of<float>(bias);
  kernels_of_level().from_bfloat16(data_of<Bfloat16>(bias), count, room.data());
  return room.data();
}

}  // namespace bloomlm

extern "C" AOTITorchError aoti_torch_cpu_product(AtenTensorHandle x, AtenTensorHandle weight, AtenTensorHandle* scale,
                                                 AtenTensorHandle* row_scale, AtenTensorHandle* bias, int32_t is_gelu,
                                                 AtenTensorHandle* result) {
  using namespace bloomlm;
  const Matrix matrix = matrix_of(weight, scale, row_scale);
  const int64_t rows = bloomlm::Floats(x).sizes[0];
  Room<float> room(matrix.outs);
  const Finish end{bias ? bias_of(*bias, matrix.outs, room) : nullptr, is_gelu != 0};
  *result = new_tensor(rows, matrix.outs, dtype_of(x));
  if (dtype_of(x) == aoti_torch_dtype_float32()) product(data_of<float>(x), matrix, rows, end, data_of<float>(*result));
  else product(data_of<Bfloat16>(x), matrix, rows, end, data_of<Bfloat16>(*result));
  return AOTI_TORCH_SUCCESS;
}
