// matmul for scales beyond what its decoder carries: slow, and right.
#pragma once

#include "lane_order.h"
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
// that the decoder cannot carry. place: of the tile, see each_tile. Apart from MatmulGroup,
// whose members it would force into memory; and numbers instead of a tile, which took plain
// kernels registers.
template <class F, class T, int kTokens, bool kGather>
__device__ __noinline__ void write_extreme(const MatmulArgs& a, int row, int token, int first,
                                           int step, int place) {
  const MatmulTile<kGather> tile(a.gather, row, place);
  const int end = tile.end(a.M);
  if (row >= a.N) return;
  const int64_t w_row = tile.first_row(a.N) + row;
  float alpha = 1.0f, bias = 0.0f;
  if (a.global_w) alpha *= tile.global_w(a.gather, a.global_w) / Nvfp4::kGlobalMax;
  if (a.global_x) alpha *= *a.global_x / Nvfp4::kGlobalMax;
  if (a.bias)
    bias = a.bias_is_f32 ? static_cast<const float*>(a.bias)[w_row]
                         : float(static_cast<const T*>(a.bias)[w_row]);
  const void* x_data = tile.copied(a.gather) ? a.sorted_x_data : a.x_data;
  const auto* codes = reinterpret_cast<const uint32_t*>(a.code_data + w_row * a.row_bytes);
  const int64_t scales = w_row * (a.K / F::kGroup);
  for (int i = first; i < kTokens / 16; i += step)
    for (int t = token + 16 * i; t < min(token + 16 * i + 15, end); t += 2) {
      const T* x = static_cast<const T*>(x_data) + int64_t(t) * a.x_columns;
      float sum = 0.0f;
      for (int k = 0; k < a.K; k++) {
        const int64_t at = scales + k / F::kGroup;
        float w = F::Code::decode(one_code<F::kBits>(codes, k));
        if constexpr (F::kHasBias)
          w = fmaf(w, float(reinterpret_cast<const T*>(a.scales)[at]),
                   float(reinterpret_cast<const T*>(a.biases)[at]));
        else
          w *= F::Scale::decode(a.scales[at]);
        sum = fmaf(float(x[a.lane_order ? lane_order_place(k, F::kBits) : k]), w, sum);
      }
      static_cast<T*>(a.y_data)[int64_t(tile.y_row(a.gather, t)) * a.N + row] =
          T(fmaf(alpha, sum, bias));
    }
}

#endif  // LOWBIT_HOPPER

}  // namespace lowbit::cuda
