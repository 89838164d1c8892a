// Packed codes to tensor-core operands, in the order in which they are stored.
//
// A product sums over k, so its order is free: of `join` blocks of 32 codes of a row that lie
// next to each other, lane c of a quad (c = lane % 4) takes the 8 * join consecutive codes from
// 8 * join * c on. Eight of them are the 4 pairs of k that fragment a of two mma.m16n8k16 wants
// from it. x is put into the same order (`order`) when it is staged. No weight is repacked, and
// each lane's codes are a few whole words.
#pragma once

#include <type_traits>

#include "../formats/affine.h"
#include "../formats/mxfp4.h"
#include "../formats/mxfp8.h"
#include "../formats/nvfp4.h"
#include "e4m3.cuh"
#include "half.h"
#include "pair_order.h"

namespace lowbit::cuda {

__device__ __forceinline__ uint32_t load_shared(uint32_t address) {
  uint32_t v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address));
  return v;
}
__device__ __forceinline__ uint2 load_shared2(uint32_t address) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address));
  return v;
}
__device__ __forceinline__ uint4 load_shared4(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address));
  return v;
}

template <uint32_t mask, uint32_t set>
__device__ __forceinline__ uint32_t mask_or(uint32_t a) {
  uint32_t r;  // (a & mask) | set
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(r) : "r"(a), "n"(mask), "n"(set));
  return r;
}
template <int left>
__device__ __forceinline__ uint32_t shift(uint32_t a) {
  if constexpr (left >= 0)
    return a << left;
  else
    return a >> -left;
}

// (a & mask) | (b & ~mask)
template <uint32_t mask>
__device__ __forceinline__ uint32_t select_bits(uint32_t a, uint32_t b) {
  uint32_t r;
  asm("lop3.b32 %0, %1, %2, %3, 0xE4;" : "=r"(r) : "r"(a), "r"(b), "n"(mask));
  return r;
}

// Where lane c of a quad finds its codes in `join` blocks of 32, each of 4 * B bytes.
template <int B, int join>
class LaneAt {
 public:
  __device__ explicit LaneAt(int c)
      : offset_(B == 8 ? 8 * c : 8 * B * c / 32 * 4), shift_(8 * B * c % 32) {}

  // Eight codes as a little-endian stream from bit 0 on. Reads up to 4 bytes past the block.
  __device__ __forceinline__ void load(uint32_t block, uint2 (&codes)[join]) const {
    static_assert(join == 1);
    const uint32_t at = block + offset_;
    if constexpr (B == 8) {
      codes[0] = load_shared2(at);
    } else {
      const uint32_t low = load_shared(at);
      codes[0] = {B == 4 ? low : low >> shift_, 0};
      if constexpr (B != 4 && B != 2) {
        const uint32_t high = load_shared(at + 4);
        codes[0] = {__funnelshift_r(low, high, shift_), B == 3 ? 0 : high >> shift_};
      }
    }
  }

 private:
  uint32_t offset_, shift_;
};

// Sixteen codes of 2, 4, 6 or 8 bits are whole words.
template <int B>
class LaneAt<B, 2> {
  static_assert(B % 2 == 0);

 public:
  __device__ explicit LaneAt(int c) : offset_(2 * B * c) {}

  __device__ __forceinline__ void load(uint32_t block, uint2 (&codes)[2]) const {
    const uint32_t at = block + offset_;
    if constexpr (B == 2) {
      const uint32_t v = load_shared(at);
      codes[0] = {v, 0}, codes[1] = {v >> 16, 0};
    } else if constexpr (B == 4) {
      const uint2 v = load_shared2(at);
      codes[0] = {v.x, 0}, codes[1] = {v.y, 0};
    } else if constexpr (B == 6) {
      const uint32_t v[3] = {load_shared(at), load_shared(at + 4), load_shared(at + 8)};
      codes[0] = {v[0], v[1]}, codes[1] = {__funnelshift_r(v[1], v[2], 16), v[2] >> 16};
    } else {
      const uint4 v = load_shared4(at);
      codes[0] = {v.x, v.y}, codes[1] = {v.z, v.w};
    }
  }

 private:
  uint32_t offset_;
};

// Sixteen codes of 3 bits are 6 bytes, b0 to b5: a word of a lane's own, and half of one
// between two lanes. Bytes 0, 1, 3, 4 have codes 0 to 3 in the low half of a word and 8 to 11
// in the high one, and bytes 1, 2, 4, 5 have 4 to 7 and 12 to 15, four bits up in both: pairs
// of codes as they are, though across two blocks.
template <>
class LaneAt<3, 2> {
 public:
  __device__ explicit LaneAt(int c)
      : own_(c / 2 * 12 + c % 2 * 8),
        shared_(c / 2 * 12 + 4),
        first_(c % 2 ? 0x2176 : 0x4310),
        second_(c % 2 ? 0x3207 : 0x5421) {}

