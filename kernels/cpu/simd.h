// One vector vocabulary for all instruction sets. A target's header defines, in the target's
// own namespace:
//
//   kLanes                      float32 lanes of a vector
//   f32, u32                    vectors of kLanes floats, kLanes 32-bit words
//   zero splat load store       (load and store also convert bfloat16 and float16)
//   add mul fma(a,b,c)=a*b+c reduce
//   shl<n> shr<n> sra<n> bit_and bit_or bit_xor splat_u as_f32 as_u32 from_int
//   select_eq(a, b, x, y)       lane by lane: a == b ? x : y
//   permute(x, index)           lane i takes x[index[i]]
//   Table16, table16(p)         16 floats, looked up by the low four bits of each word
//   windows<bits, count>(p)     lane i: the 32-bit word that begins at bit i*count*bits of p;
//                               what lies above count*bits is left in place
//                               (four-lane targets take the bit to start at as a third
//                               argument)
//   kReach<bits, count>         bytes from p that `windows` may read
//
// avx512bf16 and amx add bfloat16 pairs (simd_bf16.h), amx adds tiles (simd_amx.h).
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "../formats/prelude.h"

LOWBIT_BEGIN

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

LOWBIT_FN float to_float(float x) { return x; }
LOWBIT_FN float to_float(bf16 x) { return from_bits(uint32_t(x.bits) << 16); }
LOWBIT_FN float to_float(f16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, low = x.bits & 0x7fff;
  if (low >= 0x7c00) return from_bits(sign | 0x7f800000 | (low & 0x3ff) << 13);
  // 2^112 rebases the exponent; subnormals come out exactly, as float32 normals.
  return from_bits(sign | to_bits(from_bits(low << 13) * 0x1p112f));
}

template <class T>
LOWBIT_FN T from_float(float x);
template <>
LOWBIT_FN float from_float<float>(float x) {
  return x;
}
template <>
LOWBIT_FN bf16 from_float<bf16>(float x) {
  const uint32_t b = to_bits(x), rounded = (b + 0x7fff + (b >> 16 & 1)) >> 16;
  return {uint16_t((b & 0x7fffffff) > 0x7f800000 ? (b >> 16 | 0x40) : rounded)};
}
template <>
LOWBIT_FN f16 from_float<f16>(float x) {
  // Selects, not branches, so that loops over it vectorize.
  const uint32_t b = to_bits(x), sign = b >> 16 & 0x8000, a = b & 0x7fffffff;
  // Below 2^-14 the sum with 2^-1 leaves the subnormal's bits; above, round and rebase.
  const uint32_t subnormal = to_bits(from_bits(a) + 0.5f) - to_bits(0.5f);
  uint32_t half = (a + 0xfff + (a >> 13 & 1) - (112u << 23)) >> 13;
  half = a < 0x38800000 ? subnormal : half;
  half = a >= 0x477ff000 ? 0x7c00 : half;
  half = a > 0x7f800000 ? 0x7e00 : half;
  return {uint16_t(sign | half)};
}

LOWBIT_END

#if defined(LOWBIT_PLAIN)
#include "simd_generic.h"
#elif defined(__AVX512BW__)
#include "simd_avx512.h"
#elif defined(__AVX2__)
#include "simd_avx2.h"
#elif defined(__ARM_NEON)
#include "simd_neon.h"
#else
#error "a target without instruction set: define LOWBIT_PLAIN"
#endif
