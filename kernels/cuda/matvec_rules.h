// Which products matvec takes, and the sizes of its blocks. No CUDA: plan() includes it.
#pragma once

#include "plan.h"

namespace lowbit::cuda {

// A block of matvec: what it holds in shared memory, which decides how K must be split.
struct MatvecSizes {
  int bits, group;
  bool affine;
  int tokens;  // 1, 4, 8 or 16: rows of x, padded

  // Whether the scales of groups of 16 meet the codes, and not sums of products. With columns
  // of the accumulators free (below), each of a block's two groups has columns of its own, and
  // scales are applied to sums: 20 instructions an mma where folding takes 30 (nvfp4
  // 4096x14336, M = 1: 16.5 and 14.8 us, M = 4: 16.4 and 14.7; H200, 2026-11-28).
  constexpr bool folded() const { return group < 32 && tokens >= 8; }
  // Whether codes meet x as integers (matvec_integer.h). 4096x14336, H200, integers against
  // floats in one run: 4-bit M = 1 13.3 / 13.8, M = 4 14.1 / 13.9; 8-bit 19.3 / 21.1, 19.5 /
  // 20.7, M = 8 23.9 / 21.8 us (2026-11-22); 3-bit M = 1 14.5 / 13.7 (2026-11-23).
  constexpr bool integer() const {
    return in_place() || (affine && ((tokens == 1 && bits != 3) || (bits == 8 && tokens == 4)));
  }
  // Whether codes meet x in the bytes in which they are stored (matvec_in_place.h). Otherwise
  // and so, M = 1: 3-bit 4096x14336 12.3 and 10.2 us, 14336x4096 12.7 and 11.5, 4096x4096 6.1
  // and 5.4; 4-bit 12.2 and 11.9, 11.9 and 11.4, 5.8 and 5.7 (H200, 2026-11-29).
  constexpr bool in_place() const {
    return affine && tokens == 1 && (bits == 3 || bits == 4) && group >= 64;
  }
  // Warps that multiply, and those that copy: the copy engine takes a row at a time, and one
  // warp alone asks for about one in 40 ns (4-bit 4096x14336, M = 1: 19.9 us with one, 13.8
  // with 4, 14.3 with 8; H200, 2026-11-22).
  static constexpr int kWarps = 16, kCopyWarps = 4;
  // The warps that multiply form teams, which take tiles in turn: a team's sums of y wait for
  // its own warps alone, while the others multiply. 1, 2 and 4 teams at M = 8, 4096x14336:
  // 3-bit 16.1, 15.4, 14.5 us; experts of 16 tokens 101, 96, 89 (H200, 2026-11-23). As many as
  // the ring allows: at most this. mxfp8's ring is too short for 4, and one team meets after
  // each tile: 4096x14336 at M = 4 20.8 us, 18.7 with two (H200, 2026-11-29). With affine codes
  // of 8 bits two were no gain; one row of mxfp8, one team and two: 18.5 18.3, 4096x28672 32.4
  // 32.1, 4096x6144 10.1 9.9, 4096x4096 as long.
  constexpr int most_teams() const {
    if (tokens > 8 || (tokens == 1 && !slow() && !e4m3())) return 1;
    return e4m3() ? 2 : 4;
  }
  // One row of x whose products take longer than its copies.
  constexpr bool slow() const { return tokens == 1 && (affine ? bits == 3 : bits == 4); }
  // Whether x is read ahead while some of it is staged. Without and with, 14336x4096:
  // 3-bit 11.5 and 10.6 us, 8-bit 18.4 and 17.8, 4-bit 11.5 and 12.0 (H200, 2026-11-29; e2m1
  // not measured).
  constexpr bool reads_ahead() const { return tokens == 1 && bits != 4; }
  static constexpr int kSlice = 256, kRows = 16;  // a warp's turn: codes of each of these rows
  // Slices in a stage: long rows make few copies, short ones come and go sooner, which few
  // tiles a block want; and less than 3 stages keep too little under way. 16 and 8 slices,
  // 4-bit: 4096x14336 M = 8 14.6 and 13.5 us, 4096x4096 M = 1 6.3 and 6.1, M = 4 6.7 and 6.8,
  // experts of 16 tokens 77.6 and 80.2 (H200, 2026-11-23).
  // With one long row of x 3-bit 14336x4096 takes 10.5 us with 16 and 10.8 with 8, nvfp4 14.0
  // and 14.4, with 4096x4096 5.8 and 5.5, 7.4 and 6.9 (H200, 2026-11-29).
  constexpr int in_stage(int64_t part, bool gather) const {
    return gather || tokens == 4 || (slow() && part > 8192) ? 16 : 8;
  }
  static constexpr int kFewStages = 3;
  constexpr int scale_size() const { return affine ? 2 : 1; }
  constexpr int slice_scales() const { return kSlice / group * scale_size(); }  // bytes: 4..16
  // Slices whose scales are whole pieces of 16 bytes.
  constexpr int unit() const { return slice_scales() < 16 ? 16 / slice_scales() : 1; }
  // Blocks of 32 codes that a lane loads at once (load.h).
  constexpr int join() const { return affine && group >= 64 && bits != 5 ? 2 : 1; }
  // Bytes from row to row in a stage of `codes` a row: 8 rows of a fragment fall into different
  // banks when these are odd multiples of what one lane quad reads at once.
  constexpr int quad_words() const {
    return bits == 8 ? 2 * join() : bits != 4 ? 1 : in_place() ? 4 : join();
  }
  constexpr int code_row(int codes) const { return codes * bits / 8 + 16 * quad_words(); }
  constexpr int scale_row(int codes) const {
    return (codes / group * scale_size() + 15) / 16 / 2 * 32 + 16;
  }
  constexpr int stage(int codes) const {
    return kRows * (code_row(codes) + (affine ? 2 : 1) * scale_row(codes));
  }
  // Codes that x meets as float16, with a unit for each of its groups (matvec_float.h).
  constexpr bool e4m3() const { return !affine && bits == 8; }
  // Of x, staged.
  constexpr int x_bytes(int codes) const {
    return codes * tokens * (in_place() ? (bits == 3 ? 5 : 4) : integer() ? 3 : 2);
  }
  // Groups that meet the tensor cores at once, and zeros for the columns of the others; with
  // integers a slice, so that what a lane reads lies equally far from either.
  constexpr int span() const { return group < 32 ? 32 : group; }
  constexpr int zeros() const {
    return in_place()    ? x_bytes(kSlice)
           : integer()   ? (tokens != 1 ? 0 : span() / 32 * 96)
           : tokens >= 8 ? 0
                         : span() / 32 * tokens * 64;
  }
  // Tiles whose sums wait for the block's other warps: these then drift apart, and one's
  // arithmetic covers another's waits. A barrier for each tile: 16.0 us where this took 14.7
  // (4-bit 4096x14336, M = 1; H200, 2026-11-22).
  constexpr int flush() const { return tokens == 1 ? 8 : 1; }
  // Two for 8 tokens are no gain: experts of 64 tokens, 3-bit 116.7 us and 117.4 with two,
  // nvfp4 141.6 and 155.5 (H200, 2026-11-29).
  constexpr int rooms() const { return tokens >= 8 ? 1 : 2; }
  static constexpr int kTokenSums = 20;  // floats for 16 rows; lane quads in different banks
  constexpr int warp_sums() const { return tokens * kTokenSums; }
  constexpr int tile_sums() const { return kWarps * warp_sums(); }  // of all teams

