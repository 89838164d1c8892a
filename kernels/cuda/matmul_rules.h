// Which products matmul takes, and how it should run them. No CUDA: plan() includes it.
#pragma once

#include "plan.h"

namespace lowbit::cuda {

// wgmma on compute capability 9.0. x and codes are read by tensor copies: their rows, and the
// addresses of x and codes, are multiples of 16 bytes. Two-byte floats only; the e8m0 scales of
// mxfp4 and mxfp8 go beyond float16's range. Scales and biases are of x's type. qqmm is not
// its work; pairs: gather_matmul_supports.
inline bool matmul_supports(const Problem& p, const Device& device) {
  if (device.capability != 90 || device.shared_bytes < 227 * 1024) return false;
  if (p.format == Format::dense || !p.transpose || p.quantize_x) return false;
  const FormatInfo& f = kFormats[int(p.format)];
  if (p.dtype == Dtype::f32) return false;
  if (p.dtype == Dtype::f16 && !f.affine() && f.name != "nvfp4") return false;
  constexpr int64_t kMost = 0x7fffffff - 1024;
  if (p.M < 1 || p.N < 1 || p.K < 1 || p.M > kMost || p.N > kMost || p.K > kMost) return false;
  if (p.N * (p.K / f.group_size) * 2 > 0xffffffff) return false;  // offsets of scales
  return p.K % 8 == 0 && p.K * f.bits / 8 % 16 == 0;
}

// Whether x is better in lane order (lane_order.h), where a pass over x exists that can bring
// it into that: qqmm's. Stored and lane order, qqmm with that pass, 4096x14336: nvfp4 M=64 26.3
// and 24.6 us, M=256 51.3 and 50.8, M=2048 352 and 343; mxfp8 M=32 23.5 and 22.1, M=64 26.8 and
// 25.4, M=256 56.2 and 56.4, M=2048 387 and 377; 14336x4096 M=64 nvfp4 30.7 and 29.6,
// mxfp8 30.8 and 29.7 (H200, 2026-11-29). With 128 tokens: 4096x14336 M=128 nvfp4 33.8
// and 30.8, mxfp8 36.1 and 33.3; 14336x4096 M=256 61.6 and 57.3, 66.0 and 58.7 (2026-11-30).
constexpr bool matmul_lane_order(Format format) { return !kFormats[int(format)].affine(); }

// Clusters of `blocks` that run at once: less than processors / blocks, since a cluster stays
// within one GPC. An H200 (132 multiprocessors) runs 66 of 2, 39 of 3, 30 of 4, 17 of 6.
constexpr int64_t clusters_at_once(int processors, int blocks) {
  return blocks <= 2 ? processors / blocks
                     : processors * (blocks <= 4 ? 90 : 78) / 100 / blocks;
}

// The tiling that a model of the time prefers: rounds of tiles, each so long as its units of
// 128 k, and what begins and ends a tile. Microseconds, from 4-bit g64, bf16, H200, 2026-11-22
// (tokens, split: 4096x14336 M=64: 64, 1: 22.5; 4096x4096 M=64: 64, 3: 12.9; 2026-11-23:
// 4096x14336 M=16: 16, 1: 18.4; M=32: 32, 1: 19.4; 4096x4096 M=16: 16, 3: 10.7; M=32: 32, 3:
// 11.1). From 128 tokens on the GPU's power is what limits (FLOORS.md). Tiles of at most 128
// and of 256 tokens, 2026-11-29:
//
//   K x N         M = 140     192     256     320     384     500     640     768     1000
//   4096x14336    53 47   54 50   55 51   82 94   81 94  122 99 154 146 187 146  215 212
//   14336x4096    47 56   51 57   53 60           90 88  103 98 146 150
//   4096x4096     18 19   18 20   18 21   26 30   27 30   30 32           53 46
//
// A last round may leave multiprocessors idle: 20 of 132 beside the 112 tiles of N = 14336.
// That they take units of the others' tiles and hand over their sums through memory, in a fixed
// order, was tried and is slower: 4-bit 4096x14336, M=64: 28.1 us with the last 2 of 32 units
// by helpers, 34.9 with 4, 21.7 without help; M=16 25.5 with 4, 17.0 without; M=256 59.6 with
// 2, 54.9 without. A helper has up to 6 pieces, and each costs it 3300 cycles beyond its units
// with 64 tokens, 6500 with 256 (128 KB of sums leave a multiprocessor at some 30 bytes a
// cycle), and the tile's own block 1400 (3000) to add, where 4 units are 3400 (9600). A third
// of the 3300 waits for the sums to be seen, a third were avoidable divisions: with the rest
// alone it would be even. (H200, 2026-11-29.)
//
// With x shared by two blocks a unit takes `shared` times as long (4-bit 4096x14336, not shared
// and shared: M=64 21.4 and 22.6, M=128 32.3 and 32.4, M=256 54.7 and 54.1, M=2048 394 and 383;
// mxfp8 M=2048 396 and 391; 14336x4096 M=2048 394 and 377; H200, 2026-11-29).
struct MatmulTiling {
  int tokens;
  float unit, tile, shared;
};
inline constexpr MatmulTiling kMatmulTilings[] = {{16, 0.44f, 3.3f, 1.07f},
                                                  {32, 0.48f, 3.3f, 1.07f},
                                                  {64, 0.52f, 4.9f, 1.07f},
                                                  {128, 0.80f, 4.0f, 1.0f},
                                                  {256, 1.45f, 5.6f, 0.98f}};

// Whether matmul is faster than matvec where both can: beyond 8 rows of x, but for e2m1, whose
// codes matvec decodes in fewer instructions, and beyond 4 of large matrices of 8 bits, unless
// matvec also quantizes x.
// 4096x14336, M=16, matvec and matmul: 4-bit 23.1 and 17.2, 3-bit 23.3 and 17.6, nvfp4 21.4 and
// 23.8 us; M=8: 8-bit 22.8 and 20.8, mxfp8 22.2 and 21.1, but 4096x4096 10.9 and 12.2, 10.4 and
// 12.5 (H200, 2026-11-28). Few rows of W make few tiles of 128: 4096x1024, matmul and matvec,
// M = 9 and 16: 4-bit 9.7 and 7.9, 9.7 and 8.8; 3-bit 9.8 and 9.2, 9.9 and 10.0; 8-bit 10.0 and
// 8.9, 10.1 and 10.0; mxfp8 10.8 and 8.1, 10.8 and 9.1; but 4096x2048 M = 16 8-bit 10.4
// and 11.2 (H200, 2026-11-29).
inline bool matmul_preferred(const Problem& p) {
  const FormatInfo& f = kFormats[int(p.format)];
  const bool large = p.N * p.K > int64_t(1) << 25 && !p.quantize_x;
  const bool few_tiles = p.N <= 1024 && p.K <= 4096;
  const bool many = p.M > 8 && (f.affine() || f.bits == 8);
  return !few_tiles && (many || (p.M > 4 && f.bits == 8 && large));
}

// Parts of K that a cluster has; more are two clusters'. 14336x4096, 32 tiles of 128 rows: 32
// clusters of three blocks are 96 of 132 multiprocessors, 32 of four do not run at once, 64 of
// two do. Clusters of three and two of two, M = 33, 64, 128: 3-bit 25.5 23.9, 25.9 25.5, 36.7
// 34.7 us; 4-bit 24.3 22.9, 24.5 23.7, 35.8 33.5; 8-bit 26.4 26.9, 28.5 28.4, 39.4 37.6; mxfp8
// 28.5 26.3, 29.5 28.3, 40.8 38.5; nvfp4 28.0 25.7, 28.1 25.8, 39.5 37.0 (H200, 2026-11-29).
// What the second to come pays for is in the model: 2.5 us, and 0.008 a token.
inline constexpr int kMostClusterSplit = 3;
constexpr int clusters_of_tile(int split) { return split > kMostClusterSplit ? 2 : 1; }
// Of so many units of 128 k, what each part has but maybe the last: even, since two warpgroups
// take them in turn.
constexpr int64_t units_of_part(int64_t units, int split) {
  return ((units + split - 1) / split + 1) / 2 * 2;
}
// Whether the last part has any.
constexpr bool splits(int64_t units, int split) {
  return units_of_part(units, split) * (split - 1) < units;
}

inline Plan matmul_plan(const Problem& p, const Device& device) {
  const auto up = [](int64_t n, int64_t by) { return (n + by - 1) / by; };
  Plan best{};
  float least = 0.0f;
  for (const MatmulTiling& t : kMatmulTilings)
    for (int share : {1, 2})
      for (int split : {1, 2, 3, 4}) {
        const int halves = clusters_of_tile(split);
        const int64_t units = up(p.K, 128), part = units_of_part(units, split);
        if (!splits(units, split)) continue;
        const int64_t tiles = up(p.N, 128 * share) * up(p.M, t.tokens);
        const int64_t rounds =
            up(tiles * halves, clusters_at_once(device.processors, share * split / halves));
        if (halves == 2 && (rounds > 1 || t.tokens > 128)) continue;
        // Sharing x spares the L2 cache, and ties two blocks together.
        const float unit = t.unit * (share == 2 ? t.shared : 1.0f);
        // A block of a split tile ends with it.
        const float end = t.tile + (split > 1 ? 1.0f : 0.0f);
        const float time = float(rounds) * (float(split > 1 ? part : units) * unit + 1.0f) +
                           (split > 1 ? float(rounds) : 1.0f) * end +
                           (share == 2 ? 0.1f : 0.0f) +
                           (halves == 2 ? 2.5f + 0.008f * float(t.tokens) : 0.0f);
        if (least != 0.0f && time >= least) continue;
        least = time;
        best = {Plan::Kernel::matmul, t.tokens, 128 * share, t.tokens == 256 ? 4 : 8, split};
      }
  return best;
}

// Gathered: `rows` of x in all, sorted by the matrix of w, of `matrices`, that they meet. Rows
// of w are counted over all matrices; offsets of scales stay within one.
inline bool gather_matmul_supports(const Problem& p, const Device& device, int64_t rows,
                                   int64_t matrices) {
  constexpr int64_t kMost = 0x7fffffff - 1024;
  Problem of_one = p;
  of_one.M = rows;
  if (!groups(rows, matrices) || !matmul_supports(of_one, device)) return false;
  return p.N <= kMost / matrices;
}

// Gathered tiles of 256 tokens take 32 more, which a few more than 256 rows of a matrix then
// need no second tile for, with its decoding, and they multiply 256 or 64 where that is enough.
// 4096 tokens, top 8 of 128 matrices of 4096x1408 (256 rows each, give or take 16), 3-bit, in
// order: 848 us without them, 752 with (H200, 2026-11-23).
inline constexpr int kGatheredTokens = 288;

// The same model, with the tiles that rows are expected to fill: a matrix's last tile is half
// full on average, and each matrix that is hit has one. How many there will be is not known
// here, so rounds are not whole.
inline Plan gather_matmul_plan(const Problem& p, const Device& device, int64_t rows,
                               int64_t matrices) {
  const auto up = [](int64_t n, int64_t by) { return (n + by - 1) / by; };
  const int64_t hit = rows < matrices ? rows : matrices;
  const float rows_of_one = float(rows) / float(hit), units = float(up(p.K, 128));
  Plan best{};
  float least = 0.0f;
  for (const MatmulTiling& t : kMatmulTilings)
    for (int share : {1, 2}) {
      const bool large = t.tokens == 256;
      const int tokens = large ? kGatheredTokens : t.tokens;
      const float expected = rows_of_one / float(tokens) + (large ? 0.25f : 0.5f);
      const float token_tiles = float(hit) * (expected < 1.0f ? 1.0f : expected);
      const float rounds = float(up(p.N, 128 * share)) * token_tiles /
                           float(clusters_at_once(device.processors, share));
      // As for products of one matrix before shared x was copied without divisions; with
      // gathered tiles `shared` has not been measured.
      const float unit = t.unit * (share == 2 && t.tokens <= 64 ? 1.25f : 1.0f);
      const float time = (rounds < 0.5f ? 1.0f : rounds + 0.5f) * (units * unit + 1.0f) +
                         t.tile + (share == 2 ? 0.1f : 0.0f);
      if (least != 0.0f && time >= least) continue;
      least = time;
      best = {Plan::Kernel::matmul, tokens, 128 * share, large ? 4 : 8, 1};
    }
  return best;
}

}  // namespace lowbit::cuda
