// bloomlm::attend: attention of one new token a row over the slots up to its own. query [B, H, K], keys and values
// [R, H, M, K], slopes [H] of ALiBi, rows [B] and slots [B] of the tokens -> [B, H * K].
// R rows of the cache, B of them in the call, H heads, M slots of the cache, K head_dim.

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

// softmax(q k^T / sqrt(K) + slope * distance) v for one head of one row. `scores` is room for a number a slot.
inline void attend(const float* query, const float* keys, const float* values, float slope, int64_t slots,
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
      scores[slot + j] = sum * factor + slope * static_cast<float>(slot + j + 1 - slots);
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
                                                AtenTensorHandle slopes, AtenTensorHandle rows, AtenTensorHandle slots,
                                                AtenTensorHandle* result) {
  const bloomlm::Floats q(query), k(keys), v(values), slope(slopes);
  const int64_t *row = bloomlm::int64s(rows), *last = bloomlm::int64s(slots);
  const int64_t count = q.sizes[0], heads = q.sizes[1], head_dim = q.sizes[2];
  *result = bloomlm::new_floats(count, heads * head_dim);
  float* out = bloomlm::Floats(*result).data;
#pragma omp parallel
  {
    std::vector<float> room(k.sizes[2]);
    // rows differ in length, so a thread takes the next head when it is done with one
#pragma omp for schedule(dynamic)
    for (int64_t unit = 0; unit < count * heads; ++unit) {
      const int64_t i = unit / heads, head = unit % heads;
      const auto at = [&](const bloomlm::Floats& t, int64_t r) {
        return t.data + r * t.strides[0] + head * t.strides[1];
      };
      bloomlm::attend(at(q, i), at(k, row[i]), at(v, row[i]), slope.data[head], last[i] + 1, head_dim, room.data(),
                      out + unit * head_dim);
    }
  }
  return AOTI_TORCH_SUCCESS;
}
