// bloomlm::decoded: a matrix [outs, ins] in any format -> the same in float32.

#include "matrix.h"
#include "tensors.h"

extern "C" AOTITorchError aoti_torch_cpu_decoded(AtenTensorHandle weight, AtenTensorHandle* scale,
                                                 AtenTensorHandle* result) {
  const bloomlm::Matrix matrix = bloomlm::matrix_of(weight, scale);
  *result = bloomlm::new_floats(matrix.outs, matrix.ins);
  float* values = bloomlm::Floats(*result).data;
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < matrix.outs; ++row) matrix.decode_row(row, values + row * matrix.ins);
  return AOTI_TORCH_SUCCESS;
}
