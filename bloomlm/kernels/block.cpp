// bloomlm::decode_block: a block of the model for one new token of each row of a cache. Products and attention are those of
// product.cpp and attend.cpp; in one call they lose no time to Python and to threads that wait for each other between them.
// B tokens, H heads, K head_dim, D = H * K, R rows of the cache, M slots of a row, E = K and position columns.

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace bloomlm {

constexpr int64_t kNumbersOfOneThread = 16384;  // so many are normed, added or copied in less time than threads need to meet

// Numbers of a tensor in float32 or bfloat16 as floats.
class Vector {
 public:
  explicit Vector(AtenTensorHandle tensor) : room_(count_of(tensor)), data_(bias_of(tensor, count_of(tensor), room_)) {}
  Vector(const Vector&) = delete;
  const float* data() const { return data_; }

 private:
  Room<float> room_;
  const float* data_;
};

struct Norm {
  Vector weight, bias;
  float epsilon;

  void operator()(const float* x, int64_t rows, int64_t size, float* results) const {
#pragma omp parallel for schedule(static) if (rows * size > kNumbersOfOneThread)
    for (int64_t row = 0; row < rows; ++row) one(x + row * size, size, results + row * size);
  }

 private:
  void one(const float* x, int64_t size, float* results) const {
    const float *factors = weight.data(), *terms = bias.data();
    float sum = 0.0f, squares = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < size; ++i) sum += x[i];
    const float mean = sum / static_cast<float>(size);
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < size; ++i) squares += (x[i] - mean) * (x[i] - mean);
    const float scale = 1.0f / std::sqrt(squares / static_cast<float>(size) + epsilon);
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) results[i] = (x[i] - mean) * scale * factors[i] + terms[i];
  }
};

struct Layer {
  Matrix matrix;
  Vector bias;

  Layer(AtenTensorHandle weight, AtenTensorHandle bias) : matrix(matrix_of(weight, nullptr, nullptr)), bias(bias) {}
  void operator()(const float* x, int64_t rows, bool is_gelu, float* results) const {
    product(x, matrix, rows, {bias.data(), is_gelu}, results);
  }
};

struct Block {
  Norm input_norm;
  Layer query_key_value, dense;
  Norm post_attention_norm;
  Layer dense_h_to_4h, dense_4h_to_h;
  bool adds_to_normed;  // the results of layer norms are the residual stream
};

// Writes the keys and values [B, H, 3, K] of new tokens, and the position columns [B, H, 3, E - K] beside them, into the cache.
template <class T>
void write_tokens(const CachedAttention<T>& a, const float* fused, const T* columns, int64_t num_columns) {
  const Kernels kernels = kernels_of_level();
#pragma omp parallel for schedule(static) if (a.tokens * a.heads * a.head_dim > kNumbersOfOneThread)
  for (int64_t token = 0; token < a.tokens; ++token)
    for (int64_t head = 0; head < a.heads; ++head) {
      const int64_t place = a.offset(token, head) + a.slots[token] * a.strides[2], first = 3 * (token * a.heads + head);
      for (int64_t part : {1, 2}) {
        T* slot = (part == 1 ? a.keys : a.values) + place;
        convert(kernels, fused + (first + part) * a.head_dim, a.head_dim, slot);
        std::copy_n(columns + (first + part) * num_columns, num_columns, slot + a.head_dim);
      }
    }
}

inline void add(const float* update, int64_t count, const float* residual, float* results) {
#pragma omp parallel for simd schedule(static) if (parallel : count > kNumbersOfOneThread)
  for (int64_t i = 0; i < count; ++i) results[i] = residual[i] + update[i];
}

// x [B, D] is changed; the query and the results of the attention are set here.
template <class T>
void compute(const Block& block, CachedAttention<T> a, const T* columns, int64_t num_columns, float* x) {
  const int64_t rows = a.tokens, size = a.heads * a.head_dim, inner = block.dense_h_to_4h.matrix.outs;
  Room<float> normed(rows * size), update(rows * size), wide(rows * std::max(inner, 3 * size));
  const float* residual = block.adds_to_normed ? normed.data() : x;
  block.input_norm(x, rows, size, normed.data());
  block.query_key_value(normed.data(), rows, false, wide.data());
  write_tokens(a, wide.data(), columns, num_columns);
  a.query = wide.data();
  a.results = update.data();
  attend_all(a);
  block.dense(update.data(), rows, false, wide.data());
  add(wide.data(), rows * size, residual, x);
  block.post_attention_norm(x, rows, size, normed.data());
  block.dense_h_to_4h(normed.data(), rows, true, wide.data());
  block.dense_4h_to_h(wide.data(), rows, false, update.data());
  add(update.data(), rows * size, residual, x);
}

template <class T>
AtenTensorHandle decode_block(const Block& block, AtenTensorHandle x, AtenTensorHandle cache, int64_t layer,
                              AtenTensorHandle columns, AtenTensorHandle slopes, AtenTensorHandle rows,
                              AtenTensorHandle slots) {
  const Floats of_cache(cache);  // [L, 2, R, H, M, E]
  const int64_t *sizes = of_cache.sizes, *strides = of_cache.strides, tokens = count_of(slots), heads = sizes[3];
  const int64_t size = block.query_key_value.matrix.ins, head_dim = size / heads, num_columns = sizes[5] - head_dim;
  T* keys = data_of<T>(cache) + layer * strides[0];
  const CachedAttention<T> attention{nullptr, {3 * size, 3 * head_dim}, tokens, keys, keys + strides[1],
                                     {strides[2], strides[3], strides[4]}, data_of<float>(slopes), data_of<int64_t>(rows),
                                     data_of<int64_t>(slots), heads, head_dim,
                                     1.0f / std::sqrt(static_cast<float>(head_dim)), nullptr};
  const Kernels kernels = kernels_of_level();
  Room<float> stream(tokens * size);
  convert(kernels, data_of<T>(x), tokens * size, stream.data());
  compute(block, attention, data_of<T>(columns), num_columns, stream.data());
  AtenTensorHandle result = new_tensor(tokens, size, dtype_of(x));
  convert(kernels, stream.data(), tokens * size, data_of<T>(result));
  return result;
}

}  // namespace bloomlm
