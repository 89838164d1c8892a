// Packed codes to tensor-core operands, in the order in which they are stored.
//
// A product sums over k, so its order is free: in each block of 32 codes of a row, lane c of a
// quad (c = lane % 4) takes the 8 consecutive codes from 8c on and calls them the 4 pairs of k
// that fragment a of two mma.m16n8k16 wants from it. x is put into the same order (`order`)
// when it is staged. No weight is repacked, and each lane's codes are one or two whole words.
#pragma once

#include "../formats/affine.h"
#include "../formats/mxfp4.h"
#include "../formats/mxfp8.h"
#include "../formats/nvfp4.h"
#include "half.h"

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

// Where lane c of a quad finds its 8 codes in a block of 32, which is 4 * B bytes.
template <int B>
class LaneAt {
 public:
  __device__ explicit LaneAt(int c)
      : offset_(B == 8 ? 8 * c : 8 * B * c / 32 * 4), shift_(8 * B * c % 32) {}

  // The 8 codes as a little-endian stream from bit 0 on. Reads up to 4 bytes past the block.
  __device__ __forceinline__ uint2 load(uint32_t block) const {
    const uint32_t at = block + offset_;
    if constexpr (B == 8) return load_shared2(at);
    const uint32_t low = load_shared(at);
    if constexpr (B == 4) return {low, 0};
    if constexpr (B == 2) return {low >> shift_, 0};
    const uint32_t high = load_shared(at + 4);
    return {__funnelshift_r(low, high, shift_), B == 3 ? 0 : high >> shift_};
  }

 private:
  uint32_t offset_, shift_;
};

// Which of the 8 codes element i of the four pairs is: pairs are (p, p + 4), or of 8-bit codes
// (0, 2), (1, 3), (4, 6), (5, 7), as whole words give them up.
constexpr __device__ int order_of_halves(int i) { return i / 2 + i % 2 * 4; }
constexpr __device__ int order_of_bytes(int i) { return i / 4 * 4 + i % 4 / 2 + i % 2 * 2; }

// Four pairs of elements of T for 8 codes, on kPlanes planes. With e the elements,
//   value of a code = 2^kLift * (e[plane 0] + 16 * e[plane 1]) - kOffset
template <class Code, class T>
struct LaneCodes;

template <int B, class T>
struct LaneCodes<Unsigned<B>, T> {
  static constexpr bool kSplit = B > Half<T>::kMantissaBits;  // into nibbles, a plane each
  static constexpr int kPlanes = kSplit ? 2 : 1, kLift = 0;
  static constexpr float kOffset = Half<T>::kOffset * (kSplit ? 17 : 1);
  static constexpr __device__ int order(int i) {
    return B == 8 ? order_of_bytes(i) : order_of_halves(i);
  }

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
      if constexpr (B < 4) u = (u & 0xffffu) | ((u << (16 - 4 * B)) & 0xffff0000u);
#pragma unroll
      for (int p = 0; p < 4; p++) out[0][p] = mask_or<kBoth, kMagic>(u >> (B * p));
    } else {
      const uint32_t high = __funnelshift_r(v.x, v.y, 4 * B);
#pragma unroll
      for (int p = 0; p < 4; p++)
        out[0][p] = (((v.x >> (B * p)) & kMask) | ((high >> (B * p)) & kMask) << 16) | kMagic;
    }
  }
};

template <class T>
struct LaneCodes<E2m1, T> {
  static constexpr int kPlanes = 1, kLift = Half<T>::kLiftE2m1;
  static constexpr float kOffset = 0.0f;
  static constexpr __device__ int order(int i) { return order_of_halves(i); }

  template <int p>
  static __device__ __forceinline__ uint32_t pair(uint32_t v) {
    constexpr int kAt = Half<T>::kMantissaBits - 1;  // of the code's mantissa bit
    constexpr uint32_t kBits = 7u << kAt;
    const uint32_t sign = shift<12 - 4 * p>(v) & 0x80008000u;
    return (shift<kAt - 4 * p>(v) & (kBits | kBits << 16)) | sign;
  }
  static __device__ __forceinline__ void pairs(uint2 v, uint32_t (&out)[1][4]) {
    out[0][0] = pair<0>(v.x);
    out[0][1] = pair<1>(v.x);
    out[0][2] = pair<2>(v.x);
    out[0][3] = pair<3>(v.x);
  }
};

template <class T>
struct LaneCodes<E4m3, T> {
  static constexpr int kPlanes = 1, kLift = Half<T>::kLiftE4m3;
  static constexpr float kOffset = 0.0f;
  static constexpr __device__ int order(int i) { return order_of_bytes(i); }

  // Bytes 0 and 2 of w (at = 8), or 1 and 3 (at = 0), moved up by `at` bits.
  template <int at>
  static __device__ __forceinline__ uint32_t pair(uint32_t w) {
    constexpr int kDown = 11 - Half<T>::kMantissaBits;  // from bit 8 to the lowest of mmm
    constexpr uint32_t kBits = 0x7fu << (8 - kDown);
    return (shift<at - kDown>(w) & (kBits | kBits << 16)) | (shift<at>(w) & 0x80008000u);
  }
  static __device__ __forceinline__ void pairs(uint2 v, uint32_t (&out)[1][4]) {
    out[0][0] = pair<8>(v.x);
    out[0][1] = pair<0>(v.x);
    out[0][2] = pair<8>(v.y);
    out[0][3] = pair<0>(v.y);
    // 0x7f and 0xff are NaN; moved up, they would be 480.
    const uint32_t nan =
        ((v.x & 0x7f7f7f7fu) + 0x01010101u) | ((v.y & 0x7f7f7f7fu) + 0x01010101u);
    if (nan & 0x80808080u) out[0][0] = 0x7fff7fffu;
  }
};

}  // namespace lowbit::cuda
