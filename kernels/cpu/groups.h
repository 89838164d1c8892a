// Scales and biases of a row's groups as float32, whatever they are stored as.
#pragma once

#include "kernels.h"
#include "load.h"

LOWBIT_BEGIN

using cpu::Matrix;

template <class T>
inline void widen(const void* p, int64_t first, int64_t count, float* out) {
  const T* in = static_cast<const T*>(p) + first;
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(out + i, load(in + i));
  for (; i < count; i++) out[i] = to_float(in[i]);
}

template <class Scale>
inline void widen_bytes(const void* p, int64_t first, int64_t count, float* out) {
  const uint8_t* in = static_cast<const uint8_t*>(p) + first;
  static const ToFloat<Scale> to_float;
  int64_t i = 0;
  for (; i + 16 <= count; i += kLanes) store(out + i, to_float(load_bytes(in + i)));
  for (; i < count; i++) out[i] = Scale::decode(in[i]);
}

inline void load_scales(ScaleType type, const void* p, int64_t first, int64_t count,
                        float* out) {
  switch (type) {
    case ScaleType::f32:
      return widen<float>(p, first, count, out);
    case ScaleType::f16:
      return widen<f16>(p, first, count, out);
    case ScaleType::bf16:
      return widen<bf16>(p, first, count, out);
    case ScaleType::e8m0:
      return widen_bytes<E8m0>(p, first, count, out);
    case ScaleType::e4m3:
      return widen_bytes<E4m3>(p, first, count, out);
  }
}

// Groups [first, first + count) of a row: scales, and biases for codes decoded less `offset`.
// kLanes zeros follow, for whole-vector reads.
struct Groups {
  float* scale;
  float* bias;  // nullptr without biases

  static int64_t padded(int64_t count) { return (count + 2 * kLanes - 1) / kLanes * kLanes; }

  void read(const Matrix& w, int64_t row, int64_t first, int64_t count, float offset) const {
    const int64_t at = row * (w.columns / w.group_size) + first;
    load_scales(w.scale_type, w.scales, at, count, scale);
    store(scale + count, zero());
    if (!bias) return;
    load_scales(w.scale_type, w.biases, at, count, bias);
    store(bias + count, zero());
    if (offset == 0.0f) return;
    for (int64_t i = 0; i < count; i += kLanes)
      store(bias + i, fma(splat(offset), load(scale + i), load(bias + i)));
  }
};

LOWBIT_END
