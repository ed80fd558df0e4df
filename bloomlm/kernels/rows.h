// The sums of few rows of activations with rows of a matrix, and rows of a matrix in float32, for one level of
// instructions: this text is compiled once for each, inside a namespace of its own, after its vectors.

constexpr int64_t kAheadBytes = 8192;  // prefetched, over all rows that are read at a time

// A tile has R rows of activations and O rows of the matrix, and its sums lie in registers.
template <int R, int O>
using Sums = Floats[R][O];

template <class W>
struct Dense {
  static constexpr int64_t kColumns = kLanes;

  template <int R, int O>
  INLINE static void add(const Operands& p, const int64_t (&rows)[R], const int64_t (&outs)[O], Sums<R, O>& sums) {
    const float* x[R];
    const W* w[O];
    for (int r = 0; r < R; ++r) x[r] = static_cast<const float*>(p.x) + rows[r] * p.x_stride;
    for (int o = 0; o < O; ++o) w[o] = static_cast<const W*>(p.matrix.data) + outs[o] * p.matrix.ins;
#pragma GCC unroll 2
    for (int64_t i = 0; i < p.matrix.ins; i += kLanes) {
      Floats numbers[O];
      for (int o = 0; o < O; ++o) {
        numbers[o] = load(w[o] + i);
        prefetch(reinterpret_cast<const char*>(w[o] + i) + kAheadBytes / O);
      }
      for (int r = 0; r < R; ++r) {
        const Floats activations = load(x[r] + i);
        for (int o = 0; o < O; ++o) sums[r][o] = add_product(sums[r][o], activations, numbers[o]);
      }
    }
  }
};

#ifdef BFLOAT16
struct Pairs {
  template <int R, int O>
  INLINE static void add(const Operands& p, const int64_t (&rows)[R], const int64_t (&outs)[O], Sums<R, O>& sums) {
    const Bfloat16 *x[R], *w[O];
    for (int r = 0; r < R; ++r) x[r] = static_cast<const Bfloat16*>(p.x) + rows[r] * p.x_stride;
    for (int o = 0; o < O; ++o) w[o] = static_cast<const Bfloat16*>(p.matrix.data) + outs[o] * p.matrix.ins;
#pragma GCC unroll 2
    for (int64_t i = 0; i < p.matrix.ins; i += 2 * kLanes) {
      Ints numbers[O];
      for (int o = 0; o < O; ++o) {
        numbers[o] = load_ints(w[o] + i);
        prefetch(reinterpret_cast<const char*>(w[o] + i) + kAheadBytes / O);
      }
      for (int r = 0; r < R; ++r) {
        const Ints activations = load_ints(x[r] + i);
        for (int o = 0; o < O; ++o) sums[r][o] = add_products(sums[r][o], activations, numbers[o]);
      }
    }
  }
};
#endif

struct EightBits {
  static constexpr int64_t kLine = 64;  // columns that are prefetched together
  static constexpr int64_t kSegment = 4096;  // whole numbers of so many columns cannot exceed 32 bits

  template <int R, int O>
  INLINE static void add(const Operands& p, const int64_t (&rows)[R], const int64_t (&outs)[O], Sums<R, O>& sums) {
    const int64_t part_columns = p.matrix.ins / kInt8Parts;
    for (int64_t part = 0; part < kInt8Parts; ++part) {
      const int64_t end = (part + 1) * part_columns;
      for (int64_t first = part * part_columns; first < end; first += kSegment) {
        Ints whole[R][O] = {};
        add_segment<R, O>(p, rows, outs, first, least(first + kSegment, end), whole);
        for (int o = 0; o < O; ++o) {
          const Floats scale = all(static_cast<const float*>(p.matrix.scale)[outs[o] * kInt8Parts + part]);
          for (int r = 0; r < R; ++r) sums[r][o] = add_product(sums[r][o], floats(whole[r][o]), scale);
        }
      }
    }
    for (int r = 0; r < R; ++r) {
      const Floats scale = all(p.x_scale[rows[r]]);
      for (int o = 0; o < O; ++o) sums[r][o] = multiply(sums[r][o], scale);
    }
  }