  __device__ __forceinline__ void load(uint32_t block, uint2 (&codes)[2]) const {
    const uint32_t own = load_shared(block + own_), shared = load_shared(block + shared_);
    codes[0] = {__byte_perm(own, shared, first_), 0};
    codes[1] = {__byte_perm(own, shared, second_), 0};
  }

 private:
  uint32_t own_, shared_, first_, second_;
};

// Scales of two groups beside each other, from two bytes.
template <class Scale>
__device__ __forceinline__ float2 two_scales(uint32_t bytes) {
  if constexpr (std::is_same_v<Scale, E4m3>) return decode_e4m3(bytes);
  return {Scale::decode(bytes & 0xffu), Scale::decode(bytes >> 8)};
}

// Codes that lie 16 bits apart and become a pair of elements of T where they are moved to:
// 2^kLift times too small. pair(w, i): pair i of kInWord of a word.
template <class Code, class T>
struct MovedPairs;

template <class T>
struct MovedPairs<E2m1, T> {
  static constexpr int kLift = Half<T>::kLiftE2m1, kInWord = 4;
  static constexpr int kAt = Half<T>::kMantissaBits - 1;  // of a code's mantissa bit

  static __device__ __forceinline__ uint32_t pair(uint32_t w, int i) {
    const uint32_t v = w >> i / 2 * 8;
    return i % 2 ? pair<1>(v) : pair<0>(v);
  }

 private:
  // Codes p and p + 4 of v, p of 0 and 1. Where a code's exponent and mantissa do not reach its
  // sign's place, one product has two copies of it, each as far up as one of them wants.
  template <int p>
  static __device__ __forceinline__ uint32_t pair(uint32_t v) {
    constexpr uint32_t kBits = (7u << kAt | 0x8000u) * 0x10001u, kCode = 15u << (4 * p);
    if constexpr (kAt + 4 <= 12) {
      return (v & kCode * 0x10001u) * ((1u << kAt | 1u << 12) >> (4 * p)) & kBits;
    } else {
      const uint32_t sign = shift<12 - 4 * p>(v) & 0x80008000u;
      return (shift<kAt - 4 * p>(v) & (kBits & ~0x80008000u)) | sign;
    }
  }
};

// NaN codes become 480.
template <class T>
struct MovedPairs<E4m3, T> {
  static constexpr int kLift = Half<T>::kLiftE4m3, kInWord = 2;

  static __device__ __forceinline__ uint32_t pair(uint32_t w, int i) {
    return i % 2 ? pair<0>(w) : pair<8>(w);
  }

 private:
  // Bytes 0 and 2 of w (at = 8), or 1 and 3 (at = 0), moved up by `at` bits.
  template <int at>
  static __device__ __forceinline__ uint32_t pair(uint32_t w) {
    constexpr int kDown = 11 - Half<T>::kMantissaBits;  // from bit 8 to the lowest of mmm
    constexpr uint32_t kBits = 0x7fu << (8 - kDown);
    return (shift<at - kDown>(w) & (kBits | kBits << 16)) | (shift<at>(w) & 0x80008000u);
  }
};

// Four pairs of elements of T for 8 codes, on kPlanes planes. With e the elements of pair p,
//   value of a code = 2^kLift * (e[plane 0] + 16 * e[plane 1]) / 2^place(p) - kOffset /
//   2^place(p)
// and x of the pair is staged times 2^(kTop - place(p)).
template <class Code, class T, int join>
struct LaneCodes;

// What is the same for codes that stay where their pair says.
struct LaneCodesInPlace {
  static constexpr int kTop = 0;
  static constexpr bool kNan = false;
  static constexpr bool kAcross = false;
  static constexpr __device__ int place(int) { return 0; }
};

template <int B, class T, int join>
struct LaneCodes<Unsigned<B>, T, join> {
  static constexpr int kMantissa = Half<T>::kMantissaBits;
  static constexpr bool kSplit = B > kMantissa;  // into nibbles, a plane each
  static constexpr int kPlanes = kSplit ? 2 : 1, kLift = 0;
  static constexpr bool kNan = false;
  static constexpr float kOffset = Half<T>::kOffset * (kSplit ? 17 : 1);
  // Codes beside each other that fit into the mantissa need no shift of their own. (float16 has
  // no room in its exponent for x to make up for that.)
  static constexpr int kInPlace = B <= 4 && Half<T>::kWide ? kMantissa / B : 1;
  static constexpr int kTop = B * (kInPlace - 1);
  // Pair p of block j is codes 4j + p and 8 + 4j + p of the lane's sixteen.
  static constexpr bool kAcross = B == 3 && join == 2;
  static constexpr __device__ int place(int p) { return p % kInPlace * B; }
  static constexpr __device__ int order(int i) { return pair_order(i, B); }