  // Shared memory: barriers of the ring | x | zeros | group sums or units of x | warps' sums
  // of y | scale table | parts of y of the block's tiles (split_k) | ring of `stages` of
  // `codes` a row
  struct Layout {
    int x, zeros, x_sums, sums, table, parts, ring, bytes;
    int codes, stages, code_row, scale_row, stage, teams;
  };
  static constexpr int kMostStages = 16;
  // stages < 2: it does not fit.
  constexpr Layout layout(int64_t part, int tiles, int shared_bytes,
                          bool gather = false) const {
    const int padded = int((part + kSlice - 1) / kSlice * kSlice);
    Layout at{};
    at.x = kMostStages * 16;
    at.zeros = at.x + x_bytes(padded);
    at.x_sums = at.zeros + zeros();
    at.sums = at.x_sums + padded / group * tokens * (affine ? 8 : e4m3() ? 4 : 0);
    at.table = at.sums + rooms() * flush() * tile_sums() * 4;
    at.parts = at.table + (folded() ? 1024 : 0);
    at.ring = (at.parts + tiles * kRows * tokens * 4 + 127) / 128 * 128;
    const int units = (padded / kSlice + unit() - 1) / unit();
    const int most = in_stage(part, gather) / unit();
    int in_one = most < units ? most : units;  // units in a stage
    for (;; in_one = (in_one + 1) / 2) {
      at.codes = in_one * unit() * kSlice;
      at.code_row = code_row(at.codes), at.scale_row = scale_row(at.codes);
      at.stage = stage(at.codes);
      at.stages = (shared_bytes - at.ring) / at.stage;
      if (at.stages >= kFewStages || in_one == 1) break;
    }
    if (at.stages > kMostStages) at.stages = kMostStages;
    at.bytes = at.ring + at.stages * at.stage;
    // A barrier tells a round only from the one before. A team that comes to its next stage,
    // past those of the others, finds the ring at most one round behind only if it is longer
    // than they are together.
    const int of_tile = (padded + at.codes - 1) / at.codes;
    at.teams = at.stages < 1 + (most_teams() - 1) * of_tile ? 1 : most_teams();
    return at;
  }
  // Teams of a block that has about `tiles` tiles: with one row of x each should have one. 1, 2
  // and 4 teams, nvfp4 4096x28672 24.7, 24.1 and 22.9 us, 4096x14336 14.7, 14.3 and 13.9,
  // 4096x6144 8.3, 8.1 and 8.2, 4096x4096 6.85, 6.8 and 6.9; 3-bit 17.0, 17.0 and 16.7, 10.4,
  // 10.4 and 10.2, 6.5, 6.5 and 6.7, 5.5, 5.5 and 5.7; experts, 4 tokens, 27.9, 27.0 and 26.6
  // (H200, 2026-11-29).
  constexpr int teams(const Layout& at, int64_t tiles) const {
    return tokens == 1 && tiles < at.teams ? 1 : at.teams;
  }
  // K of each of `split` parts: whole units of slices.
  constexpr int64_t part(int64_t K, int split) const {
    const int64_t size = kSlice * unit(), units = (K + size - 1) / size;
    return split == 1 ? K : (units + split - 1) / split * size;
  }
};

// Rows of x that matvec pads M to; 0 when there are too many.
constexpr int matvec_tokens(int64_t M) {
  return M <= 1 ? 1 : M <= 4 ? 4 : M <= 8 ? 8 : M <= 16 ? 16 : 0;
}

constexpr MatvecSizes matvec_sizes(const Problem& p) {
  const FormatInfo& f = kFormats[int(p.format)];
  return {f.bits, f.group_size, f.affine(), matvec_tokens(p.M)};
}

// The plan; kernel simt when it fits no device like this. Blocks of a cluster, split_k, are as
// few as let each hold its part of x beside a ring of rows that are worth a copy each: with
// less than 4 slices in a stage, 8-bit 14336x4096 takes 37.6 us at M = 4, with two blocks 22.8
// (H200, 2026-11-22).
constexpr Plan matvec_plan(const Problem& p, const Device& device) {
  const MatvecSizes sizes = matvec_sizes(p);
  Plan fits{Plan::Kernel::simt, 0, 0, 0, 0};
  for (int split = 1; split <= 8; split *= 2) {
    if (split > 1 && device.capability < 90) break;
    // A cluster stays within one GPC, so not all multiprocessors are of use.
    const int64_t teams = device.processors / split * (split > 1 ? 7 : 8) / 8;
    const int64_t all = (p.N + sizes.kRows - 1) / sizes.kRows;
    const int64_t tiles = split > 1 && teams > 0 ? (all + teams - 1) / teams : 0;
    if (p.K >= (int64_t(1) << 24) || tiles >= 4096) continue;
    const int64_t part = sizes.part(p.K, split);
    const auto at = sizes.layout(part, int(tiles), device.shared_bytes);
    if (at.stages < 2) continue;
    const bool good = at.stages >= MatvecSizes::kFewStages &&
                      (at.codes >= 4 * MatvecSizes::kSlice || at.codes >= part);
    if (good || fits.kernel != Plan::Kernel::matvec)
      fits = {Plan::Kernel::matvec, sizes.tokens, MatvecSizes::kRows, at.stages, split};
    if (good) break;
  }
  return fits;
}

// Whether matvec quantizes x as it stages it, rather than a kernel before it. With e2m1 more
// than one row takes longer than that kernel: 4096x14336, nvfp4, M = 1 and 4, kernel before and
// as it stages: 15.5 13.8, 16.0 16.5 us; 4096x4096 8.8 7.0, 8.7 10.1; 14336x4096 15.8 15.9,
// 16.1 16.0 (H200, 2026-11-29).
constexpr bool matvec_quantizes(Format format, int64_t M) {
  const FormatInfo& f = kFormats[int(format)];
  return !f.affine() && (f.bits == 8 || (format == Format::nvfp4 && M == 1));
}

// Shared memory for a matrix while a block sorts rows: of each warp with rows how many are
// its own, and where the matrix's rows begin.
inline constexpr int kMatvecSortBytes = 16 * 2 + 4;

// Gathered: so few pairs are multiplied one by one. More are sorted by matrix before, so that
// each matrix that is hit is read once for some rows. One by one and sorted, experts as below,
// 4 and 6 tokens: 3-bit (as floats) 32.2 34.0, 44.1 42.9 us; 4-bit 31.9 35.0, 44.9 46.4; 8-bit
// 50.4 54.7, 73.0 74.6; mxfp8 52.1 53.6, 76.8 74.6; nvfp4 35.9 37.1, 49.0 48.0 (H200,
// 2026-11-29).
constexpr bool matvec_pair_by_pair(int64_t M, int64_t pairs) { return M <= 8 && pairs <= 32; }

// Whether each block sorts them for itself, a row a thread, in the shared memory of x and of
// the sums: the kernel that does it before takes 5 us (H200, 2026-11-23).
constexpr bool matvec_sorts(const MatvecSizes::Layout& at, int64_t rows, int64_t matrices) {
  return rows <= 512 && matrices * kMatvecSortBytes + 128 <= at.ring - at.x;
}

// Rows of x in a tile. Tiles of 4 and of 8, experts 4096x1408, 128 of them, 8 a token, 8 / 16 /
// 32 tokens: 4-bit 49.7 51.0, 78.0 83.1, 107 107 us; 8-bit 87.6 95.7, 132 151, 181 201; 3-bit
// 50.6 50.0, 75.2 77.2, 103 102; nvfp4 57.5 59.4, 87.0 90.4, 126 124 (H200, 2026-11-29).
constexpr int matvec_gather_tokens(const Problem& p) {
  if (matvec_pair_by_pair(p.M, p.pairs)) return matvec_tokens(p.M);
  return p.M <= 4 && p.pairs * p.M <= 2 * p.matrices ? 4 : 8;
}
constexpr Plan matvec_gather_plan(const Problem& p, const Device& device) {
  const FormatInfo& f = kFormats[int(p.format)];
  const MatvecSizes sizes{f.bits, f.group_size, f.affine(), matvec_gather_tokens(p)};
  const auto at = sizes.layout(p.K, 0, device.shared_bytes, true);
  if (at.stages < 2) return {Plan::Kernel::simt, 0, 0, 0, 0};
  return {Plan::Kernel::matvec, sizes.tokens, MatvecSizes::kRows, at.stages, 1};
}

// Two-byte floats, and whole blocks of 32 codes.
constexpr bool matvec_takes_dtypes(const Problem& p) {
  return p.format != Format::dense && p.transpose && !p.quantize_x && p.dtype != Dtype::f32 &&
         p.K % 32 == 0 && p.K >= 32 && p.N <= 0x7fffffff - 16;
}
constexpr bool matvec_supports(const Problem& p, const Device& device) {
  if (!matvec_takes_dtypes(p) || p.gather || matvec_tokens(p.M) == 0) return false;
  return matvec_plan(p, device).kernel == Plan::Kernel::matvec;
}
constexpr bool matvec_gather_supports(const Problem& p, const Device& device) {
  if (!matvec_takes_dtypes(p) || !p.gather || p.K >= (int64_t(1) << 24)) return false;
  if (!matvec_pair_by_pair(p.M, p.pairs) && !groups(p.pairs * p.M, p.matrices)) return false;
  return device.capability >= 80 &&
         matvec_gather_plan(p, device).kernel == Plan::Kernel::matvec;
}

}  // namespace lowbit::cuda
