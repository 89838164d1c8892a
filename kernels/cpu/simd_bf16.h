// AVX-512 BF16 and VBMI: pairs of bfloat16 multiplied and summed into float32 lanes. Products
// of two bfloat16 are exact in float32; denormal bfloat16 operands are read as zero.
#pragma once

#include "simd.h"

LOWBIT_BEGIN

using pairs = __m512i;  // 32 bfloat16: lane i of a float32 vector owns elements 2i and 2i+1

LOWBIT_FN pairs load_pairs(const bf16* p) { return _mm512_loadu_si512(p); }
LOWBIT_FN pairs splat_pair(const bf16* p) {
  uint32_t word;
  std::memcpy(&word, p, 4);
  return _mm512_set1_epi32(int(word));
}
LOWBIT_FN f32 dot(pairs a, pairs b, f32 c) {
  return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b);
}
// Rounds 32 floats to bfloat16, to nearest even.
LOWBIT_FN pairs round_pairs(f32 low, f32 high) { return (pairs)_mm512_cvtne2ps_pbh(high, low); }

// 16-bit element i: the window of `width` bits that begins at bit i*width of p. What lies above
// is left in place.
template <int width>
LOWBIT_FN pairs windows16(const uint8_t* p) {
  if constexpr (width == 16) {
    return _mm512_loadu_si512(p);
  } else {
    alignas(64) static constexpr auto index = [] {
      struct {
        uint8_t byte[64];
        uint16_t shift[32];
      } t{};
      for (int i = 0; i < 32; i++) {
        for (int b = 0; b < 2; b++) t.byte[2 * i + b] = uint8_t(i * width / 8 + b);
        t.shift[i] = uint16_t(i * width % 8);
      }
      return t;
    }();
    constexpr uint64_t covered = (uint64_t(1) << (4 * width)) - 1;
    const __m512i bytes = _mm512_maskz_loadu_epi8(covered, p);
    pairs v = _mm512_permutexvar_epi8(_mm512_load_si512(index.byte), bytes);
    if constexpr (width % 8 != 0) v = _mm512_srlv_epi16(v, _mm512_load_si512(index.shift));
    return v;
  }
}
template <int n>
LOWBIT_FN pairs shr16(pairs x) {
  return _mm512_srli_epi16(x, n);
}

// 32 bfloat16 looked up by the low five bits of each 16-bit element.
LOWBIT_FN pairs lookup32(pairs table, pairs index) {
  return _mm512_permutexvar_epi16(index, table);
}

// 128 bfloat16 looked up by the low seven bits of each byte, as low and high bytes; bit 7 of
// `sign` becomes the sign.
struct Table128 {
  __m512i low[2], high[2];
};
LOWBIT_FN Table128 table128(const uint8_t* low, const uint8_t* high) {
  return {{_mm512_loadu_si512(low), _mm512_loadu_si512(low + 64)},
          {_mm512_loadu_si512(high), _mm512_loadu_si512(high + 64)}};
}
struct PairOfPairs {
  pairs first, second;
};
// first: bytes 0-7 of each 16-byte part of `index`, second: bytes 8-15.
LOWBIT_FN PairOfPairs lookup128(const Table128& t, __m512i index, __m512i sign) {
  const __m512i low = _mm512_permutex2var_epi8(t.low[0], index, t.low[1]);
  const __m512i high = _mm512_permutex2var_epi8(t.high[0], index, t.high[1]);
  // high | (sign & 0x80)
  const __m512i top = _mm512_ternarylogic_epi32(high, sign, _mm512_set1_epi8(-128), 0xf8);
  return {_mm512_unpacklo_epi8(low, top), _mm512_unpackhi_epi8(low, top)};
}

LOWBIT_END
