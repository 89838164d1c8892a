// Which products skinny takes, and the sizes of its blocks. No CUDA: plan() includes it.
#pragma once

#include "matmul_rules.h"
#include "matvec_rules.h"

namespace lowbit::cuda {

// A block of skinny: `tiles` of 16 rows of w, by `strips` of one or two of them for each of
// `parts` warps that share K.
struct SkinnySizes {
  int bits, group;
  bool affine;
  int tokens;  // 8, 16 or 32: rows of x, padded

  static constexpr int kRows = 16;
  // A warp's turn: codes of each of its rows.
  static constexpr int kChunk = 128;
  // At most as many warps multiply; one asks for copies and one looks at scales.
  static constexpr int kMostWarps = 16, kMostTiles = 7, kMostParts = 8, kOthers = 2;

  // Codes as tensor copies lay them out, in boxes of all rows: rows of a box are 128 bytes,
  // whose chunks of 16 permute, or an odd multiple of 16, so that equal codes of 8 rows lie in
  // different banks.
  constexpr int box_codes() const { return bits == 4 ? 256 : 128; }
  constexpr int box_row() const { return box_codes() * bits / 8; }
  // Of 3 bits rows of whole stages, each with 16 bytes of the next that make them such a
  // multiple: rows of 48 bytes are too short for the copy engine (4096x14336, M = 16: 15.9 us
  // and 15.1; 14336x4096, M = 8 14.4 and 13.9; H200, 2026-11-29).
  constexpr bool whole_rows() const { return bits == 3; }
  // Bytes from row to row, and of all rows' codes, in a stage.
  constexpr int code_row(int parts) const {
    return whole_rows() ? parts * box_row() + 16 : box_row();
  }
  constexpr int code_bytes(int rows, int parts) const {
    return rows * (whole_rows() ? code_row(parts) : parts * kChunk * bits / 8);
  }
  // x in boxes of 64 k, those of chunks' first halves and then those of second halves, which
  // begin two rows of 128 bytes later: so halves permute their pieces of 16 bytes differently.
  static constexpr int kXShift = 256;
  // Scales, and biases, of `span_k` codes of all rows at a time: copies take as long for short
  // rows as for long ones, but nothing is multiplied before the first are there. 512, 1024 and
  // 2048 codes, M = 16: 4-bit 4096x14336 15.0, 14.4 and 15.9 us, 14336x4096 17.4, 15.9
  // and 15.3; 3-bit 17.4, 15.8 and 16.9, 18.3, 16.6 and 15.5 (H200, 2026-11-29).
  static constexpr int kSpans = 2;
  static constexpr int span_of(int64_t K) { return K > 8192 ? 2048 : 1024; }
  constexpr int scale_size() const { return affine ? 2 : 1; }
  static constexpr int kTokenSums = 20;  // floats for 16 rows; lane quads in different banks

