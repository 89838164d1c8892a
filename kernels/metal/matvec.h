// Few rows of x: every weight is read once, whatever their number.
//
// A simdgroup takes kRows rows of w and all tokens of a tile; its lanes take the chunks of K in
// turn, so that 32 lanes read 32 chunks of a row that lie one after the other. Codes meet x in
// float32; a group's scale and bias are applied to its sums, exactly:
//   acc += scale * sum(code * x) + bias * sum(x)
// Grid: (rows of w / (kRows * simdgroups), token tiles, pairs).
#pragma once

#include "load.h"

namespace lowbit {

constant constexpr int kRows = 4;

template <class F, class T, int Tokens>
METAL_FUNC void add_chunk(thread float (&acc)[kRows][Tokens],
                          const thread Chunk<F> (&codes)[kRows],
                          const thread Scale (&scale)[kRows][Chunk<F>::kScales],
                          const device T* x, int K, int tokens, int count) {
  constexpr int kGroup = Chunk<F>::kGroup, kStep = 8;
  for (int g = 0; g < Chunk<F>::kScales; g++) {
    if (g * kGroup >= count) break;
    float dot[kRows][Tokens] = {}, sum[Tokens] = {};
    for (int step = 0; step < kGroup; step += kStep) {
      float part[Tokens][kStep];
      for (int t = 0; t < Tokens; t++) {
        const device T* from = x + ulong(min(t, tokens - 1)) * K + g * kGroup + step;
        for (int i = 0; i < kStep; i++) {
          part[t][i] = float(from[i]);
          sum[t] += part[t][i];
        }
      }
      for (int r = 0; r < kRows; r++)
        for (int i = 0; i < kStep; i++) {
          const float value = codes[r].value(g * kGroup + step + i);
          for (int t = 0; t < Tokens; t++) dot[r][t] = fma(value, part[t][i], dot[r][t]);
        }
    }
    for (int r = 0; r < kRows; r++)
      for (int t = 0; t < Tokens; t++) {
        acc[r][t] = fma(scale[r][g].scale, dot[r][t], acc[r][t]);
        if (F::kHasBias) acc[r][t] = fma(scale[r][g].bias, sum[t], acc[r][t]);
      }
  }
}

template <class F, class T, int Tokens>
[[kernel]] void matvec(
    const constant metal_args::ProductArgs& args [[buffer(0)]], const device T* x [[buffer(1)]],
    const device uint* w [[buffer(2)]], const device uchar* scales [[buffer(3)]],
    const device uchar* biases [[buffer(4)]], const device uchar* bias [[buffer(5)]],
    const device float* global_x [[buffer(6)]], const device float* global_w [[buffer(7)]],
    const device long* lhs [[buffer(8)]], const device long* rhs [[buffer(9)]],
    device uchar* y [[buffer(10)]], uint3 tile [[threadgroup_position_in_grid]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  const int N = args.N, K = args.K, first_row = int(tile.x * simdgroups + simdgroup) * kRows;
  const int first = int(tile.y) * Tokens, tokens = min(Tokens, args.M - first);
  const long pair = long(tile.z);
  const long of_x = gather ? lhs[pair] : 0, matrix = gather ? rhs[pair] : 0;
  const bool exists =
      of_x >= 0 && of_x < args.x_matrices && matrix >= 0 && matrix < args.w_matrices;
  if (first_row >= N) return;

  float acc[kRows][Tokens] = {};
  if (exists) {
    const int chunks = (K + kChunk - 1) / kChunk, groups = K / F::kGroup;
    const ulong row_words = ulong(K) * F::kBits / 32;
    const device T* rows_of_x = x + (ulong(of_x) * args.M + first) * K;
    for (int chunk = int(lane); chunk < chunks; chunk += 32) {
      const int count = min(kChunk, K - chunk * kChunk);
      Chunk<F> codes[kRows];
      Scale scale[kRows][Chunk<F>::kScales];
      for (int r = 0; r < kRows; r++) {
        const ulong row = ulong(matrix) * N + min(first_row + r, N - 1);
        codes[r].load(w + row * row_words + chunk * F::kBits, count);
        for (int g = 0; g < Chunk<F>::kScales; g++) {
          const int group =
              min((chunk * kChunk + g * Chunk<F>::kGroup) / F::kGroup, groups - 1);
          scale[r][g] = load_scale<F>(scales, biases, row * groups + group);
        }
      }
      add_chunk<F, T, Tokens>(acc, codes, scale, rows_of_x + chunk * kChunk, K, tokens, count);
    }
  }

  // Each lane has one of the results.
  float mine = 0.0f;
  for (int r = 0; r < kRows; r++)
    for (int t = 0; t < Tokens; t++) {
      const float sum = simd_sum(acc[r][t]);
      if (int(lane) == t * kRows + r) mine = sum;
    }
  const int n = first_row + int(lane) % kRows, t = int(lane) / kRows;
  if (n >= N || t >= tokens) return;
  float value = not_a_number();
  if (exists) {
    value = mine * alpha_of(args, global_x, global_w, matrix);
    if (bias_type >= 0) value += load_float(bias, ulong(matrix) * N + n, bias_type);
  }
  store_float(y, (ulong(pair) * args.M + first + t) * N + n, value, y_type);
}

}  // namespace lowbit
