// bloomlm::product: x [N, ins] times the transpose of a matrix [outs, ins] in any format, plus a bias [outs], and GELU of it
// -> [N, outs].

#include "few_rows.h"
#include "many_rows.h"
#include "tensors.h"

namespace bloomlm {

// The most rows that few_rows computes faster than many_rows does.
constexpr int64_t kFewRows = 32;

inline Matrix matrix_of(AtenTensorHandle weight, AtenTensorHandle* scale, AtenTensorHandle* row_scale) {
  int32_t dtype = 0;
  int64_t* sizes = nullptr;
  AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(weight, &dtype));
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

extern "C" AOTITorchError aoti_torch_cpu_product(AtenTensorHandle x, AtenTensorHandle weight, AtenTensorHandle* scale,
                                                 AtenTensorHandle* row_scale, AtenTensorHandle* bias, int32_t is_gelu,
                                                 AtenTensorHandle* result) {
  using namespace bloomlm;
  const bloomlm::Floats given(x);
  const Matrix matrix = matrix_of(weight, scale, row_scale);
  const Finish end{bias ? data_of<float>(*bias) : nullptr, is_gelu != 0};
  const int64_t rows = given.sizes[0];
  *result = new_floats(rows, matrix.outs);
  float* results = data_of<float>(*result);
  const bool is_wide = matrix.format == Matrix::kFloat32 || matrix.format == Matrix::kFloat16;
  if (rows <= kFewRows) few_rows(given.data, matrix, rows, end, results);
  else if (kLevel == kAvx512Bf16 && !is_wide && matrix.ins % 2 == 0 && has_products<Bfloat16>())
    many_rows<Bfloat16>(given.data, matrix, rows, end, results);
  else if (has_products<float>()) many_rows<float>(given.data, matrix, rows, end, results);
  else few_rows(given.data, matrix, rows, end, results);
  return AOTI_TORCH_SUCCESS;
}
