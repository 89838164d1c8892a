// Scalars on the device: every dtype and scale type as float32 and back, chosen at run time.
// Where the type is a constant the choice folds away.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "../formats/affine.h"
#include "../formats/mxfp4.h"
#include "../formats/mxfp8.h"
#include "../formats/nvfp4.h"
#include "../host/problem.h"
#include "e4m3.cuh"

namespace lowbit::cuda {

__host__ __device__ constexpr int size_of(Dtype d) { return d == Dtype::f32 ? 4 : 2; }
__host__ __device__ constexpr int size_of(ScaleType s) {
  return s == ScaleType::f32 ? 4 : s == ScaleType::f16 || s == ScaleType::bf16 ? 2 : 1;
}

// The value whose bits are the low ones of `bits`.
__device__ __forceinline__ float to_float(uint32_t bits, Dtype d) {
  if (d == Dtype::f32) return from_bits(bits);
  if (d == Dtype::bf16) return from_bits(bits << 16);
  return __half2float(__ushort_as_half(uint16_t(bits)));
}
__device__ __forceinline__ float to_float(uint32_t bits, ScaleType s) {
  if (s == ScaleType::e8m0) return E8m0::decode(bits);
  if (s == ScaleType::e4m3) return E4m3::decode(bits);
  return to_float(bits, Dtype(int(s)));
}

// Rounded to nearest, ties to even.
__device__ __forceinline__ uint32_t round_bits(float x, Dtype d) {
  if (d == Dtype::f32) return to_bits(x);
  if (d == Dtype::bf16) return __bfloat16_as_ushort(__float2bfloat16_rn(x));
  return __half_as_ushort(__float2half_rn(x));
}

// Bits of element i of an array of elements of `size` bytes.
__device__ __forceinline__ uint32_t load_bits(const void* p, int64_t i, int size) {
  if (size == 4) return static_cast<const uint32_t*>(p)[i];
  if (size == 2) return static_cast<const uint16_t*>(p)[i];
  return static_cast<const uint8_t*>(p)[i];
}
__device__ __forceinline__ float load_float(const void* p, int64_t i, Dtype d) {
  return to_float(load_bits(p, i, size_of(d)), d);
}
__device__ __forceinline__ void store_float(void* p, int64_t i, float x, Dtype d) {
  if (d == Dtype::f32)
    static_cast<float*>(p)[i] = x;
  else
    static_cast<uint16_t*>(p)[i] = uint16_t(round_bits(x, d));
}

// Eight consecutive elements as they lie in memory; 16-bit ones two to a word.
struct EightBits {
  uint32_t word[8];

  // `count` of them exist, zeros follow. vectors: all rows begin at multiples of 16 bytes.
  static __device__ __forceinline__ EightBits load(const void* p, int64_t at, int64_t count,
                                                   Dtype d, bool vectors) {
    EightBits e{};
    const char* from = static_cast<const char*>(p) + at * size_of(d);
    if (vectors && count >= 8) {
      const uint4 a = reinterpret_cast<const uint4*>(from)[0];
      e.word[0] = a.x, e.word[1] = a.y, e.word[2] = a.z, e.word[3] = a.w;
      if (d != Dtype::f32) return e;
      const uint4 b = reinterpret_cast<const uint4*>(from)[1];
      e.word[4] = b.x, e.word[5] = b.y, e.word[6] = b.z, e.word[7] = b.w;
      return e;
    }
#pragma unroll
    for (int i = 0; i < 8; i++) {
      if (i >= count) break;
      const uint32_t bits = load_bits(from, i, size_of(d));
      if (d == Dtype::f32)
        e.word[i] = bits;
      else
        e.word[i / 2] |= bits << (16 * (i % 2));
    }
    return e;
  }

  __device__ __forceinline__ void widen(Dtype d, float (&out)[8]) const {
#pragma unroll
    for (int i = 0; i < 8; i++) {
      if (d == Dtype::f32)
        out[i] = from_bits(word[i]);
      else
        out[i] = to_float(word[i / 2] >> (16 * (i % 2)) & 0xffffu, d);
    }
  }
};

template <int B>
__device__ __forceinline__ uint32_t code_of(uint64_t codes, int i) {
  return uint32_t(codes >> (B * i)) & ((1u << B) - 1);
}

// `Count` consecutive codes of a stored row as they lie in memory: loading waits for nothing.
// Rows are whole words; no word is read that holds none of the codes.
template <int B, int Count = 8>
struct RawCodes {
  static constexpr bool kWhole = Count * B % 32 == 0;  // codes begin at words
  uint32_t low, high, shift;

