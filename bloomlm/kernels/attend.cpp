// bloomlm::attend: attention of new tokens over the slots of their row up to their own. query [B, H, K] in float32, keys and
// values [R, H, M, K] in float32 or bfloat16, slopes [H] of ALiBi, rows [B] and slots [B] of the tokens -> [B, H * K].
// R rows of the cache, B tokens, H heads, M slots of the cache, K head_dim.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "attend.h"
#include "causal.h"
#include "few_rows.h"
#include "many_rows.h"
#include "small_products.h"
#include "tensors.h"

namespace bloomlm {

constexpr int64_t kMostTogether = 256;  // tokens that one thread computes together, for which it turns values over once

// Tokens in neighbouring slots of one row.
struct Run {
  int64_t first, count;
};

inline std::vector<Run> runs_of(const int64_t* rows, const int64_t* slots, int64_t count, int64_t most) {
  std::vector<Run> runs;
  for (int64_t i = 0; i < count; ++i) {
    if (i > 0 && rows[i] == rows[i - 1] && slots[i] == slots[i - 1] + 1 && runs.back().count < most) ++runs.back().count;
    else runs.push_back({i, 1});
  }
  return runs;
}

// What all tokens and heads share.
template <class T>
struct CachedAttention {
  const float* query;  // [B, H, K]
  int64_t query_strides[2];
  int64_t tokens;
  T *keys, *values;    // [R, H, M, K]
  int64_t strides[3];  // of keys and values, except the last
  const float* slopes;
  const int64_t *rows, *slots;
  int64_t heads, head_dim;
  float factor;
  float* results;  // [B, H, K]