  template <int block>
  static __device__ __forceinline__ void pairs(uint2 v, uint32_t (&out)[kPlanes][4]) {
    constexpr uint32_t kMask = kSplit ? 15 : (1u << B) - 1, kBoth = kMask | kMask << 16;
    constexpr uint32_t kMagic = Half<T>::kMagic;
    if constexpr (B == 8) {
#pragma unroll
      for (int plane = 0; plane < kPlanes; plane++) {
        out[plane][0] = mask_or<kBoth, kMagic>(v.x >> (4 * plane));
        out[plane][1] = mask_or<kBoth, kMagic>(v.x >> (4 * plane + 8));
        out[plane][2] = mask_or<kBoth, kMagic>(v.y >> (4 * plane));
        out[plane][3] = mask_or<kBoth, kMagic>(v.y >> (4 * plane + 8));
      }
    } else if constexpr (B <= 4) {
      uint32_t u = v.x;
      if constexpr (B < 4 && !kAcross) u = select_bits<0xffffu>(u, u << (16 - 4 * B));
      constexpr int kFrom = kAcross ? 4 * block : 0;
      out[0][0] = pair<0, kFrom>(u), out[0][1] = pair<1, kFrom>(u);
      out[0][2] = pair<2, kFrom>(u), out[0][3] = pair<3, kFrom>(u);
    } else {
      const uint32_t high = __funnelshift_r(v.x, v.y, 4 * B);
#pragma unroll
      for (int p = 0; p < 4; p++)
        out[0][p] = (((v.x >> (B * p)) & kMask) | ((high >> (B * p)) & kMask) << 16) | kMagic;
    }
  }

 private:
  template <int p, int from>
  static __device__ __forceinline__ uint32_t pair(uint32_t u) {
    constexpr uint32_t kMask = (1u << B) - 1, kBoth = kMask | kMask << 16;
    return mask_or<(kBoth << place(p)), Half<T>::kMagic>(u >> (from + B * p - place(p)));
  }
};

template <class T, int join>
struct LaneCodes<E2m1, T, join> : LaneCodesInPlace {
  using Moved = MovedPairs<E2m1, T>;
  static constexpr int kPlanes = 1, kLift = Moved::kLift;
  static constexpr float kOffset = 0.0f;
  static constexpr __device__ int order(int i) { return pair_order(i, 4); }

  template <int block>
  static __device__ __forceinline__ void pairs(uint2 v, uint32_t (&out)[1][4]) {
#pragma unroll
    for (int p = 0; p < 4; p++) out[0][p] = Moved::pair(v.x, p);
  }
};

// As float16 alone: exact, and an instruction for two where there is one.
template <int join>
struct LaneCodes<E4m3, f16, join> : LaneCodesInPlace {
  static constexpr int kPlanes = 1;
  static constexpr float kOffset = 0.0f;
#if __CUDA_ARCH__ >= 890
  static constexpr int kLift = 0;
  static constexpr __device__ int order(int i) { return i; }

  // NaN stays NaN.
  template <int block>
  static __device__ __forceinline__ void pairs(uint2 v, uint32_t (&out)[1][4]) {
    const uint32_t words[2] = {v.x, v.y};
#pragma unroll
    for (int i = 0; i < 2; i++)
      asm("{ .reg .b16 low, high;\n"
          "  mov.b32 {low, high}, %2;\n"
          "  cvt.rn.f16x2.e4m3x2 %0, low;\n"
          "  cvt.rn.f16x2.e4m3x2 %1, high; }"
          : "=r"(out[0][2 * i]), "=r"(out[0][2 * i + 1])
          : "r"(words[i]));
  }
#else
  using Moved = MovedPairs<E4m3, f16>;
  static constexpr int kLift = Moved::kLift;
  static constexpr __device__ int order(int i) { return pair_order(i, 8); }

  template <int block>
  static __device__ __forceinline__ void pairs(uint2 v, uint32_t (&out)[1][4]) {
#pragma unroll
    for (int p = 0; p < 4; p++) out[0][p] = Moved::pair(p < 2 ? v.x : v.y, p % 2);
  }
  // 0x7f and 0xff are NaN. Of `met` and these codes, some of kNans if any was.
  static constexpr bool kNan = true;
  static constexpr uint32_t kNans = 0x80808080u;
  static __device__ __forceinline__ uint32_t nans(uint2 v, uint32_t met) {
    return met | ((v.x & ~kNans) + 0x01010101u) | ((v.y & ~kNans) + 0x01010101u);
  }
#endif
};

}  // namespace lowbit::cuda