  // Element k, a multiple of Count, is the first.
  __device__ __forceinline__ void load(const uint8_t* row, int64_t k) {
    const auto* words = reinterpret_cast<const uint32_t*>(row);
    const int64_t bit = k * B, first = bit >> 5, last = (bit + Count * B - 1) >> 5;
    low = words[first];
    high = last != first ? words[last] : 0;
    shift = kWhole ? 0 : uint32_t(bit) & 31;
  }
  // The first in the low bits, anything beyond the last.
  __device__ __forceinline__ uint64_t codes() const {
    const uint64_t all = uint64_t(high) << 32 | low;
    return kWhole ? all : all >> shift;
  }
};

// What nvfp4's elements are multiplied by before they are encoded.
__device__ __forceinline__ float enlarge_by(const float* global) {
  const float g = global ? *global : 0.0f;
  return g > 0.0f ? __fdiv_rn(Nvfp4::kGlobalMax, g) : 1.0f;
}

// Encoding follows MLX's GPU kernels to the bit, as the CPU's follows MLX's CPU code. From the
// sm_90 code of libmlx.so 0.32.4 and its source, they differ in this (affine: encode.cuh):
//
//   scale bytes  largest / 6 or / 448 is not rounded to the dtype of w; zero has e8m0 byte 0
//   elements     multiplied by enlarge / scale, in float32 throughout
//   e2m1         E2m1::encode_to_even
//
// A group of nvfp4 whose scale is zero is multiplied by infinity: codes of +-6, which decode to
// zero, also where the product is NaN.
template <class Code>
__device__ __forceinline__ uint32_t encode_element(float x) {
  if constexpr (std::is_same_v<Code, E2m1>)
    return Code::encode_to_even(x);
  else
    return Code::encode(x);
}

// How a group of a block format is encoded: scale byte, and what elements are multiplied by.
template <class F>
struct Block {
  static constexpr bool kPowers = std::is_same_v<typename F::Scale, E8m0>;  // of two: scales
  uint32_t scale;
  float factor;

  // most: bits of the group's largest magnitude.
  __device__ __forceinline__ Block(uint32_t most, float enlarge) {
    const float q = __fdiv_rn(from_bits(most), F::Code::kMax);
    uint32_t fitted;
    if constexpr (kPowers)
      fitted = q == 0.0f ? 0u : F::fit(q, enlarge);
    else
      fitted = encode_e4m3(__fmul_rn(q, enlarge), 0.0f);
    scale = most < 0x7f800000u ? fitted : F::kNanScale;
    // The step of powers of two is the inverse of the scale already.
    factor = kPowers ? F::step(scale) : __fdiv_rn(enlarge, value());
  }
  // Of the scale.
  __device__ __forceinline__ float value() const {
    if constexpr (kPowers)
      return F::Scale::decode(scale);
    else
      return decode_e4m3(scale).x;
  }
  __device__ __forceinline__ uint32_t encode(float x) const {
    const uint32_t code = encode_element<typename F::Code>(__fmul_rn(x, factor));
    return scale == F::kNanScale ? F::kNanCode : code;
  }
};

// Affine formats differ in their groups alone, which are no part of a kernel.
template <class F>
struct Family {
  using type = F;
};
template <int B, int G>
struct Family<Affine<B, G>> {
  using type = Affine<B, 32>;
};

// Two floats rounded to a 16-bit dtype, the first in the low half.
__device__ __forceinline__ uint32_t round_pair(float a, float b, Dtype d) {
  uint32_t pair;
  if (d == Dtype::bf16)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(b), "f"(a));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(b), "f"(a));
  return pair;
}

// Short forms of what kernels/formats says of decoding, and encode_element of encoding, eight
// codes at a time; tests/cuda compares them for every code and every float but NaN.
//
// Decoding: an unsigned code in the low mantissa bits of 2^23 is that much more than 2^23.
template <class Code>
struct Eight {
  static __device__ __forceinline__ void decode(uint64_t codes, float (&out)[8]) {
#pragma unroll
    for (int i = 0; i < 8; i++)
      out[i] = from_bits(code_of<Code::kBits>(codes, i) | 0x4b000000u) - 8388608.0f;
  }
};

