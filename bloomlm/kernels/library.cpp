// The operators for the model that runs without a program, through PyTorch's stable interface for libraries
// (https://docs.pytorch.org/docs/stable/notes/libtorch_stable_abi.html).

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

namespace bloomlm::library {

using torch::stable::Tensor;

inline Tensor product(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, bool is_gelu) {
  AtenTensorHandle result = nullptr, given_bias = bias ? bias->get() : nullptr;
  AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_product(x.get(), weight.get(), nullptr, nullptr, bias ? &given_bias : nullptr,
                                                     is_gelu, &result));
  return Tensor(result);
}

inline Tensor attend(const Tensor& query, const Tensor& keys, const Tensor& values, const Tensor& slopes,
                     const Tensor& rows, const Tensor& slots) {
  AtenTensorHandle result = nullptr;
  AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_attend(query.get(), keys.get(), values.get(), slopes.get(), rows.get(),
                                                    slots.get(), &result));
  return Tensor(result);
}

inline Tensor decode_block(const Tensor& x, const Tensor& norm1_weight, const Tensor& norm1_bias, const Tensor& qkv_weight,
                           const Tensor& qkv_bias, const Tensor& dense_weight, const Tensor& dense_bias,
                           const Tensor& norm2_weight, const Tensor& norm2_bias, const Tensor& up_weight,
                           const Tensor& up_bias, const Tensor& down_weight, const Tensor& down_bias, const Tensor& cache,
                           int64_t layer, const Tensor& columns, const Tensor& slopes, const Tensor& rows,
                           const Tensor& slots, double epsilon, bool adds_to_normed) {
  const float small = static_cast<float>(epsilon);
  const Block block{{Vector(norm1_weight.get()), Vector(norm1_bias.get()), small},
                    Layer(qkv_weight.get(), qkv_bias.get()),
                    Layer(dense_weight.get(), dense_bias.get()),
                    {Vector(norm2_weight.get()), Vector(norm2_bias.get()), small},
                    Layer(up_weight.get(), up_bias.get()),
                    Layer(down_weight.get(), down_bias.get()),
                    adds_to_normed};
  const auto run =
      dtype_of(x.get()) == aoti_torch_dtype_float32() ? bloomlm::decode_block<float> : bloomlm::decode_block<Bfloat16>;
  return Tensor(run(block, x.get(), cache.get(), layer, columns.get(), slopes.get(), rows.get(), slots.get()));
}

// The results of these are written into the last tensors.

inline void weight_gradient(const Tensor& gradients, const Tensor& x, Tensor result) {
  bloomlm::weight_gradient(gradients.get(), x.get(), result.get());
}

inline void causal(const Tensor& fused, const Tensor& virtuals, const Tensor& slopes, const Tensor& starts, Tensor out,
                   Tensor log_sums) {
  int32_t dtype;
  AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(fused.get(), &dtype));
  const auto run = dtype == aoti_torch_dtype_float32() ? bloomlm::causal<float> : bloomlm::causal<Bfloat16>;
  run(fused.get(), virtuals.get(), slopes.get(), starts.get(), out.get(), log_sums.get());
}

inline void causal_gradient(const Tensor& grad_out, const Tensor& fused, const Tensor& virtuals, const Tensor& slopes,
                            const Tensor& starts, const Tensor& out, const Tensor& log_sums, Tensor grad_fused,
                            Tensor grad_virtuals) {
  int32_t dtype;
  AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(fused.get(), &dtype));
  const auto run =
      dtype == aoti_torch_dtype_float32() ? bloomlm::causal_gradient<float> : bloomlm::causal_gradient<Bfloat16>;
  run(grad_out.get(), fused.get(), virtuals.get(), slopes.get(), starts.get(), out.get(), log_sums.get(),
      grad_fused.get(), grad_virtuals.get());
}

// The results are written into the last tensor.
inline void gelu(const Tensor& x, Tensor results) {
  const auto run = dtype_of(x.get()) == aoti_torch_dtype_float32() ? bloomlm::gelu<float> : bloomlm::gelu<Bfloat16>;
  run(x.get(), results.get());
}

