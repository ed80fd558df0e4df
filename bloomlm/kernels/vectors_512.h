// Vectors of 16 floats or 32-bit numbers, for AVX-512 with VNNI. vectors_256.h has the same names.

using Floats = __m512;
using Ints = __m512i;
constexpr int kLanes = 16;
constexpr int kRegisters = 32;

INLINE Floats load(const float* p) { return _mm512_loadu_ps(p); }
INLINE Floats load(const Bfloat16* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
INLINE Floats load(const Float16* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
INLINE Floats load(const int8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
INLINE void store(float* p, Floats v) { _mm512_storeu_ps(p, v); }
INLINE Floats all(float number) { return _mm512_set1_ps(number); }
INLINE Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
INLINE Floats divide(Floats a, Floats b) { return _mm512_div_ps(a, b); }
INLINE Floats root(Floats v) { return _mm512_sqrt_ps(v); }
INLINE Floats add_product(Floats sum, Floats a, Floats b) { return _mm512_fmadd_ps(a, b, sum); }
// Where the second is NaN, so is the result.
INLINE Floats larger(Floats a, Floats b) { return _mm512_max_ps(a, b); }
INLINE Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
INLINE Floats nearest(Floats v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// v * 2^power for whole powers.
INLINE Floats scaled(Floats v, Floats power) { return _mm512_scalef_ps(v, power); }
INLINE Floats zero_where_positive(Floats v, Floats condition) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(condition, _mm512_setzero_ps(), _CMP_NGT_UQ), v);
}
INLINE Floats magnitudes(Floats v) { return _mm512_abs_ps(v); }
INLINE Floats floats(Ints v) { return _mm512_cvtepi32_ps(v); }
INLINE float total(Floats v) { return _mm512_reduce_add_ps(v); }
INLINE float largest(Floats v) { return _mm512_reduce_max_ps(v); }

// Number j of vector i changes places with number i of vector j.
INLINE void transpose(Floats (&v)[kLanes]) {
  Floats t[kLanes];
  for (int i = 0; i < kLanes; i += 2) {
    t[i] = _mm512_unpacklo_ps(v[i], v[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(v[i], v[i + 1]);
  }
  for (int i = 0; i < kLanes; ++i) {
    const __m512d a = _mm512_castps_pd(t[i / 4 * 4 + i % 4 / 2]), b = _mm512_castps_pd(t[i / 4 * 4 + i % 4 / 2 + 2]);
    v[i] = _mm512_castpd_ps(i % 2 ? _mm512_unpackhi_pd(a, b) : _mm512_unpacklo_pd(a, b));
  }
  // quarter q of v[4 * g + i] now has column 4 * q + i of rows 4 * g to 4 * g + 3
  for (int i = 0; i < 4; ++i) {
    const Floats even_low = _mm512_shuffle_f32x4(v[i], v[4 + i], 0x88), odd_low = _mm512_shuffle_f32x4(v[i], v[4 + i], 0xdd);
    const Floats even_high = _mm512_shuffle_f32x4(v[8 + i], v[12 + i], 0x88);
    const Floats odd_high = _mm512_shuffle_f32x4(v[8 + i], v[12 + i], 0xdd);
    v[i] = _mm512_shuffle_f32x4(even_low, even_high, 0x88);
    v[4 + i] = _mm512_shuffle_f32x4(odd_low, odd_high, 0x88);
    v[8 + i] = _mm512_shuffle_f32x4(even_low, even_high, 0xdd);
    v[12 + i] = _mm512_shuffle_f32x4(odd_low, odd_high, 0xdd);
  }
}

// Sums of neighbouring quarters, those of a before those of b.
INLINE Floats halved(Floats a, Floats b) {
  return add(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}

// The total of v[i] as number i.
INLINE Floats totals(const Floats* v) {
  Floats fours[4];
  for (int i = 0; i < 4; ++i, v += 4) {
    const __m512d a = _mm512_castps_pd(add(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1])));
    const __m512d b = _mm512_castps_pd(add(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3])));
    fours[i] = add(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  return halved(halved(fours[0], fours[1]), halved(fours[2], fours[3]));
}

INLINE Ints load_ints(const void* p) { return _mm512_loadu_si512(p); }
INLINE Ints load_shorts(const int8_t* p) {
  return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
// The nearest whole numbers.
INLINE void store_rounded(int16_t* p, Floats v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(v)));
}
// The nearest bfloat16, to the even one of two; NaN stays NaN.
INLINE void store_rounded(Bfloat16* p, Floats v) {
  const __m512i bits = _mm512_castps_si512(v), one = _mm512_set1_epi32(1);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), one);
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  const __m512i whole = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(whole, 16)));
}
INLINE Ints low_halves(Ints v) { return _mm512_and_si512(v, _mm512_set1_epi8(15)); }
INLINE Ints high_halves(Ints v) { return low_halves(_mm512_srli_epi16(v, 4)); }

// sum + the products of two 16-bit numbers in each 32 bits.
INLINE Ints add_products(Ints sum, Ints a, Ints b) {
  asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));  // GCC copies sums of the intrinsic, and stores some of them
  return sum;
}

#ifdef BFLOAT16
// sum + the products of two numbers in bfloat16 in each 32 bits.
INLINE Floats add_products(Floats sum, Ints a, Ints b) {
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}
#endif

// sum + the products of four vectors of four numbers from 0 to 15 with numbers of 8 bits, 64 bytes apart.
INLINE Ints add_products(Ints sum, const Ints (&a)[4], const int8_t* b) {
  for (int step = 0; step < 4; ++step) sum = _mm512_dpbusd_epi32(sum, a[step], load_ints(b + 64 * step));
  return sum;
}
