// Tensors of floats, through the C interface that compiled programs have.

#ifndef BLOOMLM_TENSORS_H
#define BLOOMLM_TENSORS_H

#include <cstdint>

namespace bloomlm {

// A tensor of floats that the compiled code passes in.
struct Floats {
  float* data = nullptr;
  int64_t *sizes = nullptr, *strides = nullptr;

  explicit Floats(AtenTensorHandle tensor) {
    void* pointer = nullptr;
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(tensor, &pointer));
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(tensor, &sizes));
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(tensor, &strides));
    data = static_cast<float*>(pointer);
  }
};

// The numbers of a contiguous tensor of int64.
inline const int64_t* int64s(AtenTensorHandle tensor) {
  void* pointer = nullptr;
  AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(tensor, &pointer));
  return static_cast<const int64_t*>(pointer);
}

// An uninitialised tensor [rows, columns].
inline AtenTensorHandle new_floats(int64_t rows, int64_t columns) {
  const int64_t sizes[] = {rows, columns}, strides[] = {columns, 1};
  AtenTensorHandle tensor = nullptr;
  AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(2, sizes, strides, aoti_torch_dtype_float32(),
                                                       aoti_torch_device_type_cpu(), 0, &tensor));
  return tensor;
}

}  // namespace bloomlm

#endif
