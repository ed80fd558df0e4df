// Vectors of AVX2: 8 products of floats, or 32-bit sums of 16 products of 16-bit numbers, in one instruction.

#ifndef BLOOMLM_VECTORS_H
#define BLOOMLM_VECTORS_H

#include <immintrin.h>

#include <cstdint>

namespace bloomlm {

inline __m256 load(const float* p) { return _mm256_loadu_ps(p); }
inline __m256i load(const int16_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline __m256i load(const int8_t* p) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline __m256 add_product(__m256 sum, __m256 a, __m256 b) { return _mm256_fmadd_ps(a, b, sum); }
inline __m256i add_product(__m256i sum, __m256i a, __m256i b) {
  sum = _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
  asm("" : "+x"(sum));  // without it GCC adds several products first and runs out of registers
  return sum;
}
inline float total(__m256 v) {
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}
// as floats, because the sum of all eight may exceed 32 bits
inline float total(__m256i v) { return total(_mm256_cvtepi32_ps(v)); }

}  // namespace bloomlm

#endif
