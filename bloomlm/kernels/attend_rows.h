// Attention of new tokens over the slots of their row, for one level of instructions: this text is compiled once for each,
// inside a namespace of its own, after its vectors.

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

// The sum over slots of factor * weight * values, for V vectors of columns from `column` on.
template <int V>
INLINE void weighted_sum(const Queries& q, const float* weights, int64_t slots, int64_t column, float factor) {
  Floats sums[V] = {};
  for (int64_t slot = 0; slot < slots; ++slot)
    for (int j = 0; j < V; ++j)
      sums[j] = add_product(sums[j], all(weights[slot]), load(q.values + slot * q.slot_stride + column + kLanes * j));
  for (int j = 0; j < V; ++j) store(q.result + column + kLanes * j, multiply(sums[j], all(factor)));
}

// One query.
void attend_one(const Queries& q) {
  constexpr int kSlots = 4;
  const int64_t slots = q.last[0] + 1, whole = q.head_dim / kLanes * kLanes;
  float largest = -INFINITY, sum = 0.0f;
  for (int64_t slot = 0; slot < slots; slot += kSlots) {
    const int64_t count = least<int64_t>(kSlots, slots - slot);
    const float* keys[kSlots];  // the last slot again where there are fewer
    for (int j = 0; j < kSlots; ++j) keys[j] = q.keys + (slot + least<int64_t>(j, count - 1)) * q.slot_stride;
    Floats sums[kSlots] = {};
    for (int64_t i = 0; i < whole; i += kLanes)
      for (int j = 0; j < kSlots; ++j) sums[j] = add_product(sums[j], load(q.query + i), load(keys[j] + i));
    for (int j = 0; j < count; ++j) {
      float score = total(sums[j]);
      for (int64_t i = whole; i < q.head_dim; ++i) score += q.query[i] * keys[j][i];
      q.room[slot + j] = score * q.factor + q.slope * static_cast<float>(slot + j + 1 - slots);
      largest = q.room[slot + j] > largest ? q.room[slot + j] : largest;
    }
  }
  for (int64_t slot = 0; slot < slots; slot += kLanes) {
    store(q.room + slot, exponential(add(load(q.room + slot), all(-largest))));
    for (int64_t i = slot; i < least(slot + kLanes, slots); ++i) sum += q.room[i];
  }
  int64_t i = 0;
  for (; i + 4 * kLanes <= q.head_dim; i += 4 * kLanes) weighted_sum<4>(q, q.room, slots, i, 1.0f / sum);
  for (; i < whole; i += kLanes) weighted_sum<1>(q, q.room, slots, i, 1.0f / sum);
  for (; i < q.head_dim; ++i) {
    float sums = 0.0f;
    for (int64_t slot = 0; slot < slots; ++slot) sums += q.room[slot] * q.values[slot * q.slot_stride + i];
    q.result[i] = sums / sum;
  }
}

// C columns of the result, from `column` on: a lane for each query.
template <int C>
INLINE void lane_sums(const Queries& q, const float* weights, int64_t slots, int64_t column, Floats factors) {
  Floats sums[C] = {};
  for (int64_t slot = 0; slot < slots; ++slot) {
    const Floats weight = load(weights + slot * kLanes);
    for (int j = 0; j < C; ++j)
      sums[j] = add_product(sums[j], weight, all(q.values[slot * q.slot_stride + column + j]));
  }
  for (int j = 0; j < C; ++j) {
    float numbers[kLanes];
    store(numbers, multiply(sums[j], factors));
    for (int64_t i = 0; i < q.count; ++i) q.result[i * q.result_stride + column + j] = numbers[i];
  }
}

// Up to kLanes queries of one row, a lane for each. `room` holds the queries and then the scores.
void attend_lanes(const Queries& q) {
  constexpr int kSlots = 8, kColumns = kRegisters / 2;
  float lasts[kLanes], *queries = q.room, *scores = q.room + q.head_dim * kLanes;
  for (int64_t i = 0; i < kLanes; ++i) {
    const int64_t query = least(i, q.count - 1);
    lasts[i] = static_cast<float>(q.last[query]);
    for (int64_t k = 0; k < q.head_dim; ++k) queries[k * kLanes + i] = q.query[query * q.query_stride + k];
  }
  const int64_t slots = q.last[q.count - 1] + 1;
  const Floats last = load(lasts), slope = all(q.slope), one_less = all(-1.0f);
  Floats largest = all(-INFINITY), sum = {};
  for (int64_t slot = 0; slot < slots; slot += kSlots) {
    const float* keys[kSlots];  // the last slot again where there are fewer
    for (int j = 0; j < kSlots; ++j) keys[j] = q.keys + least(slot + j, slots - 1) * q.slot_stride;
    Floats products[kSlots] = {};
    for (int64_t k = 0; k < q.head_dim; ++k)
      for (int j = 0; j < kSlots; ++j)
        products[j] = add_product(products[j], load(queries + k * kLanes), all(keys[j][k]));
    for (int j = 0; j < kSlots && slot + j < slots; ++j) {
      const Floats distance = add_product(all(static_cast<float>(slot + j)), last, one_less);
      const Floats hidden = larger(distance, all(0.0f));
      Floats score = add_product(multiply(products[j], all(q.factor)), slope, distance);
      score = add_product(score, hidden, all(-1e30f));
      largest = larger(largest, score);
      store(scores + (slot + j) * kLanes, score);
    }
  }
  for (int64_t slot = 0; slot < slots; ++slot) {
    const Floats distance = add_product(all(static_cast<float>(slot)), last, one_less);
    const Floats less = add_product(load(scores + slot * kLanes), largest, one_less);
    const Floats weight = zero_where_positive(exponential(less), distance);
    sum = add(sum, weight);
    store(scores + slot * kLanes, weight);
  }
  float sums[kLanes];
  store(sums, sum);
  for (float& number : sums) number = 1.0f / number;
  int64_t k = 0;
  for (; k + kColumns <= q.head_dim; k += kColumns) lane_sums<kColumns>(q, scores, slots, k, load(sums));
  for (; k < q.head_dim; ++k) lane_sums<1>(q, scores, slots, k, load(sums));
}

void attend(const Queries& q) { q.count == 1 ? attend_one(q) : attend_lanes(q); }
