// GELU and its gradient for one level of instructions: this text is compiled once for each, inside a namespace of its own,
// after its vectors and finish_rows.h.

INLINE void put(float* to, Floats v) { store(to, v); }
INLINE void put(Bfloat16* to, Floats v) { store_rounded(to, v); }

template <class T>
void gelu_of(const T* x, int64_t count, T* results) {
  const int64_t whole = count / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) put(results + i, gelu(load(x + i)));
  scalar::gelu_of(x + whole, count - whole, results + whole);
}

// With s = 1 / (1 + e^-2u), GELU is x s, and its derivative s + x s (1 - s) 2 du/dx; a = e^-2|u| cannot overflow, and
// s (1 - s) = a / (1 + a)^2.
template <class T>
void gelu_gradient(const T* gradient, const T* x, int64_t count, T* results) {
  const int64_t whole = count / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    const Floats v = load(x + i), squared = multiply(v, v);
    const Floats u = multiply(multiply(v, all(kGeluFactor)), add_product(all(1.0f), squared, all(kGeluCubic)));
    const Floats slope = multiply(all(2.0f * kGeluFactor), add_product(all(1.0f), squared, all(3.0f * kGeluCubic)));
    const Floats small = exponential(multiply(magnitudes(u), all(-2.0f))), inverse = divide(all(1.0f), add(all(1.0f), small));
    const Floats upper = add(small, zero_where_positive(add_product(all(1.0f), small, all(-1.0f)), multiply(u, all(-1.0f))));
    const Floats product = multiply(multiply(small, inverse), multiply(inverse, multiply(v, slope)));
    put(results + i, multiply(load(gradient + i), add_product(product, upper, inverse)));
  }
  scalar::gelu_gradient(gradient + whole, x + whole, count - whole, results + whole);
}
