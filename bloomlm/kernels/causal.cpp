// bloomlm::causal and its gradient: causal attention within each document of a packed batch, with ALiBi.
// N packed tokens, D documents, H heads, K head_dim, P virtual tokens before each document, T tokens of a document.
//
// All products are of a tile of up to kBlock keys and a block of up to kBlock queries, by oneDNN's kernels for small
// matrices. Scores are kept transposed, [keys, queries], so that no product needs a matrix turned over but queries, keys,
// values and gradients themselves, once. Of numbers in bfloat16 products are in bfloat16 where the processor has them:
// weights and gradients of scores are rounded for them, and all sums are in float32.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <stdexcept>
#include <type_traits>
#include <vector>

#include "causal.h"
#include "causal_operands.h"
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
  Kernels kernels;
  decltype(&scalar::softmax) softmax;
  decltype(&scalar::softmax_gradient) softmax_gradient;

  Rows<T> part(int64_t document, int64_t head, int64_t which) const {  // which: 0 queries, 1 keys, 2 values
    return {fused + starts[document] * strides[0] + head * strides[1] + which * strides[2], strides[0]};
  }
};

// `count` rows of K numbers as P, and rows of zeros up to `wanted`.
template <class P, class T>
void copy_rows(const Kernels& kernels, Rows<T> from, int64_t first, int64_t count, int64_t wanted, int64_t k, P* to) {
  for (int64_t row = 0; row < count; ++row) convert(kernels, from.at(first + row), k, to + row * k);
  std::fill(to + count * k, to + wanted * k, P{});
}

// Rows of K numbers in float32 as T.
template <class T>
void put_rows(const Kernels& kernels, const float* from, int64_t count, int64_t k, Rows<T> to, int64_t first) {
  for (int64_t row = 0; row < count; ++row) convert(kernels, from + row * k, k, to.at(first + row));
}

// Keys (which 1) or values (2) with the virtual ones before them, as [S', K] with zeros at the end of the last tile.
template <class P, class T>
P* gathered(const Attention<T>& a, int64_t document, int64_t head, int64_t which, P* rows) {
  const int64_t num_new = a.starts[document + 1] - a.starts[document], k = a.head_dim;
  const int64_t wanted = rounded_up(a.num_virtual + num_new, kBlock);
  const float* virtuals = a.virtuals + ((which - 1) * a.num_heads + head) * a.num_virtual * k;
  convert(a.kernels, virtuals, a.num_virtual * k, rows);
  copy_rows(a.kernels, a.part(document, head, which), 0, num_new, wanted - a.num_virtual, k, rows + a.num_virtual * k);
  return rows;
}

// [S', K] -> tiles [K, kBlock] of kBlock rows each.
template <class P>
P* tiles_turned(const Kernels& kernels, const P* rows, int64_t count, int64_t k, P* tiles, P* room) {
  for (int64_t tile = 0; tile < count; tile += kBlock) to_turned(kernels, rows + tile * k, k, tiles + tile * k, room);
  return tiles;
}

// The rows of a tile that a product computes: those that some query of the block sees.
inline int64_t rows_of(int64_t tile, int64_t seen) { return std::min(kBlock, rounded_up(seen - tile, 16)); }