  template <int R, int O>
  INLINE static void add_segment(const Operands& p, const int64_t (&rows)[R], const int64_t (&outs)[O], int64_t first,
                                 int64_t last, Ints (&whole)[R][O]) {
    const int16_t* x[R];
    const int8_t* w[O];
    for (int r = 0; r < R; ++r) x[r] = static_cast<const int16_t*>(p.x) + rows[r] * p.x_stride;
    for (int o = 0; o < O; ++o) w[o] = static_cast<const int8_t*>(p.matrix.data) + outs[o] * p.matrix.ins;
    for (int64_t line = first; line < last; line += kLine) {
      for (int o = 0; o < O; ++o) prefetch(w[o] + line + kAheadBytes / O);
#pragma GCC unroll 4
      for (int i = 0; i < kLine; i += 2 * kLanes) {
        Ints numbers[O];
        for (int o = 0; o < O; ++o) numbers[o] = load_shorts(w[o] + line + i);
        for (int r = 0; r < R; ++r) {
          const Ints activations = load_ints(x[r] + line + i);
          for (int o = 0; o < O; ++o) whole[r][o] = add_products(whole[r][o], activations, numbers[o]);
        }
      }
    }
  }
};

struct FourBits {
  static constexpr int64_t kBytesForScale = kHalfColumns / 2;  // of the matrix, for each of its scales

  // The lanes of one row of activations stay in registers for all rows of the matrix. Those of more rows are too many, so
  // rows of the matrix come one after another.
  template <int R, int O>
  INLINE static void add(const Operands& p, const int64_t (&rows)[R], const int64_t (&outs)[O], Sums<R, O>& sums) {
    constexpr int kTogether = R == 1 ? O : 1;
    const int64_t chunks = p.matrix.ins / kChunk;
#pragma GCC unroll 1
    for (int first = 0; first < O; first += kTogether) {
      Floats found[kTogether][R] = {};
      for (int64_t chunk = 0; chunk < chunks; ++chunk)
        for (int64_t lane = 0; lane < kMostLanes; lane += kLanes)
#pragma GCC unroll 4
          for (int o = 0; o < kTogether; ++o) add_lanes<R>(p, rows, outs[first + o] * chunks + chunk, chunk, lane, found[o]);
      for (int o = 0; o < kTogether; ++o)
        for (int r = 0; r < R; ++r) sums[r][first + o] = multiply(found[o][r], all(p.matrix.row_scale[outs[first + o]]));
    }
  }

  // The lanes of a chunk that fill a vector; `place` is the number of the chunk in the matrix.
  template <int R>
  INLINE static void add_lanes(const Operands& p, const int64_t (&rows)[R], int64_t place, int64_t chunk, int64_t lane,
                               Floats (&sums)[R]) {
    const auto* bytes = static_cast<const uint8_t*>(p.matrix.data) + place * (kChunk / 2) + 4 * lane;
    const auto* scales = static_cast<const int8_t*>(p.matrix.scale) + place * 2 * kMostLanes + lane;
    const Floats low_scale = load(scales), high_scale = load(scales + kMostLanes);
    prefetch(scales + kAheadBytes / 4 / kBytesForScale);
    Ints low[4], high[4];
    for (int step = 0; step < 4; ++step) {
      const Ints both = load_ints(bytes + 4 * kMostLanes * step);
      prefetch(bytes + 4 * kMostLanes * step + kAheadBytes / 4);
      low[step] = low_halves(both), high[step] = high_halves(both);
    }
    for (int r = 0; r < R; ++r) {
      const int8_t* x = static_cast<const int8_t*>(p.x) + rows[r] * p.x_stride + chunk * kChunk + 4 * lane;
      const int64_t lanes = (rows[r] * (p.matrix.ins / kChunk) + chunk) * kMostLanes + lane;
      const int32_t* offsets = p.x_offset + 2 * lanes - lane;
      const Ints low_sum = add_products(load_ints(offsets), low, x);
      const Ints high_sum = add_products(load_ints(offsets + kMostLanes), high, x + kChunk / 2);
      const Floats both = add_product(multiply(floats(low_sum), low_scale), floats(high_sum), high_scale);
      sums[r] = add_product(sums[r], both, load(p.x_scale + lanes));
    }
  }
};

