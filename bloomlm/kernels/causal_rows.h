// Softmax over keys and its gradient, for one level of instructions: this text is compiled once for each, inside a
// namespace of its own, after its vectors and attend_rows.h. A lane is a query.

// For a row of scores: the distance of its key from each query, at most 0 where the query sees the key.
INLINE Floats distances(const Scores& s, int64_t row, Floats queries) {
  return add_product(all(static_cast<float>(s.first_key + row)), queries, all(-1.0f));
}

INLINE Floats queries_from(const Scores& s, int64_t column) {
  float numbers[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) numbers[i] = static_cast<float>(s.first_query + column + i);
  return load(numbers);
}

INLINE Floats score_at(const Scores& s, const float* product, Floats distance) {
  return add_product(multiply(load(product), all(s.factor)), all(s.slope), distance);
}

void softmax(const Scores& s, float* log_sums) {
  for (int64_t column = 0; column < s.columns; column += kLanes) {
    const Floats queries = queries_from(s, column);
    // every query of these sees the rows before `seen`
    const int64_t seen = least(s.count, s.first_query + column + 1 - s.first_key);
    Floats largest = all(-INFINITY), sum = {};
    for (int64_t row = 0; row < s.count; ++row) {
      float* at = s.scores + row * kBlock + column;
      const Floats distance = distances(s, row, queries);
      Floats score = score_at(s, at, distance);
      if (row >= seen) score = add_product(score, larger(distance, all(0.0f)), all(-1e30f));
      largest = larger(largest, score);
      store(at, score);
    }
    for (int64_t row = 0; row < s.count; ++row) {
      float* at = s.scores + row * kBlock + column;
      Floats weight = exponential(add_product(load(at), largest, all(-1.0f)));
      if (row >= seen) weight = zero_where_positive(weight, distances(s, row, queries));
      sum = add(sum, weight);
      store(at, weight);
    }
    float sums[kLanes], most[kLanes];
    store(sums, sum);
    store(most, largest);
    for (int64_t i = 0; i < kLanes; ++i) {
      log_sums[column + i] = most[i] + std::log(sums[i]);
      sums[i] = 1.0f / sums[i];
    }
    const Floats inverse = load(sums);
    for (int64_t row = 0; row < s.count; ++row) {
      float* at = s.scores + row * kBlock + column;
      store(at, multiply(load(at), inverse));
    }
  }
}

void softmax_gradient(const Scores& s, const float* log_sums, const float* means, float* gradients) {
  for (int64_t column = 0; column < s.columns; column += kLanes) {
    const Floats queries = queries_from(s, column), factor = all(s.factor);
    const Floats log_sum = load(log_sums + column), mean = load(means + column);
    const int64_t seen = least(s.count, s.first_query + column + 1 - s.first_key);
    for (int64_t row = 0; row < s.count; ++row) {
      float *at = s.scores + row * kBlock + column, *gradient = gradients + row * kBlock + column;
      const Floats distance = distances(s, row, queries);
      Floats score = add_product(score_at(s, at, distance), log_sum, all(-1.0f));
      // a hidden key's score may be large, and e^x is for x <= 0
      if (row >= seen) score = add_product(score, larger(distance, all(0.0f)), all(-1e30f));
      Floats weight = exponential(score);
      if (row >= seen) weight = zero_where_positive(weight, distance);
      store(at, weight);
      store(gradient, multiply(multiply(factor, weight), add_product(load(gradient), mean, all(-1.0f))));
    }
  }
}
