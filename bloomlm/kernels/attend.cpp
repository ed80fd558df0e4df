// bloomlm::attend: attention of new tokens over the slots of their row up to their own. query [B, H, K], keys and values
// [R, H, M, K], slopes [H] of ALiBi, rows [B] and slots [B] of the tokens -> [B, H * K].
// R rows of the cache, B tokens, H heads, M slots of the cache, K head_dim.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "attend.h"
#include "level.h"
#include "tensors.h"

namespace bloomlm {

// Neighbouring tokens of one row, which read its keys and values together.
struct Tile {
  int64_t first, count;
};

inline std::vector<Tile> tiles_of(const int64_t* rows, int64_t count, int64_t most) {
  std::vector<Tile> tiles;
  for (int64_t i = 0; i < count; ++i) {
    if (i > 0 && rows[i] == rows[i - 1] && tiles.back().count < most) ++tiles.back().count;
    else tiles.push_back({i, 1});
  }
  return tiles;
}

}  // namespace bloomlm

extern "C" AOTITorchError aoti_torch_cpu_attend(AtenTensorHandle query, AtenTensorHandle keys, AtenTensorHandle values,
                                                AtenTensorHandle slopes, AtenTensorHandle rows, AtenTensorHandle slots,
                                                AtenTensorHandle* result) {
  using namespace bloomlm;
  const bloomlm::Floats q(query), k(keys), v(values), slope(slopes);
  const auto *row = data_of<int64_t>(rows), *last = data_of<int64_t>(slots);
  const int64_t count = q.sizes[0], heads = q.sizes[1], head_dim = q.sizes[2];
  *result = new_floats(count, heads * head_dim);
  float* out = data_of<float>(*result);
  const auto attend = kLevel == kScalar ? scalar::attend : kLevel >= kAvx512 ? avx512::attend : avx2::attend;
  const std::vector<Tile> tiles = tiles_of(row, count, kLevel == kScalar ? 1 : kLevel >= kAvx512 ? 16 : 8);
  const int64_t num_tiles = tiles.size();
#pragma omp parallel
  {
    std::vector<float> room((k.sizes[2] + head_dim + 16) * 16);
    // rows differ in length, so a thread takes the next tile when it is done with one; those of one head share its cache
#pragma omp for schedule(dynamic)
    for (int64_t unit = 0; unit < num_tiles * heads; ++unit) {
      const int64_t head = unit / num_tiles;
      const Tile tile = tiles[unit % num_tiles];
      const auto at = [&](const bloomlm::Floats& t, int64_t index) {
        return t.data + index * t.strides[0] + head * t.strides[1];
      };
      attend({at(q, tile.first), at(k, row[tile.first]), at(v, row[tile.first]), q.strides[0], k.strides[2],
              last + tile.first, tile.count, head_dim, slope.data[head], 1.0f / std::sqrt(static_cast<float>(head_dim)), room.data(),
              out + (tile.first * heads + head) * head_dim, heads * head_dim});
    }
  }
  return AOTI_TORCH_SUCCESS;
}