inline void gelu_gradient(const Tensor& gradient, const Tensor& x, Tensor results) {
  const auto run =
      dtype_of(x.get()) == aoti_torch_dtype_float32() ? bloomlm::gelu_gradient<float> : bloomlm::gelu_gradient<Bfloat16>;
  run(gradient.get(), x.get(), results.get());
}

inline double norm(const Tensor& numbers) {
  return (dtype_of(numbers.get()) == aoti_torch_dtype_float32() ? bloomlm::norm<float> : bloomlm::norm<Bfloat16>)(numbers.get());
}

inline void adamw(const Tensor& gradient, Tensor master, Tensor mean, Tensor squares, std::optional<Tensor> weight,
                  double kept, double beta1, double beta2, double step_size, double inverse_root, double epsilon) {
  const auto run = dtype_of(gradient.get()) == aoti_torch_dtype_float32() ? bloomlm::adamw<float> : bloomlm::adamw<Bfloat16>;
  const AdamW constants = {static_cast<float>(kept),         static_cast<float>(1.0 - beta1),
                           static_cast<float>(beta2),        static_cast<float>(1.0 - beta2),
                           static_cast<float>(step_size),    static_cast<float>(inverse_root),
                           static_cast<float>(epsilon)};
  run(gradient.get(), master.get(), mean.get(), squares.get(), weight ? weight->get() : nullptr, constants);
}

}  // namespace bloomlm::library

STABLE_TORCH_LIBRARY(bloomlm_kernels, library) {
  library.def("product(Tensor x, Tensor weight, Tensor? bias, bool is_gelu) -> Tensor");
  library.def("attend(Tensor query, Tensor keys, Tensor values, Tensor slopes, Tensor rows, Tensor slots) -> Tensor");
  library.def(
      "decode_block(Tensor x, Tensor norm1_weight, Tensor norm1_bias, Tensor qkv_weight, Tensor qkv_bias, Tensor dense_weight, "
      "Tensor dense_bias, Tensor norm2_weight, Tensor norm2_bias, Tensor up_weight, Tensor up_bias, Tensor down_weight, "
      "Tensor down_bias, Tensor(a!) cache, int layer, Tensor columns, Tensor slopes, Tensor rows, Tensor slots, "
      "float epsilon, bool adds_to_normed) -> Tensor");
  library.def("weight_gradient(Tensor gradients, Tensor x, Tensor(a!) result) -> ()");
  library.def("causal(Tensor fused, Tensor virtuals, Tensor slopes, Tensor starts, Tensor(a!) out, Tensor(b!) log_sums) -> ()");
  library.def(
      "causal_gradient(Tensor grad_out, Tensor fused, Tensor virtuals, Tensor slopes, Tensor starts, Tensor out, "
      "Tensor log_sums, Tensor(a!) grad_fused, Tensor(b!) grad_virtuals) -> ()");
  library.def("gelu(Tensor x, Tensor(a!) results) -> ()");
  library.def("gelu_gradient(Tensor gradient, Tensor x, Tensor(a!) results) -> ()");
  library.def(
      "adamw(Tensor gradient, Tensor(a!) master, Tensor(b!) mean, Tensor(c!) squares, Tensor(d!)? weight, float kept, "
      "float beta1, float beta2, float step_size, float inverse_root, float epsilon) -> ()");
  library.def("norm(Tensor numbers) -> float");
}

STABLE_TORCH_LIBRARY_IMPL(bloomlm_kernels, CPU, library) {
  library.impl("product", TORCH_BOX(&bloomlm::library::product));
  library.impl("attend", TORCH_BOX(&bloomlm::library::attend));
  library.impl("decode_block", TORCH_BOX(&bloomlm::library::decode_block));
  library.impl("weight_gradient", TORCH_BOX(&bloomlm::library::weight_gradient));
  library.impl("causal", TORCH_BOX(&bloomlm::library::causal));
  library.impl("causal_gradient", TORCH_BOX(&bloomlm::library::causal_gradient));
  library.impl("gelu", TORCH_BOX(&bloomlm::library::gelu));
  library.impl("gelu_gradient", TORCH_BOX(&bloomlm::library::gelu_gradient));
  library.impl("adamw", TORCH_BOX(&bloomlm::library::adamw));
  library.impl("norm", TORCH_BOX(&bloomlm::library::norm));
}
