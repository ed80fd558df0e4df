// What attend.cpp gives to the code of each level, and the oracle of attend_rows.h in plain C++.

#ifndef BLOOMLM_ATTEND_H
#define BLOOMLM_ATTEND_H

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "matrix.h"

namespace bloomlm {

// The query of a token, and keys and values of one head of its row, in float32 or bfloat16.
template <class T>
struct Query {
  const float* query;        // [K]
  const T *keys, *values;    // [slots, K]
  int64_t slot_stride;       // from one slot to the next
  int64_t slots, head_dim;   // the query attends to all slots, of which the last one is its own
  float slope, factor;
  float* room;    // for slots + 16 numbers
  float* result;  // [K]
};

namespace scalar {

// softmax(factor * q k^T + slope * distance) v.
template <class T>
void attend(const Query<T>& q) {
  float largest = -INFINITY, sum = 0.0f;
  for (int64_t slot = 0; slot < q.slots; ++slot) {
    float score = 0.0f;
    for (int64_t k = 0; k < q.head_dim; ++k) score += q.query[k] * to_float(q.keys[slot * q.slot_stride + k]);
    q.room[slot] = score * q.factor + q.slope * static_cast<float>(slot + 1 - q.slots);
    largest = std::max(largest, q.room[slot]);
  }
  for (int64_t slot = 0; slot < q.slots; ++slot) sum += q.room[slot] = std::exp(q.room[slot] - largest);
  for (int64_t k = 0; k < q.head_dim; ++k) {
    float value = 0.0f;
    for (int64_t slot = 0; slot < q.slots; ++slot) value += q.room[slot] * to_float(q.values[slot * q.slot_stride + k]);
    q.result[k] = value / sum;
  }
}

}  // namespace scalar
}  // namespace bloomlm

#endif
