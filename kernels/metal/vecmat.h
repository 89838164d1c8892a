// Packed matrices as [K, N]: y[M, N] = x[M, K] @ w, what gradients of x need.
//
// Rows of w are added up, each weighted by an element of x. A lane keeps the sums of a chunk of
// 32 columns for `Tokens` rows of x; the lanes of a simdgroup read chunks that lie one after
// the other. Grid: (columns / (1024 * simdgroups), token tiles, pairs).
#pragma once

#include "load.h"

namespace lowbit {

template <class F, class T, int Tokens>
[[kernel]] void vecmat(
    const constant metal_args::ProductArgs& args [[buffer(0)]], const device T* x [[buffer(1)]],
    const device uint* w [[buffer(2)]], const device uchar* scales [[buffer(3)]],
    const device uchar* biases [[buffer(4)]], const device uchar* bias [[buffer(5)]],
    const device float* global_x [[buffer(6)]], const device float* global_w [[buffer(7)]],
    const device long* lhs [[buffer(8)]], const device long* rhs [[buffer(9)]],
    device uchar* y [[buffer(10)]], uint3 tile [[threadgroup_position_in_grid]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  const int N = args.N, K = args.K;
  const int chunk = int(tile.x * simdgroups + simdgroup) * 32 + int(lane);
  const int count = min(kChunk, N - chunk * kChunk);
  const int first = int(tile.y) * Tokens, tokens = min(Tokens, args.M - first);
  const long pair = long(tile.z);
  const long of_x = gather ? lhs[pair] : 0, matrix = gather ? rhs[pair] : 0;
  const bool exists =
      of_x >= 0 && of_x < args.x_matrices && matrix >= 0 && matrix < args.w_matrices;
  if (count <= 0) return;

  float acc[Tokens][kChunk] = {};
  if (exists) {
    const int groups = N / F::kGroup;
    const ulong row_words = ulong(N) * F::kBits / 32;
    const device T* rows_of_x = x + (ulong(of_x) * args.M + first) * K;
    for (int k = 0; k < K; k++) {
      const ulong row = ulong(matrix) * K + k;
      Chunk<F> codes;
      codes.load(w + row * row_words + chunk * F::kBits, count);
      for (int g = 0; g < Chunk<F>::kScales; g++) {
        const int group = min((chunk * kChunk + g * Chunk<F>::kGroup) / F::kGroup, groups - 1);
        const Scale s = load_scale<F>(scales, biases, row * groups + group);
        for (int t = 0; t < Tokens; t++) {
          const float value = float(rows_of_x[ulong(min(t, tokens - 1)) * K + k]);
          for (int i = g * Chunk<F>::kGroup; i < (g + 1) * Chunk<F>::kGroup; i++)
            acc[t][i] = fma(value, fma(s.scale, codes.value(i), s.bias), acc[t][i]);
        }
      }
    }
  }

  const float alpha = exists ? alpha_of(args, global_x, global_w, matrix) : 0.0f;
  for (int t = 0; t < tokens; t++)
    for (int i = 0; i < count; i++) {
      const int n = chunk * kChunk + i;
      float value = not_a_number();
      if (exists) {
        value = acc[t][i] * alpha;
        if (bias_type >= 0) value += load_float(bias, ulong(matrix) * N + n, bias_type);
      }
      store_float(y, (ulong(pair) * args.M + first + t) * N + n, value, y_type);
    }
}

}  // namespace lowbit
