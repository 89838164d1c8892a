// quantize, dequantize, and the round trip of activations, as mx.quantize does it on Metal.
//
// A thread has a chunk of 32 consecutive elements, neighbouring lanes share a group of 64 or
// 128; a chunk of nvfp4 has two groups, and the last one of an array may be half. Grid: chunks
// / threads of a threadgroup. MLX's rules where they are not those of the formats' headers:
//
//   rounding   affine halves go away from zero, fp4 halves to the even code
//   range      of an affine group reaches to zero where all of it is below
//   scales     largest / 6 or / 448 is not rounded to the dtype; zero has e8m0 byte 0
//   elements   are multiplied by enlarge / scale, or by 0 where the scale is zero
#pragma once

#include "load.h"

namespace lowbit {

struct FromZero {
  METAL_FUNC float operator()(float x) const { return round(x); }
};

METAL_FUNC bool is_finite(float x) { return (as_type<uint>(x) & 0x7f800000u) != 0x7f800000u; }

METAL_FUNC uint encode_element(E2m1, float x) { return E2m1::encode_to_even(x); }
METAL_FUNC uint encode_element(E4m3, float x) { return E4m3::encode(x); }

// Elements of a thread; those beyond `count` are zero.
template <class T>
METAL_FUNC void load_chunk(thread float (&x)[kChunk], const device T* from, int count) {
  for (int i = 0; i < kChunk; i++) x[i] = i < count ? float(from[i]) : 0.0f;
}

template <class F>
METAL_FUNC void put(thread uint (&words)[F::kBits], int i, uint code) {
  const int bit = i * F::kBits, at = bit / 32, shift = bit % 32;
  words[at] |= code << shift;
  if (shift + F::kBits > 32) words[at + 1] |= code >> (32 - shift);
}

// How a group of a block format is encoded: scale byte, and what elements are multiplied by.
template <class F>
struct Block {
  uint scale;
  float factor;
};

template <class F>
METAL_FUNC Block<F> fit_block(const thread float* x, float enlarge) {
  float largest = 0.0f;
  bool finite = true;
  for (int i = 0; i < F::kGroup; i++) {
    finite = finite && is_finite(x[i]);
    largest = larger(largest, magnitude(x[i]));
  }
  const float q = largest / F::Code::kMax;
  Block<F> block;
  block.scale = F::kGroup == kChunk && q == 0.0f ? 0u : F::fit(q, enlarge);
  if (!finite) block.scale = F::kNanScale;
  const float step = F::step(block.scale);
  block.factor = F::kGroup == kChunk ? step : step == 0.0f ? 0.0f : enlarge / step;
  return block;
}

template <class F>
METAL_FUNC uint encode_in(Block<F> block, float x) {
  if (block.scale == F::kNanScale) return F::kNanCode;
  return encode_element(typename F::Code(), x * block.factor);
}

METAL_FUNC float enlarge_by(const device float* global) {
  return has_global_x && global[0] > 0.0f ? Nvfp4::kGlobalMax / global[0] : 1.0f;
}

// Codes, scales and biases of one thread, for formats with and without biases.
template <class F, class T, bool kAffine>
struct Encoder {
  static METAL_FUNC void run(thread uint (&words)[F::kBits], const thread float (&x)[kChunk],
                             int count, ulong chunk, device uchar* scales, device uchar* biases,
                             const device float*) {
    constexpr int kLanes = F::kGroup / kChunk;
    float low = x[0], high = x[0];
    bool finite = is_finite(x[0]);
    for (int i = 1; i < kChunk; i++) {
      low = smaller(low, x[i]), high = larger(high, x[i]);
      finite = finite && is_finite(x[i]);
    }
    for (ushort lanes = 1; lanes < kLanes; lanes *= 2) {
      low = smaller(low, simd_shuffle_xor(low, lanes));
      high = larger(high, simd_shuffle_xor(high, lanes));
      finite = simd_shuffle_xor(int(finite), lanes) != 0 && finite;
    }
    if (count == 0) return;
    typename F::Group group = {not_a_number(), 0.0f};
    if (finite) group = F::fit(low, larger(high, 0.0f), FromZero());
    for (int i = 0; i < kChunk; i++)
      put<F>(words, i, finite ? F::encode(x[i], group, FromZero()) : 0u);
    if (chunk % kLanes != 0) return;
    store_float(scales, chunk / kLanes, group.scale, scale_type);
    store_float(biases, chunk / kLanes, group.bias, scale_type);
  }
};
template <class F, class T>
struct Encoder<F, T, false> {
  static METAL_FUNC void run(thread uint (&words)[F::kBits], const thread float (&x)[kChunk],
                             int count, ulong chunk, device uchar* scales, device uchar*,
                             const device float* global) {
    const float enlarge = enlarge_by(global);
    for (int g = 0; g < Chunk<F>::kScales; g++) {
      const int first = g * F::kGroup;
      if (first >= count) break;
      const Block<F> block = fit_block<F>(x + first, enlarge);
      for (int i = 0; i < F::kGroup; i++)
        put<F>(words, first + i, encode_in(block, x[first + i]));
      scales[chunk * Chunk<F>::kScales + g] = uchar(block.scale);
    }
  }
};

// Elements that a chunk of an array of `groups` groups has: 0 beyond its end.
template <class F>
METAL_FUNC int chunk_count(const constant metal_args::QuantizeArgs& args, ulong chunk) {
  const long rest = args.groups * F::kGroup - long(chunk) * kChunk;
  return rest <= 0 ? 0 : int(min(rest, long(kChunk)));
}

template <class F, class T>
[[kernel]] void quantize(const constant metal_args::QuantizeArgs& args [[buffer(0)]],
                         const device T* values [[buffer(1)]], device uint* codes [[buffer(2)]],
                         device uchar* scales [[buffer(3)]], device uchar* biases [[buffer(4)]],
                         const device float* global [[buffer(5)]],
                         uint thread_in_grid [[thread_position_in_grid]]) {
  const ulong chunk = thread_in_grid;
  const int count = chunk_count<F>(args, chunk);
  float x[kChunk];
  load_chunk<T>(x, values + chunk * kChunk, count);
  uint words[F::kBits] = {};
  Encoder<F, T, F::kHasBias>::run(words, x, count, chunk, scales, biases, global);
  for (int i = 0; i < count * F::kBits / 32; i++) codes[chunk * F::kBits + i] = words[i];
}

template <class F, class T>
[[kernel]] void dequantize(const constant metal_args::QuantizeArgs& args [[buffer(0)]],
                           device T* values [[buffer(1)]],
                           const device uint* codes [[buffer(2)]],
                           const device uchar* scales [[buffer(3)]],
                           const device uchar* biases [[buffer(4)]],
                           const device float* global [[buffer(5)]],
                           uint thread_in_grid [[thread_position_in_grid]]) {
  const ulong chunk = thread_in_grid;
  const int count = chunk_count<F>(args, chunk);
  if (count == 0) return;
  const float alpha = has_global_x ? global[0] / Nvfp4::kGlobalMax : 1.0f;
  Chunk<F> loaded;
  loaded.load(codes + chunk * F::kBits, count);
  for (int i = 0; i < count; i++) {
    const Scale s = load_scale<F>(scales, biases, (chunk * kChunk + i) / F::kGroup);
    const float scale = s.scale * alpha, value = loaded.value(i);
    // A bias of nothing would take the sign of a zero.
    values[chunk * kChunk + i] = T(F::kHasBias ? fma(scale, value, s.bias) : scale * value);
  }
}

// Q(x) without the factor of the global scale, which stays with the product: exact in bfloat16.
template <class F, class T>
[[kernel]] void round_trip(const constant metal_args::QuantizeArgs& args [[buffer(0)]],
                           const device T* values [[buffer(1)]],
                           device bfloat* rounded [[buffer(2)]],
                           const device float* global [[buffer(5)]],
                           uint thread_in_grid [[thread_position_in_grid]]) {
  const ulong chunk = thread_in_grid;
  const int count = chunk_count<F>(args, chunk);
  if (count == 0) return;
  float x[kChunk];
  load_chunk<T>(x, values + chunk * kChunk, count);
  const float enlarge = enlarge_by(global);
  for (int g = 0; g < Chunk<F>::kScales; g++) {
    const int first = g * F::kGroup;
    if (first >= count) break;
    const Block<F> block = fit_block<F>(x + first, enlarge);
    // NaN for a NaN's group: its scale of e4m3 is NaN, that of e8m0 infinity.
    const bool nan = block.scale == F::kNanScale;
    const float scale = nan ? not_a_number() : F::Scale::decode(block.scale);
    for (int i = 0; i < F::kGroup; i++)
      rounded[chunk * kChunk + first + i] =
          bfloat(scale * F::Code::decode(encode_in(block, x[first + i])));
  }
}

}  // namespace lowbit
