// x [N, ins] times the transpose of a matrix [outs, ins] for many rows of x, through oneDNN: in float32, or in bfloat16
// where the processor has products of it and the matrix has no more bits. Blocks of the matrix are decoded one at a time.

#ifndef BLOOMLM_MANY_ROWS_H
#define BLOOMLM_MANY_ROWS_H

#include <algorithm>
#include <memory>
#include <vector>

#include "few_rows.h"
#include "tensors.h"

extern "C" AOTITorchError aoti_torch_cpu__linear_pointwise(AtenTensorHandle x, AtenTensorHandle weight,
                                                           AtenTensorHandle* bias, const char* attr,
                                                           const double** scalars, int64_t num_scalars,
                                                           const char** algorithm, AtenTensorHandle* result);

namespace bloomlm {

constexpr int64_t kBlockElements = 2 << 20;  // decoded at a time: they stay in the processor's caches until they are used

inline void convert(const Kernels&, const float* from, int64_t count, float* to) { std::copy_n(from, count, to); }
inline void convert(const Kernels& kernels, const float* from, int64_t count, Bfloat16* to) {
  kernels.to_bfloat16(from, count, to);
}
inline void convert(const Kernels& kernels, const Bfloat16* from, int64_t count, float* to) {
  kernels.from_bfloat16(from, count, to);
}

inline int32_t dtype_of(const float*) { return aoti_torch_dtype_float32(); }
inline int32_t dtype_of(const Bfloat16*) { return aoti_torch_dtype_bfloat16(); }

// oneDNN's product of tensors [rows, ins] and [outs, ins], which it returns as [rows, outs].
inline Tensor linear(const Tensor& x, const Tensor& weight) {
  const char* algorithm = "";
  AtenTensorHandle result = nullptr;
  AOTI_TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu__linear_pointwise(x.get(), weight.get(), nullptr, "none", nullptr, 0, &algorithm, &result));
  return Tensor(result);
}

template <class T>
void many_rows(const float* x, const Matrix& matrix, int64_t rows, float* results) {
  const int64_t ins = matrix.ins, block_rows = std::min(matrix.outs, std::max<int64_t>(1, kBlockElements / ins));
  const Kernels kernels = kernels_for(matrix);
  Room<T> rounded(rows * ins), decoded(block_rows * ins);
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < rows; ++row) convert(kernels, x + row * ins, ins, rounded.data() + row * ins);
  const Tensor x_tensor = tensor_at(rounded.data(), dtype_of(rounded.data()), rows, ins);
  for (int64_t start = 0; start < matrix.outs; start += block_rows) {
    const int64_t count = std::min(block_rows, matrix.outs - start);
#pragma omp parallel
    {
      std::vector<float> values(ins);
#pragma omp for schedule(static)
      for (int64_t row = 0; row < count; ++row) {
        kernels.decode_row(matrix, start + row, values.data());
        convert(kernels, values.data(), ins, decoded.data() + row * ins);
      }
    }
    const Tensor block = linear(x_tensor, tensor_at(decoded.data(), dtype_of(decoded.data()), count, ins));
    const T* products = data_of<T>(block.get());
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; ++row)
      convert(kernels, products + row * count, count, results + row * matrix.outs + start);
  }
}

}  // namespace bloomlm

#endif
