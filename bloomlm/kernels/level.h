// The instructions that this processor has, found when the program runs: one program serves processors of many kinds.

#ifndef BLOOMLM_LEVEL_H
#define BLOOMLM_LEVEL_H

#include <cstdlib>
#include <cstring>

namespace bloomlm {

// Each level has the instructions of those before it.
enum Level {
  kScalar,      // plain C++, the oracle of the others
  kAvx2,        // 8 floats in an instruction, or 16 products of 16 bits
  kAvxVnni,     // sums of products of 8 and 16 bits in one instruction
  kAvx512,      // the same with vectors of twice the length
  kAvx512Bf16,  // products of bfloat16
  kLevels
};
constexpr const char* kLevelNames[kLevels] = {"scalar", "avx2", "avxvnni", "avx512", "avx512_bf16"};

inline Level best_level() {
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
  if (avx512) return __builtin_cpu_supports("avx512bf16") ? kAvx512Bf16 : kAvx512;
  if (avx2) return __builtin_cpu_supports("avxvnni") ? kAvxVnni : kAvx2;
  return kScalar;
}

// The highest level, or a lower one that BLOOMLM_MAX_CPU_ISA names, which is for tests and comparisons.
inline Level limited_level() {
  const Level best = best_level();
  const char* limit = std::getenv("BLOOMLM_MAX_CPU_ISA");
  for (int level = kScalar; limit && level < best; ++level)
    if (!std::strcmp(limit, kLevelNames[level])) return static_cast<Level>(level);
  return best;
}

static const Level kLevel = limited_level();

}  // namespace bloomlm

#endif
