// What decoding spends its time with: products with few rows of activations, and attention of one new token.
// kernels.py says what is computed.
//
// Compiled into every program, for AVX2. Shapes: N rows of x; a matrix is [outs, ins]; B rows, H heads, M slots of the
// cache, S of them in use, K head_dim.
// A matrix is read once, at the memory's speed, for which it is read in several places at a time, each in order and on
// a page of its own: that is what processors load ahead of need. With more than four rows of x, the same few rows of
// the matrix meet four of them after the other, and what is next is prefetched meanwhile.

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace bloomlm {

constexpr int64_t kSegment = 1024;       // columns: four rows of x fit into the first cache, sums of int8 into 32 bits
constexpr int64_t kGroup = 12;           // rows of a matrix that stay in the cache
constexpr int64_t kMostRows = 4;         // rows of x in a tile, whose sums all lie in registers
constexpr int64_t kInt8Parts = 4;        // of a row, each with a scale
constexpr int64_t kFarBytes = 16 << 10;  // from one place of reading to the next

// A tile's arithmetic: 8 products of floats, or 32-bit sums of 16 products of 16-bit numbers.
inline __m256 load(const float* p) { return _mm256_loadu_ps(p); }
inline __m256i load(const int16_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline __m256i load(const int8_t* p) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline __m256 add_product(__m256 sum, __m256 a, __m256 b) { return _mm256_fmadd_ps(a, b, sum); }
inline __m256i add_product(__m256i sum, __m256i a, __m256i b) {
  sum = _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
  asm("" : "+x"(sum));  // or GCC adds several products first, in more registers than there are
  return sum;
}
inline float total(__m256 v) {
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}
inline float total(__m256i v) { return total(_mm256_cvtepi32_ps(v)); }  // all eight may exceed 32 bits

// What meets in a product: float rows and float matrices, or 16-bit rows and int8 matrices with scales for parts.
template <class X, class W>
struct Operands {
  const X* x;
  const float* x_scale;  // [N, parts]; nullptr: 1
  const W* weight;       // [outs, ins]
  const float* scale;    // [outs, parts]; nullptr: 1
  int64_t ins;
  int64_t parts;
};

// Where a tile lies: its rows of the matrix are `spread` apart. It prefetches, `ahead` rows further, the even or odd
// cache lines (phase 0, 1) or none (another phase).
struct Place {
  int64_t row, out, spread, first, last, part, ahead, phase;
};

// results[row + r, out + o * spread] = or += the sum over a segment of columns, for R rows of x and O of the matrix.
template <int R, int O, class X, class W>
inline __attribute__((always_inline)) void tile(const Operands<X, W>& p, const Place& at, float* results,
                                                int64_t outs) {
  using Vector = decltype(load(p.x));
  constexpr int64_t kLine = 64 / sizeof(W), kStep = sizeof(Vector) / sizeof(X);
  const int64_t row_step = at.spread * p.ins;
  const X* x = p.x + at.row * p.ins;
  const W* weight = p.weight + at.out * p.ins;
  const W* next = weight + at.ahead * p.ins;
  Vector sums[R][O] = {};
  int64_t k = at.first;
  for (int64_t line = 0; k + kLine <= at.last; ++line) {
    if ((line & 1) == at.phase) {
#pragma GCC unroll 4
      for (int o = 0; o < O; ++o) _mm_prefetch(reinterpret_cast<const char*>(next + o * row_step + k), _MM_HINT_T0);
    }
#pragma GCC unroll 4
    for (int64_t step = 0; step < kLine; step += kStep, k += kStep) {
      Vector w[O];
#pragma GCC unroll 4
      for (int o = 0; o < O; ++o) w[o] = load(weight + o * row_step + k);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const Vector v = load(x + r * p.ins + k);
#pragma GCC unroll 4
        for (int o = 0; o < O; ++o) sums[r][o] = add_product(sums[r][o], v, w[o]);
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int o = 0; o < O; ++o) {
      const int64_t row = at.row + r, out = at.out + o * at.spread;
      float sum = total(sums[r][o]);
      for (int64_t i = k; i < at.last; ++i)
        sum += static_cast<float>(x[r * p.ins + i]) * static_cast<float>(weight[o * row_step + i]);
      if (p.scale) sum *= p.x_scale[row * p.parts + at.part] * p.scale[out * p.parts + at.part];
      float& result = results[row * outs + out];
      result = at.first ? result + sum : sum;
    }
  }
}

// One segment of O * spread rows of the matrix, with up to four rows of x.
template <int O, class X, class W>
void tiles(const Operands<X, W>& p, int64_t rows, Place at, int64_t count, float* results, int64_t outs) {
  for (const int64_t end = at.out + count; at.out < end; ++at.out) {
    switch (rows) {
      case 1: tile<1, O>(p, at, results, outs); break;
      case 2: tile<2, O>(p, at, results, outs); break;
      case 3: if constexpr (O <= 3) tile<3, O>(p, at, results, outs); break;
      default: if constexpr (O <= 3) tile<4, O>(p, at, results, outs);
    }
  }
}

// All columns and all rows of x, for O * spread rows of the matrix.
template <int O, class X, class W>
void group(const Operands<X, W>& p, int64_t rows, int64_t start, int64_t spread, float* results, int64_t outs) {
  const bool one_pass = rows <= kMostRows;
  const int64_t part_columns = p.ins / p.parts;
  // in one pass row by row of the matrix, else segment by segment, which stays in the cache
  const int64_t at_once = one_pass ? 1 : spread;
  for (int64_t out = start; out < start + spread; out += at_once) {
    for (int64_t first = 0, last; first < p.ins; first = last) {
      const int64_t part = first / part_columns;
      last = std::min(first + kSegment, (part + 1) * part_columns);
      for (int64_t row = 0; row < rows; row += kMostRows) {
        // the first two passes share the prefetching
        const Place at{row, out, spread, first, last, part, O * spread, one_pass ? -1 : row / kMostRows};
        tiles<O>(p, std::min(kMostRows, rows - row), at, at_once, results, outs);
      }
    }
  }
}

template <int O, class X, class W>
void groups(const Operands<X, W>& p, int64_t rows, float* results, int64_t outs) {
  const int64_t far = std::max<int64_t>(1, kFarBytes / (p.ins * sizeof(W)));
  const int64_t spread = rows <= kMostRows ? far : kGroup / O;
  const int64_t whole = outs / (O * spread) * (O * spread);
#pragma omp parallel
  {
#pragma omp for schedule(static) nowait
    for (int64_t start = 0; start < whole; start += O * spread) group<O>(p, rows, start, spread, results, outs);
#pragma omp for schedule(static)
    for (int64_t start = whole; start < outs; ++start) group<1>(p, rows, start, 1, results, outs);
  }
}

// As many rows of the matrix in a tile as leave registers free for what they are multiplied with.
template <class X, class W>
void product(const Operands<X, W>& p, int64_t rows, float* results, int64_t outs) {
  if (rows <= 2) return groups<4>(p, rows, results, outs);
  if (rows == 3 || sizeof(X) == 4) return groups<3>(p, rows, results, outs);
  groups<2>(p, rows, results, outs);
}

// A row of x as 16-bit numbers, with a scale for each part; it is NaN where a number of the part is none.
inline void to_shorts(const float* x, int64_t ins, int64_t parts, int16_t* shorts, float* scales) {
  const __m256 absolute = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  const int64_t columns = ins / parts;
  for (int64_t part = 0; part < parts; ++part, x += columns, shorts += columns) {
    __m256 maxima = _mm256_setzero_ps(), zeros = _mm256_setzero_ps();  // NaN where x is, which maxima do not show
    int64_t i = 0;
    for (; i + 8 <= columns; i += 8) {
      maxima = _mm256_max_ps(maxima, _mm256_and_ps(load(x + i), absolute));
      zeros = _mm256_fmadd_ps(load(x + i), _mm256_setzero_ps(), zeros);
    }
    float lanes[8], largest = 0.0f, zero = total(zeros);
    _mm256_storeu_ps(lanes, maxima);
    for (const float lane : lanes) largest = std::max(largest, lane);
    for (; i < columns; ++i) largest = std::max(largest, std::fabs(x[i])), zero += 0.0f * x[i];
    largest += zero;
    const float inverse = largest > 0.0f ? 32767.0f / largest : 0.0f;
    for (i = 0; i + 8 <= columns; i += 8) {
      const __m256i whole = _mm256_cvtps_epi32(_mm256_mul_ps(load(x + i), _mm256_set1_ps(inverse)));
      const __m128i packed = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(shorts + i), packed);
    }
    for (; i < columns; ++i) shorts[i] = static_cast<int16_t>(std::nearbyint(x[i] * inverse));
    scales[part] = largest / 32767.0f;
  }
}

inline float bfloat16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

// A matrix in any format.
struct Matrix {
  enum Format { kFloat32, kFloat16, kBfloat16, kInt8, kInt4 } format;
  const void* data;
  const void* scale;
  int64_t outs, ins;

  void decode_row(int64_t row, float* values) const;
};

// int8: a scale for each part of a row. int4: column j and j + ins / 2 in byte j, and a scale for every G-th column.
inline void Matrix::decode_row(int64_t row, float* values) const {
  const int64_t start = row * ins, half = ins / 2, groups = ins / 32;
  const auto* bytes = static_cast<const int8_t*>(data) + start;
  const auto* nibbles = static_cast<const uint8_t*>(data) + row * half;
  const auto* bits = static_cast<const uint16_t*>(data) + start;
  const auto* scales = static_cast<const float*>(scale) + kInt8Parts * row;
  const auto* group_scales = static_cast<const uint16_t*>(scale) + row * groups;
  switch (format) {
    case kInt8:
      for (int64_t part = 0, i = 0; part < kInt8Parts; ++part)
        for (const int64_t end = (part + 1) * ins / kInt8Parts; i < end; ++i) values[i] = scales[part] * bytes[i];
      break;
    case kInt4:
      for (int64_t first = 0; first < half; first += groups) {
        for (int64_t g = 0; g < groups; ++g) {
          const float factor = bfloat16(group_scales[g]);
          values[first + g] = factor * ((nibbles[first + g] & 15) - 8);
          values[half + first + g] = factor * ((nibbles[first + g] >> 4) - 8);
        }
      }
      break;
    case kBfloat16:
      for (int64_t i = 0; i < ins; ++i) values[i] = bfloat16(bits[i]);
      break;
    case kFloat16:
      for (int64_t i = 0; i < ins; ++i) values[i] = _cvtsh_ss(bits[i]);
      break;
    case kFloat32:
      std::copy_n(static_cast<const float*>(data) + start, ins, values);
  }
}

inline void product(const float* x, const Matrix& matrix, int64_t rows, float* results) {
  const int64_t outs = matrix.outs, ins = matrix.ins;
  if (matrix.format == Matrix::kFloat32)
    return product<float, float>({x, nullptr, static_cast<const float*>(matrix.data), nullptr, ins, 1}, rows, results,
                                 outs);
  if (matrix.format == Matrix::kInt8) {
    std::vector<int16_t> shorts(rows * ins);
    std::vector<float> scales(rows * kInt8Parts);
    for (int64_t row = 0; row < rows; ++row)
      to_shorts(x + row * ins, ins, kInt8Parts, shorts.data() + row * ins, scales.data() + row * kInt8Parts);
    return product<int16_t, int8_t>({shorts.data(), scales.data(), static_cast<const int8_t*>(matrix.data),
                                     static_cast<const float*>(matrix.scale), ins, kInt8Parts}, rows, results, outs);
  }
#pragma omp parallel
  {
    std::vector<float> decoded(kGroup * ins);
#pragma omp for schedule(static)
    for (int64_t start = 0; start < outs; start += kGroup) {
      const int64_t count = std::min(kGroup, outs - start);
      for (int64_t row = 0; row < count; ++row) matrix.decode_row(start + row, decoded.data() + row * ins);
      const Operands<float, float> p{x, nullptr, decoded.data(), nullptr, ins, 1};
      int64_t row = 0;
      for (; row + 3 <= count; row += 3) group<3>(p, rows, row, 1, results + start, outs);
      for (; row < count; ++row) group<1>(p, rows, row, 1, results + start, outs);
    }
  }
}

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

// A tensor of floats as the compiled code hands it over.
struct Floats {
  float* data = nullptr;
  int64_t *sizes = nullptr, *strides = nullptr;

  explicit Floats(AtenTensorHandle tensor) {
    void* pointer = nullptr;
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(tensor, &pointer));
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(tensor, &sizes));
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(tensor, &strides));
    data = static_cast<float*>(pointer);
  }
};

