// Which products matvec takes, and the sizes of its blocks. No CUDA: plan() includes it.
#pragma once

#include "plan.h"

namespace lowbit::cuda {

// A block of matvec: what it holds in shared memory, which decides how K must be split.
struct MatvecSizes {
  int bits, group;
  bool affine;
  int tokens;  // 1, 4, 8 or 16: rows of x, padded

  constexpr bool folded() const { return group < 32; }
  // 16 warps where registers and rings allow: with 8 of them, 4-bit 4096x14336 takes 14.9 us at
  // M = 1 instead of 14.1. Slices of 512, or a deeper ring, were no faster: 14.9 to 16 (H200,
  // 2026-11-22).
  constexpr int warps() const { return bits > 4 || tokens > 8 ? 8 : 16; }
  static constexpr int kSlice = 256, kRows = 16, kStages = 3;
  constexpr int scale_size() const { return affine ? 2 : 1; }
  constexpr int scale_row() const { return kSlice / group * scale_size(); }  // bytes: 4 to 16
  // Eight rows of a fragment fall into different banks: strides are odd multiples of what one
  // lane quad reads.
  constexpr int code_row() const { return kSlice * bits / 8 + (bits == 8 ? 32 : 16); }
  constexpr int stage() const { return kRows * (code_row() + (affine ? 2 : 1) * scale_row()); }
  constexpr int ring() const { return kStages * stage(); }
  // Groups that meet the tensor cores at once, and zeros for the columns of the others.
  constexpr int span() const { return folded() ? 32 : group; }
  constexpr int zeros() const { return tokens >= 8 ? 0 : span() / 32 * tokens * 64; }
  // Tiles whose sums wait for the block's other warps: these then drift apart, and one's
  // arithmetic covers another's copies. A barrier for each tile: 16.0 us where this took 14.7
  // (4-bit 4096x14336, M = 1; H200, 2026-11-22).
  constexpr int flush() const {
    return tokens == 1 ? 8 : tokens == 4 ? 4 : tokens == 8 ? 2 : 1;
  }
  static constexpr int kTokenSums = 20;  // floats for 16 rows; lane quads in different banks
  constexpr int warp_sums() const { return tokens * kTokenSums; }
  constexpr int tile_sums() const { return warps() * warp_sums(); }

  // Shared memory: rings | x | a group of zeros | group sums of x | warps' sums of y, two rooms
  // | scale table | parts of y of the block's tiles (split_k)
  struct Layout {
    int x, zeros, x_sums, sums, table, parts, bytes;
  };
  constexpr Layout layout(int64_t part, int tiles) const {
    const int padded = int((part + kSlice - 1) / kSlice * kSlice);
    Layout at{};
    at.x = warps() * ring();
    at.zeros = at.x + padded * tokens * 2;
    at.x_sums = at.zeros + zeros();
    at.sums = at.x_sums + (affine ? padded / group * tokens * 4 : 0);
    at.table = at.sums + 2 * flush() * tile_sums() * 4;
    at.parts = at.table + (folded() ? 1024 : 0);
    at.bytes = at.parts + tiles * kRows * tokens * 4;
    return at;
  }
  // K of each of `split` parts: whole slices.
  static constexpr int64_t part(int64_t K, int split) {
    const int64_t slices = (K + kSlice - 1) / kSlice;
    return split == 1 ? K : (slices + split - 1) / split * kSlice;
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

// Blocks of a cluster that x asks for: as few as let each hold its part. 0: it fits none.
constexpr int matvec_split(const Problem& p, const Device& device) {
  const MatvecSizes sizes = matvec_sizes(p);
  for (int split = 1; split <= 8; split *= 2) {
    if (split > 1 && device.capability < 90) break;
    // A cluster stays within one GPC, so not all multiprocessors are of use.
    const int64_t teams = device.processors / split * (split > 1 ? 7 : 8) / 8;
    const int64_t all = (p.N + sizes.kRows - 1) / sizes.kRows;
    const int64_t tiles = split > 1 && teams > 0 ? (all + teams - 1) / teams : 0;
    if (p.K < (int64_t(1) << 30) && tiles < 4096 &&
        sizes.layout(MatvecSizes::part(p.K, split), int(tiles)).bytes <= device.shared_bytes)
      return split;
  }
  return 0;
}

// Two-byte floats, and whole blocks of 32 codes.
constexpr bool matvec_supports(const Problem& p, const Device& device) {
  if (p.format == Format::dense || !p.transpose || p.quantize_x || p.gather) return false;
  if (p.dtype == Dtype::f32 || p.K % 32 != 0 || p.K < 32 || matvec_tokens(p.M) == 0)
    return false;
  if (p.N > 0x7fffffff - 16) return false;
  return matvec_split(p, device) > 0;
}

}  // namespace lowbit::cuda
