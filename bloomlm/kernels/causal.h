// Causal attention of whole documents: what the driver (causal.cpp) gives to the code of each level of instructions, and
// the oracle of causal_rows.h in plain C++.

#ifndef BLOOMLM_CAUSAL_H
#define BLOOMLM_CAUSAL_H

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace bloomlm {

constexpr int64_t kBlock = 64;  // keys in a tile, and queries in a block: a tile of scores stays in the first cache

// Scores of a block of queries, transposed: a row of kBlock numbers for each key, a column for each query.
struct Scores {
  float* scores;              // [count, kBlock]: products of key and query on entry
  int64_t first_key, count;   // the rows
  int64_t first_query;        // the key that the first column may see last; each further column sees one more
  int64_t columns;            // in use, a multiple of 16
  float factor, slope;        // score = factor * product + slope * (key - query)
};

namespace scalar {

// e^(score - log_sum), and 0 where the key comes after the query.
inline float weight(const Scores& s, int64_t row, int64_t column, float log_sum) {
  const int64_t distance = s.first_key + row - s.first_query - column;
  const float score = s.scores[row * kBlock + column] * s.factor + s.slope * static_cast<float>(distance);
  return distance > 0 ? 0.0f : std::exp(score - log_sum);
}

// Scores -> weights that add up to 1 in each column; log_sums[kBlock] receives the logarithm of each column's sum.
inline void softmax(const Scores& s, float* log_sums) {
  for (int64_t column = 0; column < s.columns; ++column) {
    float largest = -INFINITY, sum = 0.0f;
    for (int64_t row = 0; row < s.count; ++row) {
      const int64_t distance = s.first_key + row - s.first_query - column;
      if (distance > 0) break;
      largest = std::max(largest, s.scores[row * kBlock + column] * s.factor + s.slope * static_cast<float>(distance));
    }
    for (int64_t row = 0; row < s.count; ++row) sum += weight(s, row, column, largest);
    log_sums[column] = largest + std::log(sum);
    for (int64_t row = 0; row < s.count; ++row)
      s.scores[row * kBlock + column] = weight(s, row, column, log_sums[column]);
  }
}

// Scores -> weights, and gradients of the weights -> gradients of the products: factor * weight * (gradient - mean).
inline void softmax_gradient(const Scores& s, const float* log_sums, const float* means, float* gradients) {
  for (int64_t row = 0; row < s.count; ++row)
    for (int64_t column = 0; column < s.columns; ++column) {
      float &score = s.scores[row * kBlock + column], &gradient = gradients[row * kBlock + column];
      score = weight(s, row, column, log_sums[column]);
      gradient = s.factor * score * (gradient - means[column]);
    }
}

}  // namespace scalar
}  // namespace bloomlm

#endif
