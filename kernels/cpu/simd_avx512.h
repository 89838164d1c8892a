// AVX-512 (F, BW, DQ, VL): sixteen lanes.
#pragma once

#include <immintrin.h>

LOWBIT_BEGIN

constexpr int kLanes = 16;
using f32 = __m512;
using u32 = __m512i;

LOWBIT_FN f32 zero() { return _mm512_setzero_ps(); }
LOWBIT_FN f32 splat(float x) { return _mm512_set1_ps(x); }
LOWBIT_FN u32 splat_u(uint32_t x) { return _mm512_set1_epi32(int(x)); }
LOWBIT_FN f32 load(const float* p) { return _mm512_loadu_ps(p); }
LOWBIT_FN u32 load(const uint32_t* p) { return _mm512_loadu_si512(p); }
LOWBIT_FN f32 load(const bf16* p) {
  const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
}
LOWBIT_FN f32 load(const f16* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
LOWBIT_FN u32 load_bytes(const uint8_t* p) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
LOWBIT_FN void store(float* p, f32 x) { _mm512_storeu_ps(p, x); }
LOWBIT_FN void store(f16* p, f32 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, 0));
}
LOWBIT_FN void store(bf16* p, f32 x) {
  const u32 b = _mm512_castps_si512(x);
  const u32 odd = _mm512_and_si512(_mm512_srli_epi32(b, 16), splat_u(1));
  u32 r = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(b, splat_u(0x7fff)), odd), 16);
  r = _mm512_mask_mov_epi32(r, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), splat_u(0x7fc0));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(r));
}
LOWBIT_FN f32 add(f32 a, f32 b) { return _mm512_add_ps(a, b); }
LOWBIT_FN f32 mul(f32 a, f32 b) { return _mm512_mul_ps(a, b); }
LOWBIT_FN f32 fma(f32 a, f32 b, f32 c) { return _mm512_fmadd_ps(a, b, c); }
LOWBIT_FN float reduce(f32 x) { return _mm512_reduce_add_ps(x); }
LOWBIT_FN u32 as_u32(f32 x) { return _mm512_castps_si512(x); }
LOWBIT_FN f32 as_f32(u32 x) { return _mm512_castsi512_ps(x); }
LOWBIT_FN f32 from_int(u32 x) { return _mm512_cvtepi32_ps(x); }
template <int n>
LOWBIT_FN u32 shl(u32 x) {
  return _mm512_slli_epi32(x, n);
}
template <int n>
LOWBIT_FN u32 shr(u32 x) {
  return _mm512_srli_epi32(x, n);
}
template <int n>
LOWBIT_FN u32 sra(u32 x) {
  return _mm512_srai_epi32(x, n);
}
LOWBIT_FN u32 add(u32 a, u32 b) { return _mm512_add_epi32(a, b); }
LOWBIT_FN u32 bit_and(u32 a, u32 b) { return _mm512_and_si512(a, b); }
LOWBIT_FN u32 bit_or(u32 a, u32 b) { return _mm512_or_si512(a, b); }
LOWBIT_FN u32 bit_xor(u32 a, u32 b) { return _mm512_xor_si512(a, b); }
LOWBIT_FN f32 select_eq(u32 a, u32 b, f32 x, f32 y) {
  return _mm512_mask_mov_ps(y, _mm512_cmpeq_epi32_mask(a, b), x);
}
LOWBIT_FN f32 permute(f32 x, u32 index) { return _mm512_permutexvar_ps(index, x); }

using Table16 = __m512;
LOWBIT_FN Table16 table16(const float* p) { return _mm512_loadu_ps(p); }
LOWBIT_FN f32 lookup(Table16 t, u32 index) { return _mm512_permutexvar_ps(index, t); }

// With VBMI one byte permutation spreads the 2 * width bytes that sixteen windows cover;
// without, four 128-bit parts of four windows each are loaded and shuffled.
#if defined(__AVX512VBMI__)
template <int bits, int count>
inline constexpr int kReach = 2 * bits * count;
#else
template <int bits, int count>
inline constexpr int kReach = (12 * count * bits) / 8 + 16;
#endif

template <int bits, int count>
LOWBIT_FN u32 windows(const uint8_t* p) {
  if constexpr (bits * count == 32) {
    return _mm512_loadu_si512(p);
  } else {
#if defined(__AVX512VBMI__)
    constexpr int span = 16;
#else
    constexpr int span = 4;
#endif
    constexpr int width = bits * count;
    alignas(64) static constexpr auto index = [] {
      struct {
        uint8_t byte[64];
        int32_t shift[16];
      } t{};
      for (int i = 0; i < 16; i++) {
        const int part = i / span * span * width / 8;
        for (int b = 0; b < 4; b++) t.byte[4 * i + b] = uint8_t(i * width / 8 - part + b);
        t.shift[i] = i * width % 8;
      }
      return t;
    }();
    const __m512i bytes = _mm512_load_si512(index.byte);
#if defined(__AVX512VBMI__)
    constexpr uint64_t covered = (uint64_t(1) << (2 * width)) - 1;
    __m512i v = _mm512_permutexvar_epi8(bytes, _mm512_maskz_loadu_epi8(covered, p));
#else
    const auto part = [&](int i) {
      return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i * width / 2));
    };
    __m512i v = _mm512_castsi128_si512(part(0));
    v = _mm512_inserti32x4(v, part(1), 1);
    v = _mm512_inserti32x4(v, part(2), 2);
    v = _mm512_inserti32x4(v, part(3), 3);
    v = _mm512_shuffle_epi8(v, bytes);
#endif
    if constexpr (width % 8 != 0) v = _mm512_srlv_epi32(v, _mm512_loadu_si512(index.shift));
    return v;
  }
}

LOWBIT_END
