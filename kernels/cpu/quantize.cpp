// quantize, dequantize and the round trip of qqmm. Groups are encoded by the scalar text of
// kernels/formats in loops without branches, which the compiler vectorizes for each target.
#include "activations.h"
#include "panel.h"
#if defined(__BMI2__)
#include <immintrin.h>
#endif

LOWBIT_BEGIN

namespace {

// Eight codes, a byte each, to kBits bytes.
template <int B>
LOWBIT_FN void pack8(const uint8_t* codes, uint8_t* out) {
  uint64_t word;
#if defined(__BMI2__)
  std::memcpy(&word, codes, 8);
  word = _pext_u64(word, 0x0101010101010101u * ((1u << B) - 1));
#else
  word = 0;
  for (int i = 0; i < 8; i++) word |= uint64_t(codes[i]) << (B * i);
#endif
  std::memcpy(out, &word, B);
}

// Codes are computed as words and narrowed after: a loop that stores bytes would be vectorized
// for sixteen of them, four floats at a time.
template <int G>
LOWBIT_FN void to_bytes(const uint32_t* wide, uint8_t* codes) {
  for (int i = 0; i < G; i++) codes[i] = uint8_t(wide[i]);
}

template <class T>
struct RoundTo {
  LOWBIT_FN float operator()(float x) const { return to_float(from_float<T>(x)); }
};

template <int G>
bool all_finite(const float* w) {
  uint32_t bad = 0;
  for (int i = 0; i < G; i++) bad |= uint32_t((to_bits(w[i]) & 0x7f800000u) == 0x7f800000u);
  return bad == 0;
}

// A float's bits as an integer of the same order. Integer minima and maxima vectorize; float
// ones would have to settle the order of NaN and of signed zeros first.
LOWBIT_FN int32_t ordered(float x) {
  const int32_t b = int32_t(to_bits(x));
  return b ^ (b >> 31 & 0x7fffffff);
}
LOWBIT_FN float from_ordered(int32_t o) {
  return from_bits(uint32_t(o ^ (o >> 31 & 0x7fffffff)));
}

constexpr int64_t kPiece = 2048;  // elements handled at a time, whole groups

float enlarge_by(float global_scale) {
  return global_scale > 0.0f ? Nvfp4::kGlobalMax / global_scale : 1.0f;
}

template <class F>
void pack_group(const uint8_t* codes, int64_t group, uint8_t* out) {
  out += group * (F::kGroup * F::kBits / 8);
  for (int i = 0; i < F::kGroup / 8; i++) pack8<F::kBits>(codes + 8 * i, out + i * F::kBits);
}

// x: the groups' values. Affine arithmetic is float32 whatever the dtype of w; scales and
// biases come out as float32 and are rounded by the caller.
template <class F>
void quantize_affine(const float* x, int64_t groups, uint8_t* codes, float* scales,
                     float* biases) {
  constexpr int G = F::kGroup;
  alignas(64) uint8_t q[G];
  for (int64_t g = 0; g < groups; g++, x += G) {
    int32_t low = ordered(x[0]), high = low;
    for (int i = 0; i < G; i++) {
      const int32_t o = ordered(x[i]);
      low = o < low ? o : low, high = o > high ? o : high;
    }
    const typename F::Group group = F::fit(from_ordered(low), from_ordered(high));
    uint32_t wide[G];
    for (int i = 0; i < G; i++) wide[i] = F::encode(x[i], group);
    to_bytes<G>(wide, q);
    scales[g] = all_finite<G>(x) ? group.scale : __builtin_nanf("");
    biases[g] = group.bias;
    pack_group<F>(q, g, codes);
  }
}

// Scale bytes of a piece's groups, and what their elements are normalized by. A pass of its
// own, so that the arithmetic of scales is vectorized over groups.
template <class F, class T>
void fit_blocks(const float* x, int64_t groups, float enlarge, uint8_t* scales, float* steps) {
  float largest[kPiece / F::kGroup];
  for (int64_t g = 0; g < groups; g++) {
    uint32_t most = 0;
    for (int i = 0; i < F::kGroup; i++) {
      const uint32_t a = to_bits(x[g * F::kGroup + i]) & 0x7fffffffu;
      most = a > most ? a : most;
    }
    largest[g] = from_bits(most);
  }
  const RoundTo<T> round;
  for (int64_t g = 0; g < groups; g++) {
    const uint32_t fitted = F::fit(round(largest[g] / F::Code::kMax), enlarge);
    const uint32_t scale = to_bits(largest[g]) < 0x7f800000u ? fitted : F::kNanScale;
    scales[g] = uint8_t(scale);
    steps[g] = F::step(scale);
  }
}

template <class F, class T>
LOWBIT_FN void encode_block(const float* x, uint32_t scale, float step, float enlarge,
                            uint8_t* codes) {
  if (scale == F::kNanScale) {
    std::memset(codes, int(F::kNanCode), F::kGroup);
    return;
  }
  const RoundTo<T> round;
  uint32_t wide[F::kGroup];
  for (int i = 0; i < F::kGroup; i++)
    wide[i] = F::Code::encode(F::normalize(x[i], step, enlarge, round));
  to_bytes<F::kGroup>(wide, codes);
}

template <class F, class T>
void quantize_blocks(const float* x, int64_t groups, float global_scale, uint8_t* codes,
                     uint8_t* scales) {
  float steps[kPiece / F::kGroup];
  alignas(64) uint8_t q[F::kGroup];
  const float enlarge = enlarge_by(global_scale);
  fit_blocks<F, T>(x, groups, enlarge, scales, steps);
  for (int64_t g = 0; g < groups; g++) {
    encode_block<F, T>(x + g * F::kGroup, scales[g], steps[g], enlarge, q);
    pack_group<F>(q, g, codes);
  }
}

template <class F, class T>
void round_trip_row(float* row, int64_t columns, float global_scale) {
  float steps[kPiece / F::kGroup];
  uint8_t scales[kPiece / F::kGroup];
  alignas(64) uint8_t q[F::kGroup];
  const float enlarge = enlarge_by(global_scale);
  for (int64_t k = 0; k < columns; k += kPiece) {
    const int64_t groups = (columns - k < kPiece ? columns - k : kPiece) / F::kGroup;
    fit_blocks<F, T>(row + k, groups, enlarge, scales, steps);
    for (int64_t g = 0; g < groups; g++) {
      float* x = row + k + g * F::kGroup;
      encode_block<F, T>(x, scales[g], steps[g], enlarge, q);
      const float s = F::Scale::decode(scales[g]);
      for (int i = 0; i < F::kGroup; i++) x[i] = F::Code::decode(q[i]) * s;
    }
  }
}

// Elements [k0, k1) of a stored row as float32, k1 - k0 at most kPiece.
template <class F>
void decode_piece(const cpu::Matrix& w, int64_t row, int64_t k0, int64_t k1, float alpha,
                  float* out) {
  constexpr int64_t kGroups = kPiece / F::kGroup + 2 * kLanes;
  static const NaturalDecoder<F> decoder;
  float scale[kGroups], bias[kGroups];
  const Groups groups{scale, F::kHasBias ? bias : nullptr};
  const int64_t count = (k1 - k0) / F::kGroup;
  groups.read(w, row, k0 / F::kGroup, count, 0.0f);
  if (alpha != 1.0f)
    for (int64_t g = 0; g < count; g++) scale[g] *= alpha;
  decode_row<false>(decoder, w, row, k0, k1, groups,
                    [&](int64_t k, f32 v) { store(out + k, v); });
}

template <class F>
void with_dtype(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::f32:
      return f(float{});
    case Dtype::f16:
      return f(f16{});
    case Dtype::bf16:
      return f(bf16{});
  }
}

}  // namespace