template <int N>
INLINE void totals(const Floats* v, float* sums) {
  if constexpr (N == kLanes) store(sums, totals(v));
  else
    for (int i = 0; i < N; ++i) sums[i] = total(v[i]);
}

template <class F, int R, int O>
INLINE void tile(const Operands& p, int64_t row, int64_t out, int64_t spread) {
  int64_t rows[R], outs[O];  // the last ones again where there are fewer
  for (int r = 0; r < R; ++r) rows[r] = least(row + r, p.rows - 1);
  for (int o = 0; o < O; ++o) outs[o] = least(out + o * spread, p.matrix.outs - 1);
  Sums<R, O> sums = {};
  F::template add<R, O>(p, rows, outs, sums);
  float found[R][O];
  totals<R * O>(sums[0], found[0]);
  for (int r = 0; r < R; ++r)
    for (int o = 0; o < O; ++o) p.results[rows[r] * p.matrix.outs + outs[o]] = found[r][o];
}

// A tile's sums take at most half of the registers.
template <class F, int R>
void tiles(const Operands& p, int64_t out, int64_t spread) {
  constexpr int O = least(4, kRegisters / 2 / R);
  for (int64_t row = 0; row < p.rows; row += R)
    for (int64_t first = 0; first < 4; first += O) tile<F, R, O>(p, row, out + first * spread, spread);
}

template <class F>
void group(const Operands& p, int64_t start, int64_t spread) {
  for (int64_t out = start; out < start + spread; ++out) {
    if (p.rows == 1) tiles<F, 1>(p, out, spread);
    else if (p.rows == 2) tiles<F, 2>(p, out, spread);
    else tiles<F, 4>(p, out, spread);
  }
}

// Results of 4 * spread rows of the matrix from `start` on, with all rows of activations.
void few_rows(const Operands& p, int64_t start, int64_t spread) {
  switch (p.matrix.format) {
    case Matrix::kFloat32: return group<Dense<float>>(p, start, spread);
    case Matrix::kFloat16: return group<Dense<Float16>>(p, start, spread);
#ifdef BFLOAT16
    case Matrix::kBfloat16: return group<Pairs>(p, start, spread);
#else
    case Matrix::kBfloat16: return group<Dense<Bfloat16>>(p, start, spread);
#endif
    case Matrix::kInt8: return group<EightBits>(p, start, spread);
    case Matrix::kInt4: return group<FourBits>(p, start, spread);
  }
}

INLINE float largest_of(const float* x, int64_t count) {
  Floats maxima = {}, zeros = {};
  for (int64_t i = 0; i < count; i += kLanes) {
    maxima = larger(maxima, magnitudes(load(x + i)));
    zeros = add_product(zeros, load(x + i), all(0.0f));
  }
  return largest(maxima) + total(zeros);
}

INLINE void round_numbers(const float* x, int64_t count, float inverse, int16_t* numbers) {
  for (int64_t i = 0; i < count; i += kLanes) store_rounded(numbers + i, multiply(load(x + i), all(inverse)));
}

void round_row(const float* x, const Matrix& matrix, const RoundedRow& row) {
#ifdef BFLOAT16
  if (matrix.format == Matrix::kBfloat16) return to_bfloat16(x, matrix.ins, static_cast<Bfloat16*>(row.numbers));
#endif
  bloomlm::round_row(x, matrix, row, largest_of, round_numbers);
}

template <class W>
INLINE void decode_numbers(const W* numbers, int64_t count, float scale, float* values) {
  for (int64_t i = 0; i < count; i += kLanes) store(values + i, multiply(load(numbers + i), all(scale)));
}

void decode_row(const Matrix& matrix, int64_t row, float* values) {
  const int64_t start = row * matrix.ins;
  if (matrix.format == Matrix::kFloat16)
    return decode_numbers(static_cast<const Float16*>(matrix.data) + start, matrix.ins, 1.0f, values);
  if (matrix.format == Matrix::kBfloat16)
    return decode_numbers(static_cast<const Bfloat16*>(matrix.data) + start, matrix.ins, 1.0f, values);
  bloomlm::decode_row(matrix, row, values, decode_numbers<int8_t>);
}
