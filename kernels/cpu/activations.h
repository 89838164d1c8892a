// Rows of x as float32, and the plain facts about them that decide which kernel is exact.
#pragma once

#include "groups.h"

LOWBIT_BEGIN

using cpu::Activations;
using cpu::Pool;
using cpu::Result;

// Elements [k0, k0 + count) of row i as float32, as they were before any quantization.
inline void read_row(const Activations& x, int64_t i, int64_t k0, int64_t count, float* out) {
  const int64_t at = (x.index ? x.index[i] : i) * x.stride + k0;
  switch (x.dtype) {
    case Dtype::f32:
      return widen<float>(x.x, at, count, out);
    case Dtype::f16:
      return widen<f16>(x.x, at, count, out);
    case Dtype::bf16:
      return widen<bf16>(x.x, at, count, out);
  }
}

// True when any element is so large (or infinite, or NaN) that code * x could overflow before
// the scale is applied: such rows go to the kernel that decodes weights fully first.
inline bool extreme(const float* row, int64_t K) {
  uint32_t any = 0;
  for (int64_t k = 0; k < K; k++)
    any |= uint32_t((to_bits(row[k]) & 0x7f800000u) >= (227u << 23));
  return any != 0;
}

template <class T>
inline void narrow(const float* in, int64_t n, T* out) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, load(in + i));
  for (; i < n; i++) out[i] = from_float<T>(in[i]);
}

// y[row, first .. first+n) = alpha * sum + bias.
inline void write_row(const Result& y, int64_t row, int64_t first, int64_t n, float* sum) {
  if (y.alpha != 1.0f)
    for (int64_t i = 0; i < n; i++) sum[i] *= y.alpha;
  if (y.bias) {
    const auto add_bias = [&](const auto* b) {
      for (int64_t i = 0; i < n; i++) sum[i] += to_float(b[first + i]);
    };
    switch (y.bias_dtype) {
      case Dtype::f32:
        add_bias(static_cast<const float*>(y.bias));
        break;
      case Dtype::f16:
        add_bias(static_cast<const f16*>(y.bias));
        break;
      case Dtype::bf16:
        add_bias(static_cast<const bf16*>(y.bias));
        break;
    }
  }
  const int64_t at = (y.index ? y.index[row] : row) * y.stride + first;
  switch (y.dtype) {
    case Dtype::f32:
      return narrow(sum, n, static_cast<float*>(y.y) + at);
    case Dtype::f16:
      return narrow(sum, n, static_cast<f16*>(y.y) + at);
    case Dtype::bf16:
      return narrow(sum, n, static_cast<bf16*>(y.y) + at);
  }
}

LOWBIT_END