void quantize(Format format, const void* w, Dtype dtype, int64_t groups, float global_scale,
              uint8_t* codes, void* scales, void* biases) {
  alignas(64) float x[kPiece], scale[kPiece / 16], bias[kPiece / 16];
  visit(format, [&](auto tag) {
    using F = typename decltype(tag)::type;
    constexpr int64_t kStep = kPiece / F::kGroup;
    for (int64_t g = 0; g < groups; g += kStep, codes += kPiece * F::kBits / 8) {
      const int64_t count = groups - g < kStep ? groups - g : kStep;
      with_dtype(dtype, [&]<class T>(T) {
        widen<T>(w, g * F::kGroup, count * F::kGroup, x);
        if constexpr (F::kHasBias) {
          quantize_affine<F>(x, count, codes, scale, bias);
          narrow(scale, count, static_cast<T*>(scales) + g);
          narrow(bias, count, static_cast<T*>(biases) + g);
        } else {
          quantize_blocks<F, T>(x, count, global_scale, codes,
                                static_cast<uint8_t*>(scales) + g);
        }
      });
    }
  });
}

void dequantize(Format format, const cpu::Matrix& w, int64_t begin, int64_t end, float alpha,
                void* out, Dtype dtype) {
  alignas(64) float x[kPiece];
  visit(format, [&](auto tag) {
    for (int64_t r = begin; r < end; r++)
      for (int64_t k0 = 0; k0 < w.columns; k0 += kPiece) {
        const int64_t k1 = k0 + kPiece < w.columns ? k0 + kPiece : w.columns;
        decode_piece<typename decltype(tag)::type>(w, r, k0, k1, alpha, x);
        with_dtype(dtype, [&]<class T>(T) {
          narrow(x, k1 - k0, static_cast<T*>(out) + (r - begin) * w.columns + k0);
        });
      }
  });
}

void round_trip(Format format, Dtype dtype, float* row, int64_t columns, float global_scale) {
  visit(format, [&](auto tag) {
    using F = typename decltype(tag)::type;
    if constexpr (!F::kHasBias)
      with_dtype(dtype, [&]<class T>(T) { round_trip_row<F, T>(row, columns, global_scale); });
  });
}

const cpu::Kernels& kernels() {
  static constexpr cpu::Kernels all{matvec, matmul, quantize, dequantize, round_trip};
  return all;
}

LOWBIT_END
