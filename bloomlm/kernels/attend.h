// What attend.cpp gives to the code of each level, and the oracle of attend_rows.h in plain C++.

#ifndef BLOOMLM_ATTEND_H
#define BLOOMLM_ATTEND_H

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace bloomlm {

// Queries of neighbouring tokens of one row, and one head of that row.
struct Queries {
  const float *query, *keys, *values;  // [count, K], [M, K], [M, K]
  int64_t query_stride, slot_stride;   // from one query and from one slot to the next
  const int64_t* last;                 // [count]: the last slot that each query attends to, rising
  int64_t count, head_dim;
  float slope, factor;
  float* room;  // for kLanes * (K + M + 1) numbers
  float* result;
  int64_t result_stride;  // from one query's result to the next
};

namespace scalar {

// softmax(factor * q k^T + slope * distance) v for one query.
inline void attend(const Queries& q) {
  const int64_t slots = q.last[0] + 1;
  float largest = -INFINITY, sum = 0.0f;
  for (int64_t slot = 0; slot < slots; ++slot) {
    float score = 0.0f;
    for (int64_t k = 0; k < q.head_dim; ++k) score += q.query[k] * q.keys[slot * q.slot_stride + k];
    q.room[slot] = score * q.factor + q.slope * static_cast<float>(slot + 1 - slots);
    largest = std::max(largest, q.room[slot]);
  }
  for (int64_t slot = 0; slot < slots; ++slot) sum += q.room[slot] = std::exp(q.room[slot] - largest);
  for (int64_t k = 0; k < q.head_dim; ++k) {
    float value = 0.0f;
    for (int64_t slot = 0; slot < slots; ++slot) value += q.room[slot] * q.values[slot * q.slot_stride + k];
    q.result[k] = value / sum;
  }
}

}  // namespace scalar
}  // namespace bloomlm

#endif
