// Tensors, through the C interface that compiled programs have.

#ifndef BLOOMLM_TENSORS_H
#define BLOOMLM_TENSORS_H

#include <cstdint>

namespace bloomlm {

template <class T>
T* data_of(AtenTensorHandle tensor) {
  void* pointer = nullptr;
  AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(tensor, &pointer));
  return static_cast<T*>(pointer);
}

inline int32_t dtype_of(AtenTensorHandle tensor) {
  int32_t dtype = 0;
  AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor, &dtype));
  return dtype;
}

// A tensor of floats that the compiled code passes in.
struct Floats {
  float* data = nullptr;
  int64_t *sizes = nullptr, *strides = nullptr;

  explicit Floats(AtenTensorHandle tensor) : data(data_of<float>(tensor)) {
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(tensor, &sizes));
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(tensor, &strides));
  }
};

// An uninitialised tensor [rows, columns] for the compiled code.
inline AtenTensorHandle new_tensor(int64_t rows, int64_t columns, int32_t dtype) {
  const int64_t sizes[] = {rows, columns}, strides[] = {columns, 1};
  AtenTensorHandle tensor = nullptr;
  AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(2, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0,
                                                       &tensor));
  return tensor;
}

}  // namespace bloomlm

#endif
