// Many rows of x, as products of 8x8 matrices: y^T = w * x^T, a tile of 32 rows of w (16 beside
// 128 tokens) and `Tokens` rows of x for each simdgroup, float32 sums.
//
// Weights go from device memory to the fragments of their products without threadgroup memory.
// Lane l has the elements (row, column) and (row, column + 1) of an 8x8 matrix, four lanes a
// row (fragment_row, quarter). Each of the four reads a chunk of its own of that row, 128 codes
// of K in all, and the fragments take codes 2 i and 2 i + 1 of every chunk in turn: fragment i
// has
//   column 2 * quarter + j   =   k 32 * quarter + 2 * i + j
// Sums over k do not mind the order, as long as x has the same: it is staged for all simdgroups
// of a threadgroup with the row of k at (code / 2) * 8 + 2 * quarter + code % 2. Tiles wider
// than what threadgroup memory holds stage x in parts, and decode the codes that registers keep
// again for each: weights are read once a tile.
//
// Grid: (rows of w / (32 * simdgroups), token tiles, 1); pairs come sorted by matrix (group.h),
// their tiles one matrix after the other.
#pragma once

#include <metal_simdgroup_matrix>

#include "load.h"

namespace lowbit {

constant constexpr int kDepth = 128;  // of K, staged at a time
// Of 8 rows of w, for a simdgroup: its sums are 64 registers a lane at most.
constexpr int fragments_beside(int tokens) { return tokens > 64 ? 2 : 4; }
// Tokens staged at a time: 128 codes of them and their padding are 18 KiB.
constexpr int staged_tokens(int tokens, int bytes) {
  return tokens * bytes > 128 ? 128 / bytes : tokens;
}
constant constexpr int kPad = 8;  // so that rows of x^T lie in different banks

// The rows of x and y of a tile; -1 where there is none. A row of y whose pair does not exist
// is to be NaN: its row of x is kNoX.
constant constexpr int kNoRow = -1, kNoX = -2;

// What x and weights are multiplied as: x's type, where it holds every weight. Powers of two of
// e8m0 reach beyond float16.
template <class F, class T>
struct Operand {
  using type = T;
};
template <>
struct Operand<Mxfp4, half> {
  using type = float;
};
template <>
struct Operand<Mxfp8, half> {
  using type = float;
};

template <class C, class T, int Tokens>
METAL_FUNC void stage_x(threadgroup C* staged, const threadgroup int* rows, const device T* x,
                        int K, int k0, uint thread_index, uint threads) {
  for (int i = int(thread_index); i < kDepth * Tokens; i += int(threads)) {
    const int token = i / kDepth, at = i % kDepth, code = at % kChunk;
    const int row = (code / 2) * 8 + 2 * (at / kChunk) + code % 2;
    C value = C(0.0f);
    if (rows[token] >= 0 && k0 + at < K) value = C(x[ulong(rows[token]) * K + k0 + at]);
    staged[row * (Tokens + kPad) + token] = value;
  }
}

// Which rows a tile of sorted pairs has: `starts` of the matrices, from GroupArgs' layout.
// Returns the matrix, w_matrices for pairs without one, or -1 where the tile does not exist.
METAL_FUNC int find_tile(const device int* starts, int matrices, int tile, int tokens,
                         thread int& first, thread int& count) {
  for (int m = 0; m <= matrices; m++) {
    const int rows = starts[m + 1] - starts[m], tiles = (rows + tokens - 1) / tokens;
    if (tile < tiles) {
      first = starts[m] + tile * tokens;
      count = min(tokens, rows - tile * tokens);
      return m;
    }
    tile -= tiles;
  }
  return -1;
}

template <class F, class T, int Tokens>
[[kernel]] void matmul(
    const constant metal_args::ProductArgs& args [[buffer(0)]], const device T* x [[buffer(1)]],
    const device uint* w [[buffer(2)]], const device uchar* scales [[buffer(3)]],
    const device uchar* biases [[buffer(4)]], const device uchar* bias [[buffer(5)]],
    const device float* global_x [[buffer(6)]], const device float* global_w [[buffer(7)]],
    const device long* lhs [[buffer(8)]], device uchar* y [[buffer(10)]],
    const device int* groups_of_rows [[buffer(11)]],
    uint3 tile [[threadgroup_position_in_grid]],
    uint thread_index [[thread_index_in_threadgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  using C = typename Operand<F, T>::type;
  constexpr int kFragments = fragments_beside(Tokens), kPart = staged_tokens(Tokens, sizeof(C));
  threadgroup C staged[kDepth * (kPart + kPad)];
  threadgroup int x_rows[Tokens];
  threadgroup int y_rows[Tokens];
  const int N = args.N, K = args.K;
  const uint threads = simdgroups * 32;

  int matrix = 0, first = int(tile.y) * Tokens, count = min(Tokens, args.M - first);
  if (grouped) {
    const device int* starts = groups_of_rows + args.pairs * args.M;
    matrix = find_tile(starts, args.w_matrices, int(tile.y), Tokens, first, count);
    if (matrix < 0) return;
  }
  for (int t = int(thread_index); t < Tokens; t += int(threads)) {
    int of_x = kNoRow, of_y = kNoRow;
    if (t < count && !grouped) of_x = of_y = first + t;
    if (t < count && grouped) {
      of_y = groups_of_rows[first + t];
      const long from = lhs[of_y / args.M];
      const bool exists = matrix < args.w_matrices && from >= 0 && from < args.x_matrices;
      of_x = exists ? int(from) * args.M + of_y % args.M : kNoX;
    }
    x_rows[t] = of_x, y_rows[t] = of_y;
  }

  const int quad = int(lane) / 4, fragment_row = (quad & 4) + (int(lane) / 2) % 4;
  const int quarter = (quad & 2) / 2 * 2 + int(lane) % 2;
  // Lanes of a row whose chunks share a group: the first of them loads its scale.
  constexpr int kSharing = F::kGroup > kChunk ? F::kGroup / kChunk : 1;
  const int first_of_group = quarter / kSharing * kSharing;
  const ushort leader = ushort((fragment_row & 4) << 2 | (first_of_group & 2) << 2 |
                               (fragment_row & 3) << 1 | (first_of_group & 1));
  const int first_row = int(tile.x * simdgroups + simdgroup) * 8 * kFragments;
  const int chunks = (K + kChunk - 1) / kChunk, groups = K / F::kGroup;
  const ulong row_words = ulong(K) * F::kBits / 32;
  const ulong first_of_matrix = matrix < args.w_matrices ? ulong(matrix) * N : 0;

  simdgroup_matrix<float, 8, 8> sums[kFragments][Tokens / 8];
  for (int f = 0; f < kFragments; f++)
    for (int t = 0; t < Tokens / 8; t++) sums[f][t] = simdgroup_matrix<float, 8, 8>(0.0f);

  for (int k0 = 0; k0 < K; k0 += kDepth) {
    const int chunk = k0 / kChunk + quarter;
    const int codes_there = max(0, min(kChunk, K - chunk * kChunk));
    Chunk<F> codes[kFragments];
    Scale scale[kFragments][Chunk<F>::kScales];
    for (int f = 0; f < kFragments; f++) {
      const ulong row = first_of_matrix + min(first_row + 8 * f + fragment_row, N - 1);
      const int from = min(chunk, chunks - 1);
      codes[f].load(w + row * row_words + from * F::kBits, codes_there);
      for (int g = 0; g < Chunk<F>::kScales; g++) {
        const int group = (from * kChunk + g * Chunk<F>::kGroup) / F::kGroup;
        Scale loaded = {0.0f, 0.0f};
        if (quarter == first_of_group)
          loaded = load_scale<F>(scales, biases, row * groups + min(group, groups - 1));
        if (kSharing > 1) {
          loaded.scale = simd_shuffle(loaded.scale, leader);
          loaded.bias = simd_shuffle(loaded.bias, leader);
        }
        scale[f][g] = loaded;
      }
    }
    for (int first_token = 0; first_token < Tokens; first_token += kPart) {
      threadgroup_barrier(mem_flags::mem_threadgroup);
      stage_x<C, T, kPart>(staged, x_rows + first_token, x, K, k0, thread_index, threads);
      threadgroup_barrier(mem_flags::mem_threadgroup);
      // Codes that do not exist meet zeros of x; their weights are finite numbers at most.
      for (int i = 0; i < kChunk / 2; i++) {
        simdgroup_matrix<C, 8, 8> weights[kFragments];
        for (int f = 0; f < kFragments; f++) {
          const Scale s = scale[f][2 * i / Chunk<F>::kGroup];
          for (int j = 0; j < 2; j++) {
            const float value = fma(s.scale, codes[f].value(2 * i + j), s.bias);
            weights[f].thread_elements()[j] = C(2 * i < codes_there ? value : 0.0f);
          }
        }
        for (int t = 0; t < kPart / 8; t++) {
          simdgroup_matrix<C, 8, 8> tokens;
          simdgroup_load(tokens, staged + i * 8 * (kPart + kPad) + 8 * t, kPart + kPad);
          for (int f = 0; f < kFragments; f++)
            simdgroup_multiply_accumulate(sums[f][first_token / 8 + t], weights[f], tokens,
                                          sums[f][first_token / 8 + t]);
        }
      }
    }
  }

  const float alpha =
      matrix < args.w_matrices ? alpha_of(args, global_x, global_w, matrix) : 0.0f;
  for (int f = 0; f < kFragments; f++) {
    const int n = first_row + 8 * f + fragment_row;
    if (n >= N) break;
    float add = 0.0f;
    if (bias_type >= 0 && matrix < args.w_matrices)
      add = load_float(bias, first_of_matrix + n, bias_type);
    for (int t = 0; t < Tokens / 8; t++)
      for (int j = 0; j < 2; j++) {
        const int token = 8 * t + 2 * quarter + j;
        if (y_rows[token] < 0) continue;
        const float value = x_rows[token] == kNoX
                                ? not_a_number()
                                : sums[f][t].thread_elements()[j] * alpha + add;
        store_float(y, ulong(y_rows[token]) * N + n, value, y_type);
      }
  }
}

}  // namespace lowbit
