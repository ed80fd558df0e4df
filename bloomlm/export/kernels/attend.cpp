// bloomlm::attend: attention of one new token a row. query [B, H, K], keys and values [B, H, M, K], bias [B, H, S]
// -> [B, H * K]. B rows, H heads, M slots of the cache, S of them in use, K head_dim.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "tensors.h"
#include "vectors.h"

namespace bloomlm {

// The sum over slots of factor * weight * values, for V vectors of columns from `column` on.
template <int V>
inline void weighted_sum(const float* weights, const float* values, int64_t slots, int64_t head_dim, int64_t column,
                         float factor, float* result) {
  __m256 sums[V] = {};
  for (int64_t slot = 0; slot < slots; ++slot) {
    const __m256 weight = _mm256_set1_ps(weights[slot]);
#pragma GCC unroll 8
    for (int j = 0; j < V; ++j)
      sums[j] = add_product(sums[j], weight, load(values + slot * head_dim + column + 8 * j));
  }
  for (int j = 0; j < V; ++j)
    _mm256_storeu_ps(result + column + 8 * j, _mm256_mul_ps(sums[j], _mm256_set1_ps(factor)));
}

// softmax(q k^T / sqrt(K) + bias) v for one head of one row. `scores` is room for S numbers.
inline void attend(const float* query, const float* keys, const float* values, const float* bias, int64_t slots,
                   int64_t head_dim, float* scores, float* result) {
  constexpr int kSlots = 4, kVectors = 8;
  const int64_t whole = head_dim / 8 * 8;
  const float factor = 1.0f / std::sqrt(static_cast<float>(head_dim));
  float largest = -INFINITY;
  for (int64_t slot = 0; slot < slots; slot += kSlots) {
    const int64_t count = std::min<int64_t>(kSlots, slots - slot);
    __m256 sums[kSlots] = {};
    for (int64_t i = 0; i < whole; i += 8) {
#pragma GCC unroll 4
      for (int j = 0; j < kSlots; ++j) {
        const int64_t from = slot + std::min<int64_t>(j, count - 1);  // the last slot again where there are fewer
        sums[j] = add_product(sums[j], load(query + i), load(keys + from * head_dim + i));
      }
    }
    for (int64_t j = 0; j < count; ++j) {
      float sum = total(sums[j]);
      for (int64_t i = whole; i < head_dim; ++i) sum += query[i] * keys[(slot + j) * head_dim + i];
      scores[slot + j] = sum * factor + bias[slot + j];
      largest = std::max(largest, scores[slot + j]);
    }
  }
  float sum = 0.0f;
  for (int64_t slot = 0; slot < slots; ++slot) sum += scores[slot] = std::exp(scores[slot] - largest);
  const float inverse = 1.0f / sum;
  int64_t i = 0;
  for (; i + 8 * kVectors <= head_dim; i += 8 * kVectors)
    weighted_sum<kVectors>(scores, values, slots, head_dim, i, inverse, result);
  for (; i < whole; i += 8) weighted_sum<1>(scores, values, slots, head_dim, i, inverse, result);
  for (; i < head_dim; ++i) {
    float sums = 0.0f;
    for (int64_t slot = 0; slot < slots; ++slot) sums += scores[slot] * values[slot * head_dim + i];
    result[i] = sums * inverse;
  }
}

}  // namespace bloomlm

extern "C" AOTITorchError aoti_torch_cpu_attend(AtenTensorHandle query, AtenTensorHandle keys, AtenTensorHandle values,
                                                AtenTensorHandle bias, AtenTensorHandle* result) {
  const bloomlm::Floats q(query), k(keys), v(values), scores(bias);
  const int64_t rows = q.sizes[0], heads = q.sizes[1], head_dim = q.sizes[2], slots = scores.sizes[2];
  *result = bloomlm::new_floats(rows, heads * head_dim);
  float* out = bloomlm::Floats(*result).data;
#pragma omp parallel
  {
    std::vector<float> room(slots);
#pragma omp for schedule(static)
    for (int64_t unit = 0; unit < rows * heads; ++unit) {
      const int64_t row = unit / heads, head = unit % heads;
      const auto at = [&](const bloomlm::Floats& t) { return t.data + row * t.strides[0] + head * t.strides[1]; };
      bloomlm::attend(at(q), at(k), at(v), at(scores), slots, head_dim, room.data(), out + unit * head_dim);
    }
  }
  return AOTI_TORCH_SUCCESS;
}