inline Matrix matrix_of(AtenTensorHandle weight, AtenTensorHandle* scale) {
  int32_t dtype = 0;
  int64_t* sizes = nullptr;
  void *data = nullptr, *scales = nullptr;
  AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(weight, &dtype));
  AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(weight, &sizes));
  AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(weight, &data));
  if (scale) AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(*scale, &scales));
  const auto format = dtype == aoti_torch_dtype_float32()    ? Matrix::kFloat32
                      : dtype == aoti_torch_dtype_float16()  ? Matrix::kFloat16
                      : dtype == aoti_torch_dtype_bfloat16() ? Matrix::kBfloat16
                      : dtype == aoti_torch_dtype_int8()     ? Matrix::kInt8
                                                             : Matrix::kInt4;
  return {format, data, scales, sizes[0], format == Matrix::kInt4 ? 2 * sizes[1] : sizes[1]};
}

inline AtenTensorHandle new_floats(int64_t rows, int64_t columns) {
  const int64_t sizes[] = {rows, columns}, strides[] = {columns, 1};
  AtenTensorHandle tensor = nullptr;
  AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(2, sizes, strides, aoti_torch_dtype_float32(),
                                                       aoti_torch_device_type_cpu(), 0, &tensor));
  return tensor;
}

}  // namespace bloomlm

