// Arm NEON (AArch64): four lanes.
#pragma once

#include <arm_neon.h>

LOWBIT_BEGIN

constexpr int kLanes = 4;
using f32 = float32x4_t;
using u32 = uint32x4_t;

LOWBIT_FN f32 zero() { return vdupq_n_f32(0.0f); }
LOWBIT_FN f32 splat(float x) { return vdupq_n_f32(x); }
LOWBIT_FN u32 splat_u(uint32_t x) { return vdupq_n_u32(x); }
LOWBIT_FN f32 load(const float* p) { return vld1q_f32(p); }
LOWBIT_FN u32 load(const uint32_t* p) { return vld1q_u32(p); }
LOWBIT_FN f32 load(const bf16* p) {
  return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(&p->bits), 16));
}
LOWBIT_FN f32 load(const f16* p) {
  return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&p->bits)));
}
LOWBIT_FN u32 load_bytes(const uint8_t* p) {
  uint32_t word;
  std::memcpy(&word, p, 4);
  return vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(word))));
}
LOWBIT_FN void store(float* p, f32 x) { vst1q_f32(p, x); }
LOWBIT_FN void store(f16* p, f32 x) {
  vst1_u16(&p->bits, vreinterpret_u16_f16(vcvt_f16_f32(x)));
}
LOWBIT_FN void store(bf16* p, f32 x) {
  const u32 b = vreinterpretq_u32_f32(x);
  const u32 odd = vandq_u32(vshrq_n_u32(b, 16), vdupq_n_u32(1));
  const u32 r = vshrq_n_u32(vaddq_u32(vaddq_u32(b, vdupq_n_u32(0x7fff)), odd), 16);
  vst1_u16(&p->bits, vmovn_u32(vbslq_u32(vceqq_f32(x, x), r, vdupq_n_u32(0x7fc0))));
}
LOWBIT_FN f32 add(f32 a, f32 b) { return vaddq_f32(a, b); }
LOWBIT_FN f32 mul(f32 a, f32 b) { return vmulq_f32(a, b); }
LOWBIT_FN f32 fma(f32 a, f32 b, f32 c) { return vfmaq_f32(c, a, b); }
LOWBIT_FN float reduce(f32 x) { return vaddvq_f32(x); }
LOWBIT_FN u32 as_u32(f32 x) { return vreinterpretq_u32_f32(x); }
LOWBIT_FN f32 as_f32(u32 x) { return vreinterpretq_f32_u32(x); }
LOWBIT_FN f32 from_int(u32 x) { return vcvtq_f32_s32(vreinterpretq_s32_u32(x)); }
// Shifts by zero are not encodable as immediates.
template <int n>
LOWBIT_FN u32 shl(u32 x) {
  return vshlq_u32(x, vdupq_n_s32(n));
}
template <int n>
LOWBIT_FN u32 shr(u32 x) {
  return vshlq_u32(x, vdupq_n_s32(-n));
}
template <int n>
LOWBIT_FN u32 sra(u32 x) {
  return vreinterpretq_u32_s32(vshlq_s32(vreinterpretq_s32_u32(x), vdupq_n_s32(-n)));
}
LOWBIT_FN u32 add(u32 a, u32 b) { return vaddq_u32(a, b); }
LOWBIT_FN u32 bit_and(u32 a, u32 b) { return vandq_u32(a, b); }
LOWBIT_FN u32 bit_or(u32 a, u32 b) { return vorrq_u32(a, b); }
LOWBIT_FN u32 bit_xor(u32 a, u32 b) { return veorq_u32(a, b); }
LOWBIT_FN f32 select_eq(u32 a, u32 b, f32 x, f32 y) { return vbslq_f32(vceqq_u32(a, b), x, y); }

// A word index i becomes the byte indices 4i, 4i+1, 4i+2, 4i+3.
LOWBIT_FN uint8x16_t byte_index(u32 index) {
  return vreinterpretq_u8_u32(
      vmlaq_u32(vdupq_n_u32(0x03020100), index, vdupq_n_u32(0x04040404)));
}
LOWBIT_FN f32 permute(f32 x, u32 index) {
  return vreinterpretq_f32_u8(vqtbl1q_u8(vreinterpretq_u8_f32(x), byte_index(index)));
}

using Table16 = uint8x16x4_t;
LOWBIT_FN Table16 table16(const float* p) {
  return vld1q_u8_x4(reinterpret_cast<const uint8_t*>(p));
}
LOWBIT_FN f32 lookup(Table16 t, u32 index) {
  return vreinterpretq_f32_u8(vqtbl4q_u8(t, byte_index(vandq_u32(index, vdupq_n_u32(15)))));
}

template <int bits, int count>
inline constexpr int kReach = 16;

template <int bits, int count, int start = 0>
LOWBIT_FN u32 windows(const uint8_t* p) {
  constexpr int width = bits * count;
  alignas(16) static constexpr auto index = [] {
    struct {
      uint8_t byte[16];
      int32_t shift[4];
    } t{};
    for (int i = 0; i < 4; i++) {
      for (int b = 0; b < 4; b++) t.byte[4 * i + b] = uint8_t((i * width + start) / 8 + b);
      t.shift[i] = -((i * width + start) % 8);
    }
    return t;
  }();
  u32 v = vreinterpretq_u32_u8(vqtbl1q_u8(vld1q_u8(p), vld1q_u8(index.byte)));
  if constexpr ((width | start) % 8 != 0) v = vshlq_u32(v, vld1q_s32(index.shift));
  return v;
}

LOWBIT_END
