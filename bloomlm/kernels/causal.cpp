// bloomlm::causal and its gradient: causal attention within each document of a packed batch, with ALiBi.
// N packed tokens, D documents, H heads, K head_dim, P virtual tokens before each document, T tokens of a document.
//
// All products are of a tile of up to kBlock keys and a block of up to kBlock queries, by oneDNN's kernels for small
// matrices. Scores are kept transposed, [keys, queries], so that no product needs a matrix turned over but queries, keys,
// values and gradients themselves, once.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <stdexcept>
#include <vector>

#include "causal.h"
#include "few_rows.h"
#include "small_products.h"
#include "tensors.h"

namespace bloomlm {

// Fails where products of blocks cannot be had, on the thread that may report it.
inline void require_products() {
  if (!has_products<float>()) throw std::runtime_error("this PyTorch has no products of small matrices");
}

inline int64_t rounded_up(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }

// Rows of K numbers, some numbers apart from each other.
template <class T>
struct Rows {
  T* data;
  int64_t stride;
  T* at(int64_t row) const { return data + row * stride; }
};

// What all documents and heads share.
template <class T>
struct Attention {
  T* fused;                // [N, H, 3, K]
  int64_t strides[3];      // of fused, except the last
  const float* virtuals;   // [2, H, P, K]: keys and values of virtual tokens
  const float* slopes;     // [H]
  const int64_t* starts;   // [D + 1]
  int64_t num_tokens, num_heads, head_dim, num_virtual;
  decltype(&scalar::softmax) softmax;
  decltype(&scalar::softmax_gradient) softmax_gradient;