// Times 2^-126, e2m1 code c lies at c * 2^22 in the bits of a float32: its subnormals are
// spaced as those of float32.
template <>
struct Eight<E2m1> {
  static constexpr int kWords = 1;

  static __device__ __forceinline__ void decode(uint64_t codes, float (&out)[8]) {
    const uint32_t all = uint32_t(codes);
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const uint32_t size = i < 6 ? all << (22 - 4 * i) : all >> (4 * i - 22);
      const uint32_t sign = all << (28 - 4 * i) & 0x80000000u;
      out[i] = from_bits((size & 0x01c00000u) | sign) * from_bits(0x7e800000u);
    }
  }
  // Let p = 2^e be the power of two below x, at least 1. Codes are p / 2 apart there, of
  // which p holds two, and of 2^22 p the last place is p / 2: adding 2^22 p + e p rounds x and
  // leaves its code in the low bits.
  static __device__ __forceinline__ void encode(const float (&x)[8], uint32_t (&out)[1]) {
    uint32_t half[2] = {}, signs = 0;
#pragma unroll
    for (int i = 7; i >= 0; i--) {
      const float a = fminf(magnitude(x[i]), E2m1::kMax);  // 6 of NaN
      const uint32_t power = to_bits(fmaxf(a, 1.0f)) & 0x7f800000u;
      const float magic = from_bits(power + (power >> 22) + ((22u << 23) - 254u));
      half[i / 4] = half[i / 4] * 16u + to_bits(__fadd_rn(a, magic));  // rest from bit 23 on
      signs = __funnelshift_l(to_bits(x[i]), signs, 4);
    }
    const uint32_t codes = __byte_perm(half[0], half[1], 0x5410);
    out[0] = codes | (signs & 0x88888888u);
  }
};

template <>
struct Eight<E4m3> {
  static constexpr int kWords = 2;

  static __device__ __forceinline__ void decode(uint64_t codes, float (&out)[8]) {
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
      const float2 two = decode_e4m3(uint32_t(codes >> (8 * i)));
      out[i] = two.x, out[i + 1] = two.y;
    }
  }
  static __device__ __forceinline__ void encode(const float (&x)[8], uint32_t (&out)[2]) {
    out[0] = out[1] = 0;
#pragma unroll
    for (int i = 0; i < 8; i += 2) out[i / 4] |= encode_e4m3(x[i], x[i + 1]) << (8 * (i % 4));
  }
};

// The e2m1 value that encode_to_even chooses. Let p be the power of two below x, at least 1: of
// 2^22 p the last place is p / 2, which is how far apart values are there.
__device__ __forceinline__ float nearest_e2m1(float x) {
  const float a = fminf(magnitude(x), E2m1::kMax);  // 6 of NaN
  const uint32_t power = to_bits(fmaxf(a, 1.0f)) & 0x7f800000u;
  const float magic = from_bits(power + (22u << 23));
  const float nearest = __fsub_rn(__fadd_rn(a, magic), magic);
  return from_bits(to_bits(nearest) | (to_bits(x) & 0x80000000u));
}

// 8 elements of a group as the format holds them: encoded and decoded.
template <class F>
__device__ __forceinline__ void round_trip(float (&x)[8], const Block<F>& block) {
#pragma unroll
  for (float& v : x) v = __fmul_rn(v, block.factor);
  if constexpr (std::is_same_v<typename F::Code, E2m1>) {
#pragma unroll
    for (float& v : x) v = nearest_e2m1(v);
  } else {
    using Codes = Eight<typename F::Code>;
    uint32_t codes[Codes::kWords];
    Codes::encode(x, codes);
    Codes::decode(
        Codes::kWords == 1 ? codes[0] : uint64_t(codes[Codes::kWords - 1]) << 32 | codes[0], x);
  }
  // NaN for a NaN's group: its scale of e4m3 is NaN, that of e8m0 infinity.
  const float scale = block.scale == F::kNanScale ? from_bits(0x7fffffffu) : block.value();
#pragma unroll
  for (float& v : x) v *= scale;
}

}  // namespace lowbit::cuda
