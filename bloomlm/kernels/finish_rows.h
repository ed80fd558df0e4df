// What products need besides: bias and GELU, other floating-point numbers, and blocks turned over. For one level of
// instructions: this text is compiled once for each, inside a namespace of its own, after its vectors.

// e^x for x <= 0, by the polynomial of Cephes' expf; relative error 2e-7. NaN stays NaN.
INLINE Floats exponential(Floats x) {
  x = larger(all(-87.0f), x);
  const Floats power = nearest(multiply(x, all(1.44269504f)));
  x = add_product(x, power, all(-0.693359375f));
  x = add_product(x, power, all(2.12194440e-4f));
  Floats sum = all(1.9875691500e-4f);
  for (const float factor : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 0.5f})
    sum = add_product(all(factor), sum, x);
  return scaled(add_product(add(x, all(1.0f)), multiply(x, x), sum), power);
}

// x / (1 + e^-2u) with u of scalar::gelu, by an exponential that cannot overflow.
INLINE Floats gelu(Floats x) {
  const Floats u = multiply(multiply(x, all(kGeluFactor)), add_product(all(1.0f), multiply(x, x), all(kGeluCubic)));
  const Floats small = exponential(multiply(magnitudes(u), all(-2.0f)));
  const Floats minus_u = multiply(u, all(-1.0f));
  const Floats upper = add(small, zero_where_positive(add_product(all(1.0f), small, all(-1.0f)), minus_u));
  return divide(multiply(x, upper), add(all(1.0f), small));
}

void finish(float* results, const float* bias, bool is_gelu, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Floats sum = bias ? add(load(results + i), load(bias + i)) : load(results + i);
    store(results + i, is_gelu ? gelu(sum) : sum);
  }
  scalar::finish(results + i, bias ? bias + i : nullptr, is_gelu, count - i);
}

void turn(const float* from, int64_t from_stride, int64_t rows, int64_t columns, float* to, int64_t to_stride) {
  const int64_t whole_rows = rows / kLanes * kLanes, whole_columns = columns / kLanes * kLanes;
  for (int64_t row = 0; row < whole_rows; row += kLanes)
    for (int64_t column = 0; column < whole_columns; column += kLanes) {
      Floats block[kLanes];
      for (int i = 0; i < kLanes; ++i) block[i] = load(from + (row + i) * from_stride + column);
      transpose(block);
      for (int i = 0; i < kLanes; ++i) store(to + (column + i) * to_stride + row, block[i]);
    }
  scalar::turn(from + whole_columns, from_stride, whole_rows, columns - whole_columns, to + whole_columns * to_stride, to_stride);
  scalar::turn(from + whole_rows * from_stride, from_stride, rows - whole_rows, columns, to + whole_rows, to_stride);
}

void to_bfloat16(const float* from, int64_t count, Bfloat16* to) {
  const int64_t whole = count / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) store_rounded(to + i, load(from + i));
  scalar::to_bfloat16(from + whole, count - whole, to + whole);
}

void from_bfloat16(const Bfloat16* from, int64_t count, float* to) {
  const int64_t whole = count / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) store(to + i, load(from + i));
  scalar::from_bfloat16(from + whole, count - whole, to + whole);
}
