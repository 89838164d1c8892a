// matmul for scales beyond what its decoder carries: slow, and right.
#pragma once

#include "matmul.h"

namespace lowbit::cuda {

#if LOWBIT_HOPPER

// Code k of a row.
template <int B>
__device__ __forceinline__ uint32_t one_code(const uint32_t* row, int64_t k) {
  const int64_t at = k * B / 32;
  const int shift = int(k * B % 32);
  uint32_t v = row[at] >> shift;
  if (shift + B > 32) v |= row[at + 1] << (32 - shift);
  return v & ((1u << B) - 1);
}

// One row of y, at every other token of 16 from `token` on, each weight by itself: for scales
// that the decoder cannot carry. Apart from MatmulGroup, whose members it would force into
// memory.
template <class F, class T, int kTokens>
__device__ __noinline__ void write_extreme(const MatmulArgs& a, int row, int token, int first,
                                           int step) {
  if (row >= a.N) return;
  float alpha = 1.0f, bias = 0.0f;
  if (a.global_w) alpha *= *a.global_w / Nvfp4::kGlobalMax;
  if (a.global_x) alpha *= *a.global_x / Nvfp4::kGlobalMax;
  if (a.bias)
    bias = a.bias_is_f32 ? static_cast<const float*>(a.bias)[row]
                         : float(static_cast<const T*>(a.bias)[row]);
  const auto* codes = reinterpret_cast<const uint32_t*>(a.code_data + row * a.row_bytes);
  const int64_t scales = int64_t(row) * (a.K / F::kGroup);
  for (int i = first; i < kTokens / 16; i += step)
    for (int t = token + 16 * i; t < min(token + 16 * i + 15, a.M); t += 2) {
      const T* x = static_cast<const T*>(a.x_data) + int64_t(t) * a.K;
      float sum = 0.0f;
      for (int k = 0; k < a.K; k++) {
        const int64_t at = scales + k / F::kGroup;
        float w = F::Code::decode(one_code<F::kBits>(codes, k));
        if constexpr (F::kHasBias)
          w = fmaf(w, float(reinterpret_cast<const T*>(a.scales)[at]),
                   float(reinterpret_cast<const T*>(a.biases)[at]));
        else
          w *= F::Scale::decode(a.scales[at]);
        sum = fmaf(float(x[k]), w, sum);
      }
      static_cast<T*>(a.y_data)[int64_t(t) * a.N + row] = T(fmaf(alpha, sum, bias));
    }
}

#endif  // LOWBIT_HOPPER

}  // namespace lowbit::cuda