  // Shared memory: ring of stages, each codes | x of `parts` chunks; sums of y lie where it was
  // | ring of spans, each scales | biases | scale table | barriers
  struct Layout {
    int x, x_half, stage, stages, spans, biases, span, table, barriers, bytes;
    int tiles, strips, parts;
    int span_k, scale_row;  // bytes: 16 to 128
    int code_row;           // bytes from row to row
  };
  static constexpr int kMostStages = 16, kBarrierBytes = 16 * (kMostStages + kSpans) + 16;
  constexpr Layout layout(int tiles, int64_t K, int shared_bytes) const {
    Layout at{};
    at.tiles = tiles;
    // Two tiles meet x that was loaded once. With 8 bits memory is slower than that (no
    // change), and x of 32 tokens leaves room for few parts.
    at.strips = bits <= 4 && (tiles > 2 || tokens < 32) ? (tiles + 1) / 2 : tiles;
    const int rows = at.tiles * kRows, table = affine ? 0 : 1024;
    at.span_k = span_of(K);
    at.scale_row = at.span_k / group * scale_size();
    at.biases = (rows * at.scale_row + 1023) / 1024 * 1024;
    at.span = affine ? 2 * at.biases : at.biases;
    const int ring = shared_bytes - 1024 - kBarrierBytes - table - kSpans * at.span;
    for (at.parts = kMostParts;; at.parts /= 2) {
      at.code_row = code_row(at.parts);
      at.x = (code_bytes(rows, at.parts) + 1023) / 1024 * 1024;
      at.x_half = at.parts * tokens * 128 + kXShift;
      at.stage = at.x + (2 * at.x_half + 1023) / 1024 * 1024;
      at.stages = ring / at.stage;
      if (at.parts == 2) break;
      if (at.strips * at.parts <= kMostWarps && (at.parts / 2) * kChunk < K && at.stages >= 3)
        break;
    }
    if (at.stages > kMostStages) at.stages = kMostStages;
    at.spans = at.stages * at.stage;
    at.table = at.spans + kSpans * at.span;
    at.barriers = at.table + table;
    at.bytes = at.barriers + kBarrierBytes + 1024;  // and to align them
    return at;
  }
  static constexpr int threads(const Layout& at) {
    return 32 * (at.strips * at.parts + kOthers);
  }
  // As few tiles as let all multiprocessors work in equal rounds.
  static constexpr int tiles(int64_t N, int processors) {
    const int64_t all = (N + kRows - 1) / kRows, most = int64_t(kMostTiles) * processors;
    const int64_t rounds = (all + most - 1) / most * processors;
    return int((all + rounds - 1) / rounds);
  }
};

constexpr int skinny_tokens(int64_t M) { return M <= 8 ? 8 : M <= 16 ? 16 : M <= 32 ? 32 : 0; }
constexpr SkinnySizes skinny_sizes(const Problem& p) {
  const FormatInfo& f = kFormats[int(p.format)];
  return {f.bits, f.group_size, f.affine(), skinny_tokens(p.M)};
}

constexpr bool skinny_takes_bits(int bits) { return bits == 3 || bits == 4 || bits == 8; }
// matmul's products; tensor copies: rows of scales are multiples of 16 bytes, K is whole boxes.
inline bool skinny_supports(const Problem& p, const Device& device) {
  if (p.gather || !matmul_supports(p, device)) return false;
  const SkinnySizes sizes = skinny_sizes(p);
  return sizes.tokens && skinny_takes_bits(sizes.bits) && p.K % 256 == 0 &&
         p.K / sizes.group * sizes.scale_size() % 16 == 0;
}
constexpr Plan skinny_plan(const Problem& p, const Device& device) {
  const int tiles = SkinnySizes::tiles(p.N, device.processors);
  const SkinnySizes sizes = skinny_sizes(p);
  const auto at = sizes.layout(tiles, p.K, device.shared_bytes);
  return {Plan::Kernel::skinny, sizes.tokens, tiles * SkinnySizes::kRows, at.stages, 1};
}

// Whether skinny is faster than matvec and matmul where all can. Not for matrices of so many
// rows that a block has a third turn, between which its ring runs dry (M = 16, 4096x32064,
// matmul and skinny: 4-bit 30.0 and 36.0 us, mxfp8 41.4 and 48.5). From 9 rows of x on it is,
// and from 17 on with few tiles in a block or e2m1, where decoding is what matmul takes longest
// for. From 2 on where x leaves matvec a short ring, and with nvfp4 where blocks have one turn
// of some tiles; from 5 on with few tiles in a block or codes of 8 bits, but for x that matvec
// would also quantize (with it, mxfp8 4096x14336 at M = 4 takes 19.0 us, 14336x4096 25.1).
// Microseconds of matvec or matmul and of skinny, H200, 2026-11-29:
//
//   K x N        M   4-bit      3-bit      8-bit      mxfp8      nvfp4
//   4096x14336   4   13.1 13.2  12.1 13.8  19.4 19.3  19.1 19.9  14.4 13.9
//   4096x14336   8   13.2 13.2  13.4 13.8  20.2 19.5  20.6 20.1  14.9 13.8
//   4096x14336  16   16.8 14.4  17.1 15.1  20.1 20.0  20.6 20.2  21.1 15.6
//   4096x14336  32   18.0 19.9  18.8 19.9             21.3 22.8  24.3 19.8
//   14336x4096   2   15.2 13.4  14.5 13.8  21.0 19.3  20.3 19.7  16.6 15.3
//   14336x4096   8   18.3 13.5  18.9 13.9  23.5 19.2  24.8 20.1  19.6 15.3
//   14336x4096  16   20.3 14.5  21.5 15.2  23.6 19.6  24.9 19.7  26.3 15.3
//   14336x4096  32   21.7 19.9  22.9 20.0             26.8 23.3  29.1 20.7
//   4096x4096    4    6.8  6.8   6.5  6.9   8.2  8.0   7.9  8.6   7.1  6.8
//   4096x4096    8    7.4  6.8   7.7  6.9  10.7  8.0   8.8  8.6   7.8  6.8
//   4096x4096   16   10.3  7.2  10.4  7.5  11.8  8.4  12.0  9.0  10.6  7.5
//   4096x4096   32   10.8  9.0  11.0  9.0             12.5 10.2  13.3  8.9
//   4096x6144    4    7.9        7.6  8.6                          8.5  8.3
//   4096x6144    8    8.3  8.1   8.9  8.5  13.2 10.1  11.2 10.6   9.0  8.3
//   4096x6144   32   12.3 11.5  12.6 12.0             14.1 12.1  15.5 11.3
//   4096x1024    8    5.8  5.3   6.3  5.5   6.4  5.4   6.0  5.9   5.8  5.3
//   4096x1024   16    8.3  5.5   9.2  5.6  10.3  5.5   8.5  6.0   6.8  5.5
//   4096x1024   32    9.4  6.2   9.8  6.3             10.7  7.2  11.9  6.1
//   4096x28672  16   30.0 28.6  30.9 30.1  38.1 37.4  39.3 39.2  37.9 32.8
//
// Where matvec quantizes x to mxfp8 as it stages it, skinny after a kernel that does, M = 2, 4,
// 8: 4096x14336 18.7 20.7, 18.8 20.8, 22.5 21.8; 4096x4096 8.0 9.5, 8.4 9.5, 11.1 10.1;
// 4096x28672 32.6 34.7, 33.0 34.8, 36.7 39.8; 4096x1024 6.7 6.3, -, 7.9 7.4 (H200, 2026-11-29).
inline bool skinny_preferred(const Problem& asked, const Device& device) {
  const int64_t turn =
      int64_t(SkinnySizes::kMostTiles) * SkinnySizes::kRows * device.processors;
  if (asked.N > 2 * turn) return false;
  const FormatInfo& f = kFormats[int(asked.format)];
  const int tiles = SkinnySizes::tiles(asked.N, device.processors);
  if (asked.M > 16) return tiles <= 3 || (!f.affine() && f.bits == 4);
  if (asked.M > 8) return true;
  if (asked.M > 1 && asked.K > 8192) return true;
  if (asked.M > 1 && asked.format == Format::nvfp4 && tiles > 1 && asked.N <= turn) return true;
  if (asked.quantize_x && matvec_quantizes(asked.format, asked.M) &&
      (asked.M <= 4 || asked.N > turn))
    return false;
  return asked.M > 4 && (tiles <= 2 || f.bits == 8);
}

}  // namespace lowbit::cuda
