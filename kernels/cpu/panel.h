// Stored rows decoded in natural order into a panel of float32 or bfloat16.
#pragma once

#include <type_traits>

#include "groups.h"
#include "kernels_of.h"
#if defined(__AVX512BF16__)
#include "exact.h"
#endif

LOWBIT_BEGIN

// A scale times a code's value plus a bias, in vectors of kLanes consecutive elements.
template <class F>
struct NaturalDecoder {
  using Code = typename F::Code;
  // Whole bytes: eight codes are always a whole number of them.
  static constexpr int kUnit = kLanes < 8 ? 8 : kLanes, kVectors = kUnit / kLanes;
  static constexpr int kBytes = kUnit * Code::kBits / 8;
  static constexpr int kRead = kReach<Code::kBits, 1> + 8;

  ToFloat<Code> to_float;

  template <int v>
  LOWBIT_FN f32 codes(const uint8_t* p) const {
    if constexpr (Code::kBits == 8) {
      return to_float(load_bytes(p + v * kLanes));
    } else if constexpr (kVectors == 1) {
      return to_float(windows<Code::kBits, 1>(p));
    } else {
      constexpr int first = v * kLanes * Code::kBits;
      return to_float(windows<Code::kBits, 1, first % 8>(p + first / 8));
    }
  }
};

// Elements [k0, k1) of stored row `row`, k0 a multiple of the group size and k1 too; `groups`
// holds their scales and biases. emit(k - k0, vector) receives kLanes elements at a time.
// `Centred`: biases were moved to the middle of the codes' range (Groups::read with kCentre).
template <bool Centred, class F, class Emit>
inline void decode_row(const NaturalDecoder<F>& decoder, const cpu::Matrix& w, int64_t row,
                       int64_t k0, int64_t k1, const Groups& groups, Emit&& emit) {
  using D = NaturalDecoder<F>;
  const uint8_t* p = w.codes + row * w.row_bytes + k0 * F::kBits / 8;
  const int64_t units = (k1 - k0) / D::kUnit;
  const int64_t reach = (w.end - p - D::kRead) / D::kBytes + 1;
  const int64_t direct = w.end - p < D::kRead ? 0 : reach < units ? reach : units;
  const auto unit = [&](const uint8_t* from, int64_t u) {
    const int64_t g = u * D::kUnit / F::kGroup;
    const f32 scale = splat(groups.scale[g]);
    const auto value = [&](f32 q) {
      if constexpr (!Centred && kCentre<typename F::Code> != 0.0f)
        q = add(q, splat(kCentre<typename F::Code>));
      if constexpr (F::kHasBias)
        return fma(q, scale, splat(groups.bias[g]));
      else
        return mul(q, scale);
    };
    emit(u * D::kUnit, value(decoder.template codes<0>(from)));
    if constexpr (D::kVectors == 2)
      emit(u * D::kUnit + kLanes, value(decoder.template codes<1>(from)));
  };
  int64_t u = 0;
  for (; u < direct; u++) unit(p + u * D::kBytes, u);
  for (; u < units; u++) {
    uint8_t copy[D::kRead + D::kBytes] = {};
    std::memcpy(copy, p + u * D::kBytes, D::kBytes);
    unit(copy, u);
  }
}

// Denormals may become zero: bfloat16 products read them as zero anyhow.
template <class T>
LOWBIT_FN void store_normal(T* p, f32 x) {
  store(p, x);
}
#if defined(__AVX512BF16__)
template <>
LOWBIT_FN void store_normal(bf16* p, f32 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(x));
}
#endif

// The rows of a dense matrix in the same way.
template <class T, class Emit>
inline void convert_row(const cpu::Matrix& w, int64_t row, int64_t k0, int64_t k1,
                        Emit&& emit) {
  const T* p = reinterpret_cast<const T*>(w.codes + row * w.row_bytes) + k0;
  int64_t k = 0;
  for (; k + kLanes <= k1 - k0; k += kLanes) emit(k, load(p + k));
  if (k < k1 - k0) {
    T copy[kLanes] = {};
    std::memcpy(copy, p + k, size_t(k1 - k0 - k) * sizeof(T));
    emit(k, load(copy));
  }
}

// Elements [k0, k1) of one stored row to `out`, whatever the format.
template <class Out>
using DecodeFn = void (*)(const cpu::Matrix&, int64_t row, int64_t k0, int64_t k1, float* room,
                          Out* out);

template <class F, class Out>
inline void decode_to(const cpu::Matrix& w, int64_t row, int64_t k0, int64_t k1, float* room,
                      Out* out) {
  const int64_t count = (k1 - k0) / F::kGroup;
  const Groups groups{room, F::kHasBias ? room + Groups::padded(count) : nullptr};
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<Out, bf16> && kHasProducts<F>) {
    static const ProductDecoder<F> decoder;
    const auto* scales = static_cast<const uint8_t*>(w.scales);
    decoder.row(w.codes + row * w.row_bytes + k0 * F::kBits / 8, k1 - k0,
                scales + (row * w.columns + k0) / F::kGroup, out);
    return;
  } else if constexpr (std::is_same_v<Out, bf16> && kHasExactCodes<typename F::Code>) {
    static const FoldedDecoder<F> decoder;
    groups.read(w, row, k0 / F::kGroup, count, decoder.kOffset);
    decoder.row(w.codes + row * w.row_bytes + k0 * F::kBits / 8, k1 - k0, groups.scale,
                F::kHasBias ? groups.bias : groups.scale, out);
    return;
  }
#endif
  static const NaturalDecoder<F> decoder;
  groups.read(w, row, k0 / F::kGroup, count, kCentre<typename F::Code>);
  decode_row<true>(decoder, w, row, k0, k1, groups,
                   [&](int64_t k, f32 v) { store_normal(out + k, v); });
}

template <class T, class Out>
inline void convert_to(const cpu::Matrix& w, int64_t row, int64_t k0, int64_t k1, float*,
                       Out* out) {
  convert_row<T>(w, row, k0, k1, [&](int64_t k, f32 v) { store_normal(out + k, v); });
}

template <class Out>
inline DecodeFn<Out> decoder_of(Format format, Dtype dense) {
  DecodeFn<Out> fn = nullptr;
  visit(format, [&](auto tag) { fn = decode_to<typename decltype(tag)::type, Out>; });
  if (fn) return fn;
  switch (dense) {
    case Dtype::f32:
      return convert_to<float, Out>;
    case Dtype::f16:
      return convert_to<f16, Out>;
    case Dtype::bf16:
      return convert_to<bf16, Out>;
  }
  return nullptr;
}

// Floats that decoding [k0, k1) of a row needs for its scales and biases.
inline int64_t decode_room(int64_t columns, int group_size) {
  return group_size ? 2 * Groups::padded(columns / group_size) : 0;
}

LOWBIT_END
