// The operators for the model that runs without a program, through PyTorch's stable interface for libraries
// (https://docs.pytorch.org/docs/stable/notes/libtorch_stable_abi.html).

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

namespace bloomlm::library {

using torch::stable::Tensor;

inline Tensor product(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& scale) {
  AtenTensorHandle scales = scale ? scale->get() : nullptr, result = nullptr;
  AOTI_TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu_product(x.get(), weight.get(), scale ? &scales : nullptr, nullptr, &result));
  return Tensor(result);
}

inline Tensor attend(const Tensor& query, const Tensor& keys, const Tensor& values, const Tensor& slopes,
                     const Tensor& rows, const Tensor& slots) {
  AtenTensorHandle result = nullptr;
  AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_attend(query.get(), keys.get(), values.get(), slopes.get(), rows.get(),
                                                    slots.get(), &result));
  return Tensor(result);
}

}  // namespace bloomlm::library

STABLE_TORCH_LIBRARY(bloomlm_kernels, library) {
  library.def("product(Tensor x, Tensor weight, Tensor? scale) -> Tensor");
  library.def("attend(Tensor query, Tensor keys, Tensor values, Tensor slopes, Tensor rows, Tensor slots) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(bloomlm_kernels, CPU, library) {
  library.impl("product", TORCH_BOX(&bloomlm::library::product));
  library.impl("attend", TORCH_BOX(&bloomlm::library::attend));
}
