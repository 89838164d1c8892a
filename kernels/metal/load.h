// Packed weights, scales and results in device memory, as Metal kernels read and write them.
//
// A row of w is read in chunks of 32 consecutive codes: whole words whatever the width of a
// code (32 * B bits are B words), and one scale where groups have 32 codes or more. The last
// chunk of a row of nvfp4 may have 16 codes, and no word beyond them exists.
#pragma once

#include <metal_stdlib>

#include "../formats/affine.h"
#include "../formats/mxfp4.h"
#include "../formats/mxfp8.h"
#include "../formats/nvfp4.h"
#include "args.h"

using namespace metal;

constant int y_type [[function_constant(0)]];
constant int scale_type [[function_constant(1)]];
constant int bias_type [[function_constant(2)]];
constant bool has_global_x [[function_constant(3)]];
constant bool has_global_w [[function_constant(4)]];
constant bool gather [[function_constant(5)]];
constant bool grouped [[function_constant(6)]];

namespace lowbit {

constant constexpr int kChunk = 32;

// Numbers of Dtype and of the first values of ScaleType.
constant constexpr int kFloat32 = 0, kFloat16 = 1;

METAL_FUNC float load_float(const device uchar* from, ulong i, int type) {
  if (type == kFloat32) return ((const device float*)from)[i];
  if (type == kFloat16) return float(((const device half*)from)[i]);
  return float(((const device bfloat*)from)[i]);
}

METAL_FUNC void store_float(device uchar* to, ulong i, float value, int type) {
  if (type == kFloat32)
    ((device float*)to)[i] = value;
  else if (type == kFloat16)
    ((device half*)to)[i] = half(value);
  else
    ((device bfloat*)to)[i] = bfloat(value);
}

// One group's scale and bias.
struct Scale {
  float scale, bias;
};

template <class F, bool kAffine>
struct Scales {
  static METAL_FUNC Scale load(const device uchar* scales, const device uchar* biases,
                               ulong i) {
    return {load_float(scales, i, scale_type), load_float(biases, i, scale_type)};
  }
};
template <class F>
struct Scales<F, false> {
  static METAL_FUNC Scale load(const device uchar* scales, const device uchar*, ulong i) {
    return {F::Scale::decode(uint(scales[i])), 0.0f};
  }
};

template <class F>
METAL_FUNC Scale load_scale(const device uchar* scales, const device uchar* biases, ulong i) {
  return Scales<F, F::kHasBias>::load(scales, biases, i);
}

template <class F>
struct Chunk {
  static constant constexpr int kBits = F::kBits;
  // Codes that share a scale, and scales, of a chunk.
  static constant constexpr int kGroup = F::kGroup < kChunk ? F::kGroup : kChunk;
  static constant constexpr int kScales = kChunk / kGroup;

  uint word[F::kBits];

  // `count` codes exist, 16 or 32 (none: 0).
  METAL_FUNC void load(const device uint* from, int count) {
    const int words = count * kBits / 32;
    for (int i = 0; i < kBits; i++) word[i] = i < words ? from[i] : 0u;
  }
  METAL_FUNC float value(int i) const {
    const int bit = i * kBits, at = bit / 32, shift = bit % 32;
    uint code = word[at] >> shift;
    if (shift + kBits > 32) code |= word[at + 1] << (32 - shift);
    return F::Code::decode(code & ((1u << kBits) - 1u));
  }
};

// What both global scales multiply a product by; `matrix` is w's.
METAL_FUNC float alpha_of(const constant metal_args::ProductArgs& args,
                          const device float* global_x, const device float* global_w,
                          long matrix) {
  float alpha = 1.0f;
  if (has_global_x) alpha *= global_x[0] / Nvfp4::kGlobalMax;
  if (has_global_w) alpha *= global_w[args.global_w_count > 1 ? matrix : 0] / Nvfp4::kGlobalMax;
  return alpha;
}

METAL_FUNC float not_a_number() { return as_type<float>(0x7fc00000u); }

}  // namespace lowbit
