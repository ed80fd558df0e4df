// Vectors of 8 floats or 32-bit numbers, for AVX2 and, where VNNI is defined, AVX-VNNI. vectors_512.h has the same names.

using Floats = __m256;
using Ints = __m256i;
constexpr int kLanes = 8;
constexpr int kRegisters = 16;

INLINE Floats load(const float* p) { return _mm256_loadu_ps(p); }
INLINE Floats load(const Bfloat16* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
INLINE Floats load(const Float16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
INLINE Floats load(const int8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
INLINE void store(float* p, Floats v) { _mm256_storeu_ps(p, v); }
INLINE Floats all(float number) { return _mm256_set1_ps(number); }
INLINE Floats multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
INLINE Floats divide(Floats a, Floats b) { return _mm256_div_ps(a, b); }
INLINE Floats root(Floats v) { return _mm256_sqrt_ps(v); }
INLINE Floats add_product(Floats sum, Floats a, Floats b) { return _mm256_fmadd_ps(a, b, sum); }
// Where the second is NaN, so is the result.
INLINE Floats larger(Floats a, Floats b) { return _mm256_max_ps(a, b); }
INLINE Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
INLINE Floats nearest(Floats v) { return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// v * 2^power for whole powers.
INLINE Floats scaled(Floats v, Floats power) {
  const __m256i exponents = _mm256_slli_epi32(_mm256_cvtps_epi32(power), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(v), exponents));
}
INLINE Floats zero_where_positive(Floats v, Floats condition) {
  return _mm256_andnot_ps(_mm256_cmp_ps(condition, _mm256_setzero_ps(), _CMP_GT_OQ), v);
}
INLINE Floats magnitudes(Floats v) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v); }
INLINE Floats floats(Ints v) { return _mm256_cvtepi32_ps(v); }
INLINE float total(Floats v) {
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

INLINE float largest(Floats v) {
  __m128 most = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  most = _mm_max_ps(most, _mm_movehl_ps(most, most));
  return _mm_cvtss_f32(_mm_max_ss(most, _mm_movehdup_ps(most)));
}

// Number j of vector i changes places with number i of vector j.
INLINE void transpose(Floats (&v)[kLanes]) {
  Floats t[kLanes];
  for (int i = 0; i < kLanes; i += 2) {
    t[i] = _mm256_unpacklo_ps(v[i], v[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(v[i], v[i + 1]);
  }
  for (int i = 0; i < kLanes; ++i) {
    const __m256d a = _mm256_castps_pd(t[i / 4 * 4 + i % 4 / 2]), b = _mm256_castps_pd(t[i / 4 * 4 + i % 4 / 2 + 2]);
    v[i] = _mm256_castpd_ps(i % 2 ? _mm256_unpackhi_pd(a, b) : _mm256_unpacklo_pd(a, b));
  }
  // half h of v[4 * g + i] now has column 4 * h + i of rows 4 * g to 4 * g + 3
  for (int i = 0; i < 4; ++i) {
    const Floats low = v[i], high = v[4 + i];
    v[i] = _mm256_permute2f128_ps(low, high, 0x20);
    v[4 + i] = _mm256_permute2f128_ps(low, high, 0x31);
  }
}

// The total of v[i] as number i.
INLINE Floats totals(const Floats* v) {
  Floats fours[2];
  for (int i = 0; i < 2; ++i, v += 4)
    fours[i] = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
  return add(_mm256_permute2f128_ps(fours[0], fours[1], 0x20), _mm256_permute2f128_ps(fours[0], fours[1], 0x31));
}

INLINE Ints load_ints(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
INLINE Ints load_shorts(const int8_t* p) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
// The nearest whole numbers.
INLINE void store_rounded(int16_t* p, Floats v) {
  const __m256i whole = _mm256_cvtps_epi32(v);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1)));
}
// The nearest bfloat16, to the even one of two; NaN stays NaN.
INLINE void store_rounded(Bfloat16* p, Floats v) {
  const __m256i bits = _mm256_castps_si256(v), one = _mm256_set1_epi32(1);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), one);
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i whole = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan), 16);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm_packus_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1)));
}
INLINE Ints low_halves(Ints v) { return _mm256_and_si256(v, _mm256_set1_epi8(15)); }
INLINE Ints high_halves(Ints v) { return low_halves(_mm256_srli_epi16(v, 4)); }

// sum + the products of two 16-bit numbers in each 32 bits.
INLINE Ints add_products(Ints sum, Ints a, Ints b) {
#ifdef VNNI
  return _mm256_dpwssd_avx_epi32(sum, a, b);
#else
  sum = _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
  asm("" : "+x"(sum));  // without it GCC adds several products first and runs out of registers
  return sum;
#endif
}

// sum + the products of four vectors of four numbers from 0 to 15 with numbers of 8 bits, 64 bytes apart.
INLINE Ints add_products(Ints sum, const Ints (&a)[4], const int8_t* b) {
#ifdef VNNI
  for (int step = 0; step < 4; ++step) sum = _mm256_dpbusd_avx_epi32(sum, a[step], load_ints(b + 64 * step));
  return sum;
#else
  Ints pairs = _mm256_maddubs_epi16(a[0], load_ints(b));  // at most 2 * 15 * 127 each, so four fit into 16 bits
  for (int step = 1; step < 4; ++step)
    pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(a[step], load_ints(b + 64 * step)));
  return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#endif
}
