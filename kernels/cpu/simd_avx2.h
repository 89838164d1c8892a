// AVX2 with FMA and F16C: eight lanes.
#pragma once

#include <immintrin.h>

LOWBIT_BEGIN

constexpr int kLanes = 8;
using f32 = __m256;
using u32 = __m256i;

LOWBIT_FN f32 zero() { return _mm256_setzero_ps(); }
LOWBIT_FN f32 splat(float x) { return _mm256_set1_ps(x); }
LOWBIT_FN u32 splat_u(uint32_t x) { return _mm256_set1_epi32(int(x)); }
LOWBIT_FN __m128i load128(const void* p) {
  return _mm_loadu_si128(static_cast<const __m128i*>(p));
}
LOWBIT_FN f32 load(const float* p) { return _mm256_loadu_ps(p); }
LOWBIT_FN u32 load(const uint32_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
LOWBIT_FN f32 load(const bf16* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load128(p)), 16));
}
LOWBIT_FN f32 load(const f16* p) { return _mm256_cvtph_ps(load128(p)); }
LOWBIT_FN u32 load_bytes(const uint8_t* p) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
LOWBIT_FN void store(float* p, f32 x) { _mm256_storeu_ps(p, x); }
LOWBIT_FN void store(f16* p, f32 x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, 0));
}
LOWBIT_FN void store(bf16* p, f32 x) {
  const u32 b = _mm256_castps_si256(x);
  const u32 odd = _mm256_and_si256(_mm256_srli_epi32(b, 16), splat_u(1));
  u32 r = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(b, splat_u(0x7fff)), odd), 16);
  const u32 nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  r = _mm256_blendv_epi8(r, splat_u(0x7fc0), nan);
  r = _mm256_permute4x64_epi64(_mm256_packus_epi32(r, r), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(r));
}
LOWBIT_FN f32 add(f32 a, f32 b) { return _mm256_add_ps(a, b); }
LOWBIT_FN f32 mul(f32 a, f32 b) { return _mm256_mul_ps(a, b); }
LOWBIT_FN f32 fma(f32 a, f32 b, f32 c) { return _mm256_fmadd_ps(a, b, c); }
LOWBIT_FN float reduce(f32 x) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}
LOWBIT_FN u32 as_u32(f32 x) { return _mm256_castps_si256(x); }
LOWBIT_FN f32 as_f32(u32 x) { return _mm256_castsi256_ps(x); }
LOWBIT_FN f32 from_int(u32 x) { return _mm256_cvtepi32_ps(x); }
template <int n>
LOWBIT_FN u32 shl(u32 x) {
  return _mm256_slli_epi32(x, n);
}
template <int n>
LOWBIT_FN u32 shr(u32 x) {
  return _mm256_srli_epi32(x, n);
}
template <int n>
LOWBIT_FN u32 sra(u32 x) {
  return _mm256_srai_epi32(x, n);
}
LOWBIT_FN u32 add(u32 a, u32 b) { return _mm256_add_epi32(a, b); }
LOWBIT_FN u32 bit_and(u32 a, u32 b) { return _mm256_and_si256(a, b); }
LOWBIT_FN u32 bit_or(u32 a, u32 b) { return _mm256_or_si256(a, b); }
LOWBIT_FN u32 bit_xor(u32 a, u32 b) { return _mm256_xor_si256(a, b); }
LOWBIT_FN f32 select_eq(u32 a, u32 b, f32 x, f32 y) {
  return _mm256_blendv_ps(y, x, _mm256_castsi256_ps(_mm256_cmpeq_epi32(a, b)));
}
LOWBIT_FN f32 permute(f32 x, u32 index) { return _mm256_permutevar8x32_ps(x, index); }

struct Table16 {
  f32 low, high;
};
LOWBIT_FN Table16 table16(const float* p) { return {load(p), load(p + 8)}; }
// Bit 3 of the index, moved to the sign, chooses the half.
LOWBIT_FN f32 lookup(Table16 t, u32 index) {
  return _mm256_blendv_ps(_mm256_permutevar8x32_ps(t.low, index),
                          _mm256_permutevar8x32_ps(t.high, index), as_f32(shl<28>(index)));
}

// Two 128-bit halves of four windows each, spread by a byte shuffle.
template <int bits, int count>
inline constexpr int kReach = (4 * count * bits) / 8 + 16;

template <int bits, int count>
LOWBIT_FN u32 windows(const uint8_t* p) {
  if constexpr (bits * count == 32) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  } else {
    constexpr int width = bits * count;
    alignas(32) static constexpr auto index = [] {
      struct {
        uint8_t byte[32];
        int32_t shift[8];
      } t{};
      for (int i = 0; i < 8; i++) {
        const int part = i / 4 * 4 * width / 8;
        for (int b = 0; b < 4; b++) t.byte[4 * i + b] = uint8_t(i * width / 8 - part + b);
        t.shift[i] = i * width % 8;
      }
      return t;
    }();
    __m256i v = _mm256_castsi128_si256(load128(p));
    v = _mm256_inserti128_si256(v, load128(p + width / 2), 1);
    v = _mm256_shuffle_epi8(v, _mm256_load_si256(reinterpret_cast<const __m256i*>(index.byte)));
    if constexpr (width % 8 != 0)
      v = _mm256_srlv_epi32(v,
                            _mm256_load_si256(reinterpret_cast<const __m256i*>(index.shift)));
    return v;
  }
}

LOWBIT_END
