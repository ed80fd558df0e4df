// Tensors, through the C interface that compiled programs have.

#ifndef BLOOMLM_TENSORS_H
#define BLOOMLM_TENSORS_H

#include <cstdint>
#include <memory>

namespace bloomlm {

template <class T>
T* data_of(AtenTensorHandle tensor) {
  void* pointer = nullptr;
  AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(tensor, &pointer));
  return static_cast<T*>(pointer);
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
inline AtenTensorHandle new_floats(int64_t rows, int64_t columns) {
  const int64_t sizes[] = {rows, columns}, strides[] = {columns, 1};
  AtenTensorHandle tensor = nullptr;
  AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(2, sizes, strides, aoti_torch_dtype_float32(),
                                                       aoti_torch_device_type_cpu(), 0, &tensor));
  return tensor;
}

// A tensor of ours, deleted when it goes out of scope.
struct Delete {
  void operator()(AtenTensorHandle tensor) const { aoti_torch_delete_tensor_object(tensor); }
};
using Tensor = std::unique_ptr<AtenTensorOpaque, Delete>;

// A tensor [rows, columns] over numbers that stay where they are.
inline Tensor tensor_at(void* data, int32_t dtype, int64_t rows, int64_t columns) {
  const int64_t sizes[] = {rows, columns}, strides[] = {columns, 1};
  AtenTensorHandle tensor = nullptr;
  AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob(data, 2, sizes, strides, 0, dtype,
                                                                 aoti_torch_device_type_cpu(), 0, &tensor));
  return Tensor(tensor);
}

}  // namespace bloomlm

#endif
