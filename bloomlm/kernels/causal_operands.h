// Matrices of the products of causal.cpp, in float32 or bfloat16 (P). A right-hand matrix in bfloat16 has two rows side by
// side: [rows / 2, columns, 2].

#ifndef BLOOMLM_CAUSAL_OPERANDS_H
#define BLOOMLM_CAUSAL_OPERANDS_H

#include <cstdint>
#include <optional>
#include <vector>

#include "causal.h"
#include "many_rows.h"

namespace bloomlm {

// Room that a thread uses for one document and head after another.
class Buffers {
 public:
  void begin() { next_ = 0; }
  // Room for some numbers, which are not set, until the next begin().
  template <class P>
  P* take(int64_t count) {
    if (next_ == buffers_.size()) buffers_.emplace_back();
    Buffer& buffer = buffers_[next_++];
    const int64_t bytes = count * sizeof(P);
    if (buffer.bytes < bytes) buffer.room.emplace(buffer.bytes = bytes);
    return reinterpret_cast<P*>(buffer.room->data());
  }

 private:
  struct Buffer {
    int64_t bytes = 0;
    std::optional<Room<char>> room;
  };
  std::vector<Buffer> buffers_;
  size_t next_ = 0;
};

// Rows [kBlock, k] as the columns of a right-hand matrix [k, kBlock].
template <class P>
void to_columns(const Kernels& kernels, const P* rows, int64_t k, P* columns) {
  const int64_t words = k * sizeof(P) / sizeof(float);
  kernels.turn(reinterpret_cast<const float*>(rows), words, kBlock, words, reinterpret_cast<float*>(columns), kBlock);
}

// A matrix [count, columns] as a right-hand one, in `room` where it cannot stay; count is even.
inline const float* to_right(const float* rows, int64_t, int64_t, float*) { return rows; }
inline const Bfloat16* to_right(const Bfloat16* rows, int64_t count, int64_t columns, Bfloat16* room) {
  for (int64_t row = 0; row < count; row += 2)
    for (int64_t column = 0; column < columns; ++column) {
      room[row * columns + 2 * column] = rows[row * columns + column];
      room[row * columns + 2 * column + 1] = rows[(row + 1) * columns + column];
    }
  return room;
}

// Rows [kBlock, k] as a left-hand matrix [k, kBlock]; `room` has their size.
inline void to_turned(const Kernels& kernels, const float* rows, int64_t k, float* turned, float*) {
  kernels.turn(rows, k, kBlock, k, turned, kBlock);
}
inline void to_turned(const Kernels& kernels, const Bfloat16* rows, int64_t k, Bfloat16* turned, Bfloat16* room) {
  const auto* pairs = reinterpret_cast<const float*>(to_right(rows, kBlock, k, room));
  kernels.turn(pairs, k, kBlock / 2, k, reinterpret_cast<float*>(turned), kBlock / 2);
}

// Numbers in float32 as P, in `room` where they cannot stay.
inline const float* rounded(const Kernels&, const float* numbers, int64_t, float*) { return numbers; }
inline const Bfloat16* rounded(const Kernels& kernels, const float* numbers, int64_t count, Bfloat16* room) {
  kernels.to_bfloat16(numbers, count, room);
  return room;
}

}  // namespace bloomlm

#endif