  int64_t offset(int64_t token, int64_t head) const { return rows[token] * strides[0] + head * strides[1]; }
  const float* query_of(int64_t token, int64_t head) const {
    return query + token * query_strides[0] + head * query_strides[1];
  }
  float* result_of(int64_t token, int64_t head) const { return results + (token * heads + head) * head_dim; }
};

template <class T>
void attend_one(const CachedAttention<T>& a, int64_t token, int64_t head, std::vector<float>& room) {
  const auto attend = kLevel == kScalar ? scalar::attend<T> : kLevel >= kAvx512 ? avx512::attend<T> : avx2::attend<T>;
  const int64_t slots = a.slots[token] + 1, offset = a.offset(token, head);
  room.resize(std::max<int64_t>(room.size(), slots + 16));
  attend({a.query_of(token, head), a.keys + offset, a.values + offset, a.strides[2], slots, a.head_dim, a.slopes[head], a.factor,
          room.data(), a.result_of(token, head)});
}

// Products for blocks of kBlock queries and tiles of kBlock slots, transposed as in causal.cpp.
template <class T>
void attend_run(const CachedAttention<T>& a, const Run& run, int64_t head, const Kernels& kernels, std::vector<float>& room) {
  constexpr bool kIsFloat = std::is_same_v<T, float>;
  const auto softmax = kLevel >= kAvx512 ? avx512::softmax : avx2::softmax;
  const int64_t k = a.head_dim, stride = a.strides[2], offset = a.offset(run.first, head), tile_size = kBlock * k;
  const int64_t slots = a.slots[run.first] + run.count, tiles = (slots + kBlock - 1) / kBlock;
  // keys in float32 stay where they are, except those of a last tile with fewer slots
  const int64_t in_place = kIsFloat ? slots / kBlock * kBlock : 0;
  const int64_t copied_tiles = tiles - in_place / kBlock;
  room.resize(std::max<int64_t>(room.size(), (tiles + copied_tiles + 3) * tile_size + (tiles + 1) * kBlock * kBlock));
  float *values = room.data(), *keys = values + tiles * tile_size, *wide = keys + copied_tiles * tile_size;
  float *query = wide + tile_size, *result = query + tile_size, *sums = result + tile_size, *scores = sums + kBlock;
  std::fill_n(values + (tiles - 1) * tile_size, tile_size, 0.0f);  // the last tiles may have fewer slots
  std::fill_n(keys + (slots - in_place) * k, (tiles * kBlock - slots) * k, 0.0f);
  for (int64_t slot = in_place; slot < slots; ++slot)
    convert(kernels, a.keys + offset + slot * stride, k, keys + (slot - in_place) * k);
  for (int64_t tile = 0; tile < slots; tile += kBlock) {
    const int64_t count = std::min(kBlock, slots - tile);
    if constexpr (kIsFloat) {
      kernels.turn(a.values + offset + tile * stride, stride, count, k, values + tile * k, kBlock);
    } else {
      for (int64_t slot = 0; slot < count; ++slot)
        convert(kernels, a.values + offset + (tile + slot) * stride, k, wide + slot * k);
      kernels.turn(wide, k, count, k, values + tile * k, kBlock);
    }
  }
  for (int64_t first = 0; first < run.count; first += kBlock) {
    const int64_t token = run.first + first, count = std::min(kBlock, run.count - first), columns = (count + 15) / 16 * 16;
    const int64_t seen = a.slots[token] + count;
    if (count < kBlock) std::fill_n(query, tile_size, 0.0f);
    kernels.turn(a.query_of(token, head), a.query_strides[0], count, k, query, kBlock);
    int64_t rows = 0;
    for (int64_t tile = 0; tile < seen; tile += kBlock) {
      const bool stays = tile < in_place;
      rows = tile + std::min(kBlock, (seen - tile + 15) / 16 * 16);
      const void* keys_of_tile = stays ? static_cast<const void*>(a.keys + offset + tile * stride) : keys + (tile - in_place) * k;
      multiply(rows - tile, columns, k, static_cast<const float*>(keys_of_tile), stays ? stride : k, query, kBlock,
               scores + tile * kBlock, kBlock, false);
    }
    softmax({scores, 0, rows, a.slots[token], columns, a.factor, a.slopes[head]}, sums);
    for (int64_t tile = 0; tile < seen; tile += kBlock)
      multiply(k, columns, std::min(kBlock, rows - tile), values + tile * k, kBlock, scores + tile * kBlock, kBlock, result,
               kBlock, tile > 0);
    kernels.turn(result, kBlock, k, count, a.result_of(token, head), a.heads * k);
  }
}

template <class T>
void attend_all(const CachedAttention<T>& a) {
  std::vector<Run> runs = runs_of(a.rows, a.slots, a.tokens, kMostTogether);
  const bool has_runs = static_cast<int64_t>(runs.size()) < a.tokens;  // not so in a decoding step
  if (has_runs && !(kLevel != kScalar && has_products<float>())) runs = runs_of(a.rows, a.slots, a.tokens, 1);
  const int64_t num_runs = runs.size();
  const Kernels kernels = kernels_of_level();
#pragma omp parallel
  {
    std::vector<float> room;
    // rows differ in length, so a thread takes the next run when it is done with one; those of one head share its cache
#pragma omp for schedule(dynamic)
    for (int64_t unit = 0; unit < num_runs * a.heads; ++unit) {
      const Run run = runs[unit % num_runs];
      if (run.count == 1) attend_one(a, run.first, unit / num_runs, room);
      else attend_run(a, run, unit / num_runs, kernels, room);
    }
  }
}

template <class T>
CachedAttention<T> attention_over(AtenTensorHandle query, AtenTensorHandle keys, AtenTensorHandle values,
                                  AtenTensorHandle slopes, AtenTensorHandle rows, AtenTensorHandle slots, float* results) {
  const bloomlm::Floats q(query);
  int64_t* strides;
  AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(keys, &strides));
  return {q.data, {q.strides[0], q.strides[1]}, q.sizes[0], data_of<T>(keys), data_of<T>(values),
          {strides[0], strides[1], strides[2]}, data_of<float>(slopes), data_of<int64_t>(rows), data_of<int64_t>(slots),
          q.sizes[1], q.sizes[2], 1.0f / std::sqrt(static_cast<float>(q.sizes[2])), results};
}

}  // namespace bloomlm

extern "C" AOTITorchError aoti_torch_cpu_attend(AtenTensorHandle query, AtenTensorHandle keys, AtenTensorHandle values,
                                                AtenTensorHandle slopes, AtenTensorHandle rows, AtenTensorHandle slots,
                                                AtenTensorHandle* result) {
  using namespace bloomlm;
  const bloomlm::Floats q(query);
  *result = new_tensor(q.sizes[0], q.sizes[1] * q.sizes[2], aoti_torch_dtype_float32());
  float* results = data_of<float>(*result);
  if (dtype_of(keys) == aoti_torch_dtype_float32())
    attend_all(attention_over<float>(query, keys, values, slopes, rows, slots, results));
  else attend_all(attention_over<Bfloat16>(query, keys, values, slopes, rows, slots, results));
  return AOTI_TORCH_SUCCESS;
}