template <class P, class T>
void attend_document(const Attention<T>& a, int64_t document, int64_t head, Buffers& room, Rows<T> out, float* log_sums) {
  const int64_t k = a.head_dim, num_new = a.starts[document + 1] - a.starts[document], total = a.num_virtual + num_new;
  const int64_t size = rounded_up(total, kBlock);
  room.begin();
  P *straight = room.take<P>(kBlock * k), *query = room.take<P>(kBlock * k);
  P *weights = room.take<P>(kBlock * kBlock), *right = room.take<P>(kBlock * kBlock);
  float *result = room.take<float>(kBlock * k), *turned = room.take<float>(kBlock * k);
  float *scores = room.take<float>(size * kBlock), *sums = room.take<float>(kBlock);
  const P* keys = gathered(a, document, head, 1, room.take<P>(size * k));
  const P* values = gathered(a, document, head, 2, room.take<P>(size * k));
  values = tiles_turned(a.kernels, values, total, k, room.take<P>(size * k), straight);
  const float factor = 1.0f / std::sqrt(static_cast<float>(k));
  for (int64_t first = 0; first < num_new; first += kBlock) {
    const int64_t count = std::min(kBlock, num_new - first), columns = rounded_up(count, 16);
    const int64_t seen = a.num_virtual + first + count;
    copy_rows(a.kernels, a.part(document, head, 0), first, count, kBlock, k, straight);
    to_columns(a.kernels, straight, k, query);
    int64_t rows = 0;
    for (int64_t tile = 0; tile < seen; tile += kBlock) {
      rows = tile + rows_of(tile, seen);
      multiply(rows - tile, columns, k, keys + tile * k, k, query, kBlock, scores + tile * kBlock, kBlock, false);
    }
    a.softmax({scores, 0, rows, a.num_virtual + first, columns, factor, a.slopes[head]}, sums);
    std::copy_n(sums, count, log_sums + first);
    for (int64_t tile = 0; tile < seen; tile += kBlock) {
      const int64_t inner = rows_of(tile, seen);
      const P* numbers = rounded(a.kernels, scores + tile * kBlock, inner * kBlock, weights);
      multiply(k, columns, inner, values + tile * k, kBlock, to_right(numbers, inner, kBlock, right), kBlock, result, kBlock,
               tile > 0);
    }
    a.kernels.turn(result, kBlock, k, kBlock, turned, k);
    put_rows(a.kernels, turned, count, k, out, first);
  }
}

// For each query of a block the product of the gradient of its result with the result, and the logarithm of its sum.
template <class T>
void means_of(Rows<T> grad_out, Rows<T> out, const float* log_sums, int64_t first, int64_t count, int64_t k, float* means,
              float* sums) {
  std::fill_n(means, kBlock, 0.0f);
  std::fill_n(sums, kBlock, 0.0f);
  std::copy_n(log_sums + first, count, sums);
  for (int64_t row = 0; row < count; ++row) {
    const T *gradient = grad_out.at(first + row), *result = out.at(first + row);
    float mean = 0.0f;
#pragma omp simd reduction(+ : mean)
    for (int64_t i = 0; i < k; ++i) mean += to_float(gradient[i]) * to_float(result[i]);
    means[row] = mean;
  }
}

// Gradients of one document and head. `grad` has the layout of fused; `grad_virtual` is [2, P, K] of this head, in rows
// of H * P * K for keys and values.
template <class P, class T>
void attend_document_gradient(const Attention<T>& a, const Attention<T>& grad, int64_t document, int64_t head,
                              Buffers& room, Rows<T> grad_out, Rows<T> out, const float* log_sums, float* grad_virtual) {
  const int64_t k = a.head_dim, num_new = a.starts[document + 1] - a.starts[document], total = a.num_virtual + num_new;
  const int64_t size = rounded_up(total, kBlock);
  room.begin();
  const Kernels& kernels = a.kernels;
  P* block[10];  // queries and gradients of the result: rows, columns, right-hand matrices; the same of scores, rounded
  for (int i = 0; i < 10; ++i) block[i] = room.take<P>(kBlock * std::max(k, kBlock));
  float *scores = room.take<float>(kBlock * kBlock), *gradients = room.take<float>(kBlock * kBlock);
  float *result = room.take<float>(kBlock * k), *turned = room.take<float>(kBlock * k);
  float *sums = room.take<float>(kBlock), *means = room.take<float>(kBlock);
  const P* keys = gathered(a, document, head, 1, room.take<P>(size * k));
  const P* values = gathered(a, document, head, 2, room.take<P>(size * k));
  const P* keys_turned = tiles_turned(kernels, keys, total, k, room.take<P>(size * k), block[0]);
  float* grads[2] = {room.take<float>(size * k), room.take<float>(size * k)};  // of keys and values
  for (float* numbers : grads) std::fill_n(numbers, size * k, 0.0f);
  const float factor = 1.0f / std::sqrt(static_cast<float>(k));
  for (int64_t first = 0; first < num_new; first += kBlock) {
    const int64_t count = std::min(kBlock, num_new - first), columns = rounded_up(count, 16);
    const int64_t seen = a.num_virtual + first + count;
    copy_rows(kernels, a.part(document, head, 0), first, count, kBlock, k, block[0]);
    copy_rows(kernels, grad_out, first, count, kBlock, k, block[1]);
    to_columns(kernels, block[0], k, block[2]);
    to_columns(kernels, block[1], k, block[3]);
    const P *queries = to_right(block[0], kBlock, k, block[4]), *of_results = to_right(block[1], kBlock, k, block[5]);
    means_of(grad_out, out, log_sums, first, count, k, means, sums);
    for (int64_t tile = 0; tile < seen; tile += kBlock) {
      const int64_t rows = rows_of(tile, seen);
      multiply(rows, columns, k, keys + tile * k, k, block[2], kBlock, scores, kBlock, false);
      multiply(rows, columns, k, values + tile * k, k, block[3], kBlock, gradients, kBlock, false);
      a.softmax_gradient({scores, tile, rows, a.num_virtual + first, columns, factor, a.slopes[head]}, sums, means, gradients);
      const P* weights = rounded(kernels, scores, rows * kBlock, block[6]);
      const P* of_scores = rounded(kernels, gradients, rows * kBlock, block[7]);
      multiply(rows, k, columns, of_scores, kBlock, queries, k, grads[0] + tile * k, k, true);
      multiply(rows, k, columns, weights, kBlock, of_results, k, grads[1] + tile * k, k, true);
      multiply(k, columns, rows, keys_turned + tile * k, kBlock, to_right(of_scores, rows, kBlock, block[8]), kBlock, result,
               kBlock, tile > 0);
    }
    kernels.turn(result, kBlock, k, kBlock, turned, k);
    put_rows(kernels, turned, count, k, grad.part(document, head, 0), first);
  }
  for (int64_t which = 0; which < 2; ++which) {
    put_rows(kernels, grads[which] + a.num_virtual * k, num_new, k, grad.part(document, head, which + 1), 0);
    std::copy_n(grads[which], a.num_virtual * k, grad_virtual + which * a.num_heads * a.num_virtual * k);
  }
}