  Rows<T> part(int64_t document, int64_t head, int64_t which) const {  // which: 0 queries, 1 keys, 2 values
    return {fused + starts[document] * strides[0] + head * strides[1] + which * strides[2], strides[0]};
  }
};

// Room that a thread uses for one document and head after another.
struct Buffers {
  std::vector<float> rows[2], turned, block[7], sums[2], gradients[2];
  static float* sized(std::vector<float>& numbers, int64_t count) {
    if (static_cast<int64_t>(numbers.size()) < count) numbers.resize(count);
    return numbers.data();
  }
};

template <class T>
void copy_rows(Rows<T> from, int64_t first, int64_t count, int64_t k, float* to) {
  for (int64_t row = 0; row < count; ++row)
    for (int64_t i = 0; i < k; ++i) to[row * k + i] = to_float(from.at(first + row)[i]);
}

// The first rows of [kBlock, K] into the columns of [K, kBlock].
inline void turn(const float* rows, int64_t count, int64_t k, float* turned) {
  for (int64_t i = 0; i < k; ++i)
    for (int64_t row = 0; row < count; ++row) turned[i * kBlock + row] = rows[row * k + i];
}

// The first rows of [K, kBlock] turned back.
template <class T>
void copy_turned(const float* turned, int64_t count, int64_t k, Rows<T> to, int64_t first) {
  for (int64_t row = 0; row < count; ++row)
    for (int64_t i = 0; i < k; ++i) assign(to.at(first + row)[i], turned[i * kBlock + row]);
}

// Keys (which 1) or values (2) with the virtual ones before them, as [S', K] with zeros at the end of the last tile.
template <class T>
float* gathered(const Attention<T>& a, int64_t document, int64_t head, int64_t which, std::vector<float>& room) {
  const int64_t num_new = a.starts[document + 1] - a.starts[document], count = a.num_virtual + num_new, k = a.head_dim;
  float* rows = Buffers::sized(room, rounded_up(count, kBlock) * k);
  if (a.num_virtual > 0)
    std::copy_n(a.virtuals + ((which - 1) * a.num_heads + head) * a.num_virtual * k, a.num_virtual * k, rows);
  copy_rows(a.part(document, head, which), 0, num_new, k, rows + a.num_virtual * k);
  std::fill(rows + count * k, rows + rounded_up(count, kBlock) * k, 0.0f);
  return rows;
}

// [S', K] -> tiles [K, kBlock] of kBlock rows each.
inline float* tiles_turned(const float* rows, int64_t count, int64_t k, std::vector<float>& room) {
  float* tiles = Buffers::sized(room, rounded_up(count, kBlock) * k);
  for (int64_t tile = 0; tile < count; tile += kBlock) turn(rows + tile * k, kBlock, k, tiles + tile * k);
  return tiles;
}

// Some rows of K numbers as [kBlock, K] and [K, kBlock], with zeros for rows that are missing.
template <class T>
void both_ways(Rows<T> from, int64_t first, int64_t count, int64_t k, float* straight, float* turned) {
  copy_rows(from, first, count, k, straight);
  std::fill(straight + count * k, straight + kBlock * k, 0.0f);
  if (count < kBlock) std::fill(turned, turned + kBlock * k, 0.0f);
  turn(straight, count, k, turned);
}

// The rows of a tile that a product computes: those that some query of the block sees.
inline int64_t rows_of(int64_t tile, int64_t seen) { return std::min(kBlock, rounded_up(seen - tile, 16)); }

template <class T>
void attend_document(const Attention<T>& a, int64_t document, int64_t head, Buffers& room, Rows<T> out, float* log_sums) {
  const int64_t k = a.head_dim, num_new = a.starts[document + 1] - a.starts[document];
  const float* keys = gathered(a, document, head, 1, room.rows[0]);
  const float* values = tiles_turned(gathered(a, document, head, 2, room.rows[1]), a.num_virtual + num_new, k, room.turned);
  float *straight = Buffers::sized(room.block[0], kBlock * k), *query = Buffers::sized(room.block[1], kBlock * k);
  float *result = Buffers::sized(room.block[2], kBlock * k), *sums = Buffers::sized(room.sums[0], kBlock);
  float* scores = Buffers::sized(room.block[3], rounded_up(a.num_virtual + num_new, kBlock) * kBlock);
  const float factor = 1.0f / std::sqrt(static_cast<float>(k));
  for (int64_t first = 0; first < num_new; first += kBlock) {
    const int64_t count = std::min(kBlock, num_new - first), columns = rounded_up(count, 16);
    const int64_t seen = a.num_virtual + first + count;
    both_ways(a.part(document, head, 0), first, count, k, straight, query);
    int64_t rows = 0;
    for (int64_t tile = 0; tile < seen; tile += kBlock) {
      rows = tile + rows_of(tile, seen);
      multiply(rows - tile, columns, k, keys + tile * k, k, query, kBlock, scores + tile * kBlock, kBlock, false);
    }
    a.softmax({scores, 0, rows, a.num_virtual + first, columns, factor, a.slopes[head]}, sums);
    std::copy_n(sums, count, log_sums + first);
    for (int64_t tile = 0; tile < seen; tile += kBlock)
      multiply(k, columns, rows_of(tile, seen), values + tile * k, kBlock, scores + tile * kBlock, kBlock, result, kBlock,
               tile > 0);
    copy_turned(result, count, k, out, first);
  }
}

// Gradients of one document and head. `grad` has the layout of fused; `grad_virtual` is [2, P, K] of this head, in rows
// of H * P * K for keys and values.
template <class T>
void attend_document_gradient(const Attention<T>& a, const Attention<T>& grad, int64_t document, int64_t head,
                              Buffers& room, Rows<T> grad_out, Rows<T> out, const float* log_sums, float* grad_virtual) {
  const int64_t k = a.head_dim, num_new = a.starts[document + 1] - a.starts[document], total = a.num_virtual + num_new;
  const float *keys = gathered(a, document, head, 1, room.rows[0]), *values = gathered(a, document, head, 2, room.rows[1]);
  const float* keys_turned = tiles_turned(keys, total, k, room.turned);
  float* grads[2];  // of keys and values
  for (int64_t which = 0; which < 2; ++which) {
    grads[which] = Buffers::sized(room.gradients[which], rounded_up(total, kBlock) * k);
    std::fill_n(grads[which], rounded_up(total, kBlock) * k, 0.0f);
  }
  float* block[7];  // queries and gradients of the result, both ways; scores and their gradients; gradients of queries
  for (int64_t i = 0; i < 7; ++i) block[i] = Buffers::sized(room.block[i], kBlock * std::max(k, kBlock));
  float *sums = Buffers::sized(room.sums[0], kBlock), *means = Buffers::sized(room.sums[1], kBlock);
  const float factor = 1.0f / std::sqrt(static_cast<float>(k));
  for (int64_t first = 0; first < num_new; first += kBlock) {
    const int64_t count = std::min(kBlock, num_new - first), columns = rounded_up(count, 16);
    const int64_t seen = a.num_virtual + first + count;
    both_ways(a.part(document, head, 0), first, count, k, block[0], block[1]);
    both_ways(grad_out, first, count, k, block[2], block[3]);
    for (int64_t row = 0; row < columns; ++row) {
      sums[row] = row < count ? log_sums[first + row] : 0.0f;
      means[row] = 0.0f;
      for (int64_t i = 0; row < count && i < k; ++i) means[row] += block[2][row * k + i] * to_float(out.at(first + row)[i]);
    }
    for (int64_t tile = 0; tile < seen; tile += kBlock) {
      const int64_t rows = rows_of(tile, seen);
      multiply(rows, columns, k, keys + tile * k, k, block[1], kBlock, block[4], kBlock, false);
      multiply(rows, columns, k, values + tile * k, k, block[3], kBlock, block[5], kBlock, false);
      a.softmax_gradient({block[4], tile, rows, a.num_virtual + first, columns, factor, a.slopes[head]}, sums, means,
                         block[5]);
      multiply(rows, k, columns, block[5], kBlock, block[0], k, grads[0] + tile * k, k, true);
      multiply(rows, k, columns, block[4], kBlock, block[2], k, grads[1] + tile * k, k, true);
      multiply(k, columns, rows, keys_turned + tile * k, kBlock, block[5], kBlock, block[6], kBlock, tile > 0);
    }
    copy_turned(block[6], count, k, grad.part(document, head, 0), first);
  }
  for (int64_t which = 0; which < 2; ++which) {
    const Rows<T> to = grad.part(document, head, which + 1);
    for (int64_t row = 0; row < num_new; ++row)
      for (int64_t i = 0; i < k; ++i) assign(to.at(row)[i], grads[which][(a.num_virtual + row) * k + i]);
    std::copy_n(grads[which], a.num_virtual * k, grad_virtual + which * a.num_heads * a.num_virtual * k);
  }
}

// Calls function(document, head, buffers) for all, on all threads, the longest documents first.
template <class F>
void for_all(const int64_t* starts, int64_t num_documents, int64_t num_heads, F function) {
  std::vector<int64_t> order(num_documents);
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(),
            [&](int64_t a, int64_t b) { return starts[a + 1] - starts[a] > starts[b + 1] - starts[b]; });
#pragma omp parallel
  {
    Buffers buffers;
#pragma omp for schedule(dynamic)
    for (int64_t unit = 0; unit < num_documents * num_heads; ++unit)
      function(order[unit / num_heads], unit % num_heads, buffers);
  }
}

