// e4m3 by the conversions that compute capability 8.9 and later have for it.
#pragma once

#include "../formats/mxfp8.h"
#include "half.h"

namespace lowbit::cuda {

// Two codes, the first in the low byte.
__device__ __forceinline__ uint32_t encode_e4m3(float a, float b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  uint16_t pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(b), "f"(a));
  return pair;
#else
  return E4m3::encode(a) | E4m3::encode(b) << 8;
#endif
}
__device__ __forceinline__ float2 decode_e4m3(uint32_t codes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  uint32_t pair;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(pair) : "h"(uint16_t(codes)));
  return {Half<f16>::low(pair), Half<f16>::high(pair)};
#else
  return {E4m3::decode(codes & 0xffu), E4m3::decode(codes >> 8 & 0xffu)};
#endif
}

}  // namespace lowbit::cuda
