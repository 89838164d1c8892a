// The element types that formats are made of. Values in, values out: `decode` takes one code
// (or scale byte) in the low bits of a word, `encode` gives one back. No pointers, so no
// address spaces, so one text serves C++, CUDA and Metal.
//
//   type         bits  values
//   Unsigned<B>  B     0 .. 2^B-1
//   E2m1         4     sign, +-{0 .5 1 1.5 2 3 4 6}; no infinity, no NaN
//   E4m3         8     sign, 4 exponent bits (bias 7), 3 mantissa bits; 0x7f and 0xff are NaN;
//   max 448 E8m0         8     2^(byte-127); byte 0 is 2^-127, byte 255 is +inf as in MLX (NaN
//   in OCP MX)
#pragma once

#include "prelude.h"

LOWBIT_BEGIN

template <int B>
struct Unsigned {
  static constexpr int kBits = B;
  static LOWBIT_FN float decode(uint32 code) { return float(code); }
};

struct E2m1 {
  static constexpr int kBits = 4;
  static constexpr float kMax = 6.0f;
  // Subnormal step and normal step are both half of the implicit one's place: exponent e and
  // mantissa m give (2+m) * 2^(e-2), and m/2 when e is 0.
  static LOWBIT_FN float decode(uint32 code) {
    const uint32 exponent = (code >> 1) & 3u, mantissa = code & 1u;
    const float normal = from_bits(((exponent + 126u) << 23) | (mantissa << 22));
    const float value = exponent == 0u ? 0.5f * float(mantissa) : normal;
    return (code & 8u) ? -value : value;
  }
  // Nearest value; a tie goes to the smaller magnitude (0.75 to 0.5), and what rounds to zero
  // is +0: the rule of mx.quantize on the CPU. It is not IEEE's ties-to-even.
  static LOWBIT_FN uint32 encode(float x) {
    const float a = magnitude(x);
    const uint32 code = uint32(a > 0.25f) + uint32(a > 0.75f) + uint32(a > 1.25f) +
                        uint32(a > 1.75f) + uint32(a > 2.5f) + uint32(a > 3.5f) +
                        uint32(a > 5.0f);
    return code | ((x < 0.0f && code != 0u) ? 8u : 0u);
  }
  // The rule of mx.quantize on a GPU: ties to the even code, the sign of what rounds to zero is
  // kept, and NaN passes every threshold.
  static LOWBIT_FN uint32 encode_to_even(float x) {
    const float a = magnitude(x);
    const uint32 code = uint32(!(a <= 0.25f)) + uint32(!(a < 0.75f)) + uint32(!(a <= 1.25f)) +
                        uint32(!(a < 1.75f)) + uint32(!(a <= 2.5f)) + uint32(!(a < 3.5f)) +
                        uint32(!(a <= 5.0f));
    return code | (to_bits(x) >> 28 & 8u);
  }
};

struct E4m3 {
  static constexpr int kBits = 8;
  static constexpr float kMax = 448.0f;
  // With the exponent rebased by 120, a normal code is its own float32; a subnormal one comes
  // out as 2^-7 + m * 2^-10 where m * 2^-9 is meant.
  static LOWBIT_FN float decode(uint32 code) {
    const uint32 low = code & 0x7fu;
    const float rebased = from_bits((low << 20) + (120u << 23));
    float value = low < 8u ? (rebased - 0.0078125f) * 2.0f : rebased;
    value = low == 0x7fu ? from_bits(0x7fc00000u) : value;
    return (code & 0x80u) ? -value : value;
  }
  // Round to nearest even. Beyond 448 the codes saturate at 0x7e; NaN gives 0x7f.
  static LOWBIT_FN uint32 encode(float x) {
    const uint32 bits = to_bits(x), sign = (bits >> 24) & 0x80u, a = bits & 0x7fffffffu;
    // Normal: add half of the 20 dropped bits (and the odd bit, for ties), rebase the exponent.
    const uint32 normal = (a + 0x7ffffu + ((a >> 20) & 1u) - (120u << 23)) >> 20;
    // Subnormal, below 2^-6: adding 2^14 leaves multiples of 2^-9 in the low mantissa bits.
    const uint32 subnormal = to_bits(from_bits(a) + 16384.0f) - to_bits(16384.0f);
    uint32 code = a < to_bits(0.015625f) ? subnormal : normal;
    code = a >= to_bits(464.0f) ? 0x7eu : code;
    code = a > 0x7f800000u ? 0x7fu : code;
    return sign | code;
  }
};

struct E8m0 {
  static constexpr int kBits = 8;
  static LOWBIT_FN float decode(uint32 byte) {
    return byte == 0u ? from_bits(0x00400000u) : from_bits(byte << 23);
  }
  // The smallest power of two that is not below x >= 0: rounding the exponent up keeps the
  // largest element of a group within the element type's range. Zero gives 2^0. Below 2^-127
  // the byte stays 0 (mx.quantize wraps round to 255 there, which decodes to infinity).
  static LOWBIT_FN uint32 encode_up(float x) {
    const uint32 bits = to_bits(x);
    const uint32 exponent = (bits >> 23) + uint32((bits & 0x7fffffu) != 0u);
    return bits == 0u ? 127u : bits <= 0x00400000u ? 0u : exponent;
  }
};

LOWBIT_END
