// The two 16-bit element types of the tensor cores, behind one set of names.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace lowbit::cuda {

using bf16 = __nv_bfloat16;
using f16 = __half;

// kMagic | q, q an unsigned code in the low mantissa bits, is exactly kOffset + q.
template <class T>
struct Half;

template <>
struct Half<bf16> {
  static constexpr uint32_t kMagic = 0x43004300u;  // 128 twice
  static constexpr float kOffset = 128.0f;
  // An e2m1 or e4m3 code moved to where this type has its exponent and mantissa is the value
  // times 2^-kLift.
  static constexpr int kLiftE2m1 = 126, kLiftE4m3 = 120;
  static constexpr int kMantissaBits = 7;
  static constexpr bool kWide = true;  // the exponents of float32
  static constexpr __device__ uint32_t power(int e) {
    return uint32_t(e + 127) << 7;
  }  // bits of 2^e

  static __device__ __forceinline__ float low(uint32_t pair) {
    return __uint_as_float(pair << 16);
  }
  static __device__ __forceinline__ float high(uint32_t pair) {
    return __uint_as_float(pair & 0xffff0000u);
  }
  // The one or the other, in one instruction.
  static __device__ __forceinline__ float either(uint32_t pair, bool high) {
    return __uint_as_float(__byte_perm(pair, 0, high ? 0x3244 : 0x1044));
  }
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    uint32_t r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
  }
  static __device__ __forceinline__ uint32_t multiply(uint32_t a, uint32_t b) {
    uint32_t r;  // + -0, which leaves every product as it is
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(0x80008000u));
    return r;
  }
  static __device__ __forceinline__ uint16_t bits(float x) {
    return __bfloat16_as_ushort(__float2bfloat16_rn(x));
  }
  // d += a[16 x 16] * b[16 x 8]
  static __device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

template <>
struct Half<f16> {
  static constexpr uint32_t kMagic = 0x64006400u;  // 1024 twice
  static constexpr float kOffset = 1024.0f;
  static constexpr int kLiftE2m1 = 14, kLiftE4m3 = 8;
  static constexpr int kMantissaBits = 10;
  static constexpr bool kWide = false;
  static constexpr __device__ uint32_t power(int e) { return uint32_t(e + 15) << 10; }

  static __device__ __forceinline__ float low(uint32_t pair) {
    return __half2float(__ushort_as_half(uint16_t(pair)));
  }
  static __device__ __forceinline__ float high(uint32_t pair) { return low(pair >> 16); }
  static __device__ __forceinline__ float either(uint32_t pair, bool high) {
    return low(high ? pair >> 16 : pair);
  }
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    uint32_t r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
  }
  static __device__ __forceinline__ uint32_t multiply(uint32_t a, uint32_t b) {
    uint32_t r;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
  }
  static __device__ __forceinline__ uint16_t bits(float x) {
    return __half_as_ushort(__float2half_rn(x));
  }
  static __device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

}  // namespace lowbit::cuda