template <class T>
Attention<T> attention_of(AtenTensorHandle fused, AtenTensorHandle virtuals, AtenTensorHandle slopes, AtenTensorHandle starts) {
  int64_t *sizes, *strides, *virtual_sizes;
  AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(fused, &sizes));
  AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(fused, &strides));
  AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(virtuals, &virtual_sizes));
  const bool is_fast = kLevel >= kAvx2;
  return {data_of<T>(fused), {strides[0], strides[1], strides[2]}, data_of<float>(virtuals), data_of<float>(slopes),
          data_of<int64_t>(starts), sizes[0], sizes[1], sizes[3], virtual_sizes[2],
          !is_fast ? scalar::softmax : kLevel >= kAvx512 ? avx512::softmax : avx2::softmax,
          !is_fast ? scalar::softmax_gradient : kLevel >= kAvx512 ? avx512::softmax_gradient : avx2::softmax_gradient};
}

inline int64_t length_of(AtenTensorHandle tensor) {
  int64_t* sizes;
  AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(tensor, &sizes));
  return sizes[0];
}

template <class T>
void causal(AtenTensorHandle fused, AtenTensorHandle virtuals, AtenTensorHandle slopes, AtenTensorHandle starts,
            AtenTensorHandle out, AtenTensorHandle log_sums) {
  require_products();
  const Attention<T> a = attention_of<T>(fused, virtuals, slopes, starts);
  T* results = data_of<T>(out);
  float* sums = data_of<float>(log_sums);
  const int64_t stride = a.num_heads * a.head_dim;
  for_all(a.starts, length_of(starts) - 1, a.num_heads, [&](int64_t document, int64_t head, Buffers& buffers) {
    const int64_t start = a.starts[document];
    attend_document(a, document, head, buffers, {results + start * stride + head * a.head_dim, stride},
                    sums + head * a.num_tokens + start);
  });
}

template <class T>
void causal_gradient(AtenTensorHandle grad_out, AtenTensorHandle fused, AtenTensorHandle virtuals, AtenTensorHandle slopes,
                     AtenTensorHandle starts, AtenTensorHandle out, AtenTensorHandle log_sums, AtenTensorHandle grad_fused,
                     AtenTensorHandle grad_virtuals) {
  require_products();
  const Attention<T> a = attention_of<T>(fused, virtuals, slopes, starts), grad = attention_of<T>(grad_fused, virtuals, slopes, starts);
  T *results = data_of<T>(out), *gradients = data_of<T>(grad_out);
  const float* sums = data_of<float>(log_sums);
  float* to_virtuals = data_of<float>(grad_virtuals);  // [D, 2, H, P, K]
  const int64_t stride = a.num_heads * a.head_dim, virtual_numbers = a.num_virtual * a.head_dim;
  for_all(a.starts, length_of(starts) - 1, a.num_heads, [&](int64_t document, int64_t head, Buffers& buffers) {
    const int64_t start = a.starts[document], offset = start * stride + head * a.head_dim;
    attend_document_gradient(a, grad, document, head, buffers, {gradients + offset, stride}, {results + offset, stride},
                             sums + head * a.num_tokens + start,
                             to_virtuals + (document * 2 * a.num_heads + head) * virtual_numbers);
  });
}

}  // namespace bloomlm
