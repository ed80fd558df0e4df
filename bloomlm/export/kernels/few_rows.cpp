// bloomlm::few_rows: x [N, ins] times the transpose of a matrix [outs, ins] in any format -> [N, outs].
//
// The matrix is read once, at the memory's speed. To reach it, several places are read at a time, each in order and on
// a page of its own: that is the pattern that processors prefetch by themselves. With more than four rows of x, a few
// rows of the matrix stay in the cache for one group of four rows of x after another, and instructions prefetch the
// next ones.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "matrix.h"
#include "tensors.h"
#include "vectors.h"

namespace bloomlm {

constexpr int64_t kSegment = 1024;       // columns: four rows of x fit into the first cache, sums of int8 into 32 bits
constexpr int64_t kGroup = 12;           // rows of a matrix that stay in the cache
constexpr int64_t kMostRows = 4;         // rows of x in a tile, whose sums all lie in registers
constexpr int64_t kFarBytes = 16 << 10;  // between two places that are read at a time

// The operands of a product: rows and matrix in float, or 16-bit rows and an int8 matrix with a scale for each part.
template <class X, class W>
struct Operands {
  const X* x;
  const float* x_scale;  // [N, parts]; nullptr: 1
  const W* weight;       // [outs, ins]
  const float* scale;    // [outs, parts]; nullptr: 1
  int64_t ins;
  int64_t parts;
};

// The place of a tile: its rows of the matrix are `spread` apart. It prefetches the even (phase 0) or odd (phase 1)
// cache lines of the rows that are `ahead` rows further, and nothing in any other phase.
struct Place {
  int64_t row, out, spread, first, last, part, ahead, phase;
};

// Adds the sums over a segment of columns to results[row + r, out + o * spread], for R rows of x and O of the matrix.
// The first segment of a row sets them instead.
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
  // in a single pass, whole rows of the matrix; else segments of rows, which stay in the cache between passes
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

// A tile has as many rows of the matrix as leave enough registers for the operands.
template <class X, class W>
void product(const Operands<X, W>& p, int64_t rows, float* results, int64_t outs) {
  if (rows <= 2) return groups<4>(p, rows, results, outs);
  if (rows == 3 || sizeof(X) == 4) return groups<3>(p, rows, results, outs);
  groups<2>(p, rows, results, outs);
}

// Rounds a row of x to 16-bit integers, with a scale for each part. The scale is not finite if a number of the part is
// not.
inline void to_shorts(const float* x, int64_t ins, int64_t parts, int16_t* shorts, float* scales) {
  const __m256 absolute = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  const int64_t columns = ins / parts;
  for (int64_t part = 0; part < parts; ++part, x += columns, shorts += columns) {
    __m256 maxima = _mm256_setzero_ps(), zeros = _mm256_setzero_ps();  // NaN where x is NaN, which a maximum would lose
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

// The product with a matrix in any format: int8 in integers, the others in float32.
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

}  // namespace bloomlm

extern "C" AOTITorchError aoti_torch_cpu_few_rows(AtenTensorHandle x, AtenTensorHandle weight, AtenTensorHandle* scale,
                                                  AtenTensorHandle* result) {
  const bloomlm::Floats rows(x);
  const bloomlm::Matrix matrix = bloomlm::matrix_of(weight, scale);
  *result = bloomlm::new_floats(rows.sizes[0], matrix.outs);
  bloomlm::product(rows.data, matrix, rows.sizes[0], bloomlm::Floats(*result).data);
  return AOTI_TORCH_SUCCESS;
}
