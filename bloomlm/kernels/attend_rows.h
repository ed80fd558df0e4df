// Attention of one token over slots, for one level of instructions: this text is compiled once for each, inside a namespace
// of its own, after its vectors and finish_rows.h.

constexpr int64_t kAheadSlots = 32;  // prefetched, over keys and then values

template <class T>
INLINE void prefetch_slot(const Query<T>& q, int64_t place) {
  if (place >= 2 * q.slots) return;
  const T* slot = place < q.slots ? q.keys + place * q.slot_stride : q.values + (place - q.slots) * q.slot_stride;
  for (int64_t i = 0; i < q.head_dim; i += 64 / sizeof(T)) prefetch(slot + i);
}

// The sum over slots of factor * weight * values, for V vectors of columns from `column` on.
template <int V, class T>
INLINE void weighted_sum(const Query<T>& q, int64_t column, float factor) {
  Floats sums[V] = {};
  for (int64_t slot = 0; slot < q.slots; ++slot) {
    if (column == 0) prefetch_slot(q, q.slots + slot + kAheadSlots);
    for (int j = 0; j < V; ++j)
      sums[j] = add_product(sums[j], all(q.room[slot]), load(q.values + slot * q.slot_stride + column + kLanes * j));
  }
  for (int j = 0; j < V; ++j) store(q.result + column + kLanes * j, multiply(sums[j], all(factor)));
}

template <class T>
void attend(const Query<T>& q) {
  constexpr int kSlots = 4;
  const int64_t slots = q.slots, whole = q.head_dim / kLanes * kLanes;
  float largest = -INFINITY, sum = 0.0f;
  for (int64_t slot = 0; slot < slots; slot += kSlots) {
    const int64_t count = least<int64_t>(kSlots, slots - slot);
    const T* keys[kSlots];  // the last slot again where there are fewer
    for (int j = 0; j < kSlots; ++j) keys[j] = q.keys + (slot + least<int64_t>(j, count - 1)) * q.slot_stride;
    for (int j = 0; j < kSlots; ++j) prefetch_slot(q, slot + j + kAheadSlots);
    Floats sums[kSlots] = {};
    for (int64_t i = 0; i < whole; i += kLanes)
      for (int j = 0; j < kSlots; ++j) sums[j] = add_product(sums[j], load(q.query + i), load(keys[j] + i));
    for (int j = 0; j < count; ++j) {
      float score = total(sums[j]);
      for (int64_t i = whole; i < q.head_dim; ++i) score += q.query[i] * to_float(keys[j][i]);
      q.room[slot + j] = score * q.factor + q.slope * static_cast<float>(slot + j + 1 - slots);
      largest = q.room[slot + j] > largest ? q.room[slot + j] : largest;
    }
  }
  for (int64_t slot = 0; slot < slots; slot += kLanes) {
    store(q.room + slot, exponential(add(load(q.room + slot), all(-largest))));
    for (int64_t i = slot; i < least(slot + kLanes, slots); ++i) sum += q.room[i];
  }
  int64_t i = 0;
  for (; i + 4 * kLanes <= q.head_dim; i += 4 * kLanes) weighted_sum<4>(q, i, 1.0f / sum);
  for (; i < whole; i += kLanes) weighted_sum<1>(q, i, 1.0f / sum);
  for (; i < q.head_dim; ++i) {
    float sums = 0.0f;
    for (int64_t slot = 0; slot < slots; ++slot) sums += q.room[slot] * to_float(q.values[slot * q.slot_stride + i]);
    q.result[i] = sums / sum;
  }
}
