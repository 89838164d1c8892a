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
  for (int64_t i = 0; i < count; i++) out[i] = Scale::decode(in[i]);
}

inline void load_scales(ScaleType type, const void* p, int64_t first, int64_t count, float* out) {
  switch (type) {
    case ScaleType::f32: return widen<float>(p, first, count, out);
    case ScaleType::f16: return widen<f16>(p, first, count, out);
    case ScaleType::bf16: return widen<bf16>(p, first, count, out);
    case ScaleType::e8m0: return widen_bytes<E8m0>(p, first, count, out);
    case ScaleType::e4m3: return widen_bytes<E4m3>(p, first, count, out);
  }
}

// Groups [first, first + count) of a row: scales, and biases for codes decoded less `offset`.
// Both are padded with zeros to a multiple of kLanes and kLanes more, for whole-vector reads.
struct Groups {
  float* scale;
  float* bias;  // nullptr without biases

  static int64_t padded(int64_t count) { return (count + 2 * kLanes - 1) / kLanes * kLanes; }

  void read(const Matrix& w, int64_t row, int64_t first, int64_t count, float offset) const {
    const int64_t at = row * (w.columns / w.group_size) + first, full = padded(count);
    load_scales(w.scale_type, w.scales, at, count, scale);
    for (int64_t i = count; i < full; i++) scale[i] = 0.0f;
    if (!bias) return;
    load_scales(w.scale_type, w.biases, at, count, bias);
    for (int64_t i = 0; i < count; i++) bias[i] += offset * scale[i];
    for (int64_t i = count; i < full; i++) bias[i] = 0.0f;
  }
};

LOWBIT_END
