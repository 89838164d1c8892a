// What quantize computes for 16 consecutive elements, bit for bit what mx.quantize computes on
// a GPU (elements.cuh): divisions as products with the inverse of the group's scale, in two
// parts, since IEEE division of every element takes longer than memory does.
#pragma once

#include "elements.cuh"

namespace lowbit::cuda {

// 16 codes of B bits.
template <int B>
struct Packed {
  static constexpr int kWords = (16 * B + 31) / 32;
  uint32_t word[kWords] = {};

  // `count` codes from element i on, in the low bits.
  __device__ __forceinline__ void put(int i, int count, uint32_t codes) {
    const int bit = i * B, at = bit / 32, shift = bit % 32;
    word[at] |= codes << shift;
    if (shift + count * B > 32) word[at + 1] |= codes >> (32 - shift);
  }
  // To element 16 * unit of an array that begins at a whole word.
  __device__ __forceinline__ void store(uint8_t* codes, int64_t unit) const {
    uint8_t* to = codes + unit * (2 * B);
    if constexpr (B % 2 == 0) {
#pragma unroll
      for (int i = 0; i < kWords; i++) reinterpret_cast<uint32_t*>(to)[i] = word[i];
    } else {
#pragma unroll
      for (int i = 0; i < B; i++)
        reinterpret_cast<uint16_t*>(to)[i] = uint16_t(word[i / 2] >> (16 * (i % 2)));
    }
  }
};

// The smaller and the larger of two, NaN if one of them is.
__device__ __forceinline__ float least(float a, float b) {
  float r;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
}
__device__ __forceinline__ float most(float a, float b) {
  float r;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
}
// The same of pairs of a 16-bit dtype.
template <Dtype dtype>
__device__ __forceinline__ uint32_t least_pair(uint32_t a, uint32_t b) {
  uint32_t r;
  if constexpr (dtype == Dtype::bf16)
    asm("min.NaN.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  else
    asm("min.NaN.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
template <Dtype dtype>
__device__ __forceinline__ uint32_t most_pair(uint32_t a, uint32_t b) {
  uint32_t r;
  if constexpr (dtype == Dtype::bf16)
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  else
    asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
__device__ __forceinline__ bool finite(float x) {
  return (to_bits(x) & 0x7f800000u) != 0x7f800000u;
}

// 16 consecutive elements, as they lie in memory.
template <Dtype dtype>
struct Sixteen {
  EightBits half[2];

  __device__ __forceinline__ void widen(float (&x)[16]) const {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float v[8];
      half[h].widen(dtype, v);
#pragma unroll
      for (int i = 0; i < 8; i++) x[8 * h + i] = v[i];
    }
  }
  // NaN if one of them is.
  __device__ __forceinline__ void range(float& low, float& high) const {
    if constexpr (dtype == Dtype::f32) {
      low = high = from_bits(half[0].word[0]);
#pragma unroll
      for (int i = 1; i < 16; i++) {
        const float x = from_bits(half[i / 8].word[i % 8]);
        low = least(low, x), high = most(high, x);
      }
    } else {
      uint32_t l = half[0].word[0], h = l;
#pragma unroll
      for (int i = 1; i < 8; i++) {
        const uint32_t x = half[i / 4].word[i % 4];
        l = least_pair<dtype>(l, x), h = most_pair<dtype>(h, x);
      }
      low = least(to_float(l & 0xffffu, dtype), to_float(l >> 16, dtype));
      high = most(to_float(h & 0xffffu, dtype), to_float(h >> 16, dtype));
    }
  }
};

// Bits of the largest magnitude of a group that lies across kGroup / n lanes, NaN's if it has
// one.
template <class F, int n>
__device__ __forceinline__ uint32_t largest_of(const float (&x)[n]) {
  float largest = 0.0f;
#pragma unroll
  for (int i = 0; i < n; i++) largest = most(largest, magnitude(x[i]));
#pragma unroll
  for (int lanes = 1; lanes < F::kGroup / n; lanes *= 2)
    largest = most(largest, __shfl_xor_sync(0xffffffffu, largest, lanes));
  return to_bits(largest);
}

// Eight elements of such a group, as the format holds them.
template <class F>
__device__ __forceinline__ void round_trip_across(float (&x)[8], float enlarge) {
  round_trip<F>(x, Block<F>(largest_of<F>(x), enlarge));
}

// Quotients by y, 2^-25 <= y < 2^100, from the two parts of its inverse. They are x / y to
// 2^-24 of a last place before the one rounding: not always IEEE's, but above and below the
// halves of integers up to 255 together with IEEE's (tests/cuda asks for every mantissa of y).
struct Divisor {
  float high, low;

  explicit __device__ __forceinline__ Divisor(float y) {
    high = __frcp_rn(y);
    low = __fmul_rn(__fmaf_rn(-y, high, 1.0f), high);
  }
  __device__ __forceinline__ float divide(float x) const {
    return __fmaf_rn(x, high, __fmul_rn(x, low));
  }
};

// How MLX rounds on a GPU.
struct FromZero {
  __device__ __forceinline__ float operator()(float x) const { return roundf(x); }
};

// F::encode of 16 elements, FromZero, of a finite group with a scale below 2^100. It is at
// least 2^-25, and the bias is an end of the range, so that no quotient is below -1/2: rounding
// away from zero is truncating what is 1/2 more.
template <class F>
__device__ __forceinline__ Packed<F::kBits> encode_affine(const float (&x)[16],
                                                          typename F::Group group) {
  constexpr int B = F::kBits;
  constexpr float kSteps = float((1 << B) - 1), kToInteger = 12582912.0f;  // 1.5 * 2^23
  Packed<B> out;
  const Divisor scale(group.scale);
#pragma unroll
  for (int i = 0; i < 16; i += 4) {
    uint32_t codes = 0;
#pragma unroll
    for (int j = 3; j >= 0; j--) {
      const float q = scale.divide(__fsub_rn(x[i + j], group.bias));
      const float up = __fadd_rz(fminf(q, kSteps), 0.5f);
      codes = (codes << B) + to_bits(__fadd_rz(up, kToInteger));  // in the low bits
    }
    constexpr uint32_t kAll = (1u << B | 1u) * (1u << 2 * B | 1u);
    out.put(i, 4, codes - to_bits(kToInteger) * kAll);
  }
  return out;
}

}  // namespace lowbit::cuda