// Calls function(P{}, document, head, buffers) for all, on all threads, the longest documents first.
template <class P, class T, class F>
void for_all_in(const Attention<T>& a, int64_t num_documents, F function) {
  std::vector<int64_t> order(num_documents);
  std::iota(order.begin(), order.end(), 0);
  const auto length = [&](int64_t document) { return a.starts[document + 1] - a.starts[document]; };
  std::sort(order.begin(), order.end(), [&](int64_t one, int64_t other) { return length(one) > length(other); });
#pragma omp parallel
  {
    Buffers buffers;
#pragma omp for schedule(dynamic)
    for (int64_t unit = 0; unit < num_documents * a.num_heads; ++unit)
      function(P{}, order[unit / a.num_heads], unit % a.num_heads, buffers);
    end_products(static_cast<const P*>(nullptr));
  }
}

// P, the format of products, is T where the processor has products of it.
template <class T, class F>
void for_all(const Attention<T>& a, int64_t num_documents, F function) {
  if constexpr (std::is_same_v<T, Bfloat16>)
    if (kLevel == kAvx512Bf16 && a.head_dim % 2 == 0 && has_products<Bfloat16>())
      return for_all_in<Bfloat16>(a, num_documents, function);
  for_all_in<float>(a, num_documents, function);
}

template <class T>
Attention<T> attention_of(AtenTensorHandle fused, AtenTensorHandle virtuals, AtenTensorHandle slopes, AtenTensorHandle starts) {
  int64_t *sizes, *strides, *virtual_sizes;
  AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(fused, &sizes));
  AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(fused, &strides));
  AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(virtuals, &virtual_sizes));
  const bool is_fast = kLevel >= kAvx2;
  return {data_of<T>(fused), {strides[0], strides[1], strides[2]}, data_of<float>(virtuals), data_of<float>(slopes),
          data_of<int64_t>(starts), sizes[0], sizes[1], sizes[3], virtual_sizes[2], kernels_of_level(),
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
  for_all(a, length_of(starts) - 1, [&](auto number, int64_t document, int64_t head, Buffers& buffers) {
    const int64_t start = a.starts[document];
    attend_document<decltype(number)>(a, document, head, buffers, {results + start * stride + head * a.head_dim, stride},
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
  for_all(a, length_of(starts) - 1, [&](auto number, int64_t document, int64_t head, Buffers& buffers) {
    const int64_t start = a.starts[document], offset = start * stride + head * a.head_dim;
    attend_document_gradient<decltype(number)>(a, grad, document, head, buffers, {gradients + offset, stride},
                                               {results + offset, stride}, sums + head * a.num_tokens + start,
                                               to_virtuals + (document * 2 * a.num_heads + head) * virtual_numbers);
  });
}

}  // namespace bloomlm