// bloomlm::few_rows: x [N, ins] W^T -> [N, outs].
extern "C" AOTITorchError aoti_torch_cpu_few_rows(AtenTensorHandle x, AtenTensorHandle weight, AtenTensorHandle* scale,
                                                  AtenTensorHandle* result) {
  const bloomlm::Floats rows(x);
  const bloomlm::Matrix matrix = bloomlm::matrix_of(weight, scale);
  *result = bloomlm::new_floats(rows.sizes[0], matrix.outs);
  bloomlm::product(rows.data, matrix, rows.sizes[0], bloomlm::Floats(*result).data);
  return AOTI_TORCH_SUCCESS;
}

// bloomlm::decoded: a matrix in float32.
extern "C" AOTITorchError aoti_torch_cpu_decoded(AtenTensorHandle weight, AtenTensorHandle* scale,
                                                 AtenTensorHandle* result) {
  const bloomlm::Matrix matrix = bloomlm::matrix_of(weight, scale);
  *result = bloomlm::new_floats(matrix.outs, matrix.ins);
  float* values = bloomlm::Floats(*result).data;
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < matrix.outs; ++row) matrix.decode_row(row, values + row * matrix.ins);
  return AOTI_TORCH_SUCCESS;
}

// bloomlm::attend: query [B, H, K], keys and values [B, H, M, K], bias [B, H, S] -> [B, H * K].
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
