// How matmul's scales and biases reach shared memory: warps load them and widen them to what
// the decoder wants. They take 256 k of all rows in turn, so that one's loads are on their way
// while another widens. Two warps with half of the rows each, which asked of each scale whether
// it is extreme, held the others up: M = 64, 4096x14336, and without any scales: 4-bit 21.6 us
// and 19.6, 8-bit 29.4 and 25.2, nvfp4 26.5 and 22.7 (H200, 2026-11-29).
#pragma once

#include "matmul.h"

namespace lowbit::cuda {

#if LOWBIT_HOPPER

template <class F, class T, int kTokens, bool kGather>
struct MatmulScales : MatmulBlock<F, T, kTokens, kGather> {
  using Block = MatmulBlock<F, T, kTokens, kGather>;
  using Block::a, Block::base, Block::empty, Block::extreme_at, Block::first_unit, Block::full,
      Block::last_unit, Block::stage;
  using typename Block::Decode, typename Block::Shape, typename Block::Tile,
      typename Block::UnitRing;

  __device__ explicit MatmulScales(const Block& block) : Block(block) {}

  // Scales, or biases, of 256 k of a row, as stored. Zero where the row ends.
  static constexpr int kWords = (Shape::kBatchBytes + 3) / 4;
  struct Batch {
    uint32_t word[kWords];

    // at: offset of the first; left: bytes of the row from there on.
    __device__ __forceinline__ void load(const uint8_t* from, uint32_t at, int left,
                                         bool vectors) {
      constexpr int kBytes = Shape::kBatchBytes, kSize = Shape::kScaleSize;
      const uint8_t* p = from + at;
      if (!vectors) {
#pragma unroll
        for (int w = 0; w < kBytes / 4; w++) {
          word[w] = 0;
#pragma unroll
          for (int i = w * 4; i < w * 4 + 4; i += kSize)
            if (i < left) word[w] |= load_narrow<kSize>(p + i) << (8 * (i % 4));
        }
      } else if constexpr (kBytes == 16) {
        const uint4 v = __ldg(reinterpret_cast<const uint4*>(p));
        word[0] = v.x, word[1] = v.y, word[2] = v.z, word[3] = v.w;
      } else if constexpr (kBytes == 8) {
        const uint2 v = __ldg(reinterpret_cast<const uint2*>(p));
        word[0] = v.x, word[1] = v.y;
      } else {
        word[0] = __ldg(reinterpret_cast<const uint32_t*>(p));
      }
    }
    __device__ __forceinline__ uint32_t half(int i) const {
      return __byte_perm(word[i / 2], 0, i % 2 ? 0x3232 : 0x1010);
    }
    __device__ __forceinline__ uint32_t byte(int i) const {
      return word[i / 4] >> (8 * (i % 4)) & 0xffu;
    }
  };

  // One of kScaleWarps, four rows a lane.
  __device__ void copy_scales(int warp, int lane) const {
    constexpr int kWarps = Shape::kScaleWarps, kRows = Shape::kRows / 32;          // a lane's
    constexpr int kGroups = 128 / F::kGroup, kUnit = kGroups * Shape::kScaleSize;  // of a unit
    UnitRing ring;
    bool started = false;
    int turn = 0;  // whose the next batch is
    Extremes<F, T> seen;
    const uint32_t table = base + Shape::kTableAt;
    Block::each_tile([&](int row0, int place) {
      const Tile tile(a.gather, row0, place);
      const int64_t before = int64_t(tile.first_row(a.N)) * a.scale_row;
      const uint8_t *scales = a.scales + before, *biases = a.biases + before;
      // Rows beyond the matrix take the last row's: nothing of them is written.
      uint32_t row_at[kRows];
#pragma unroll
      for (int i = 0; i < kRows; i++)
        row_at[i] = uint32_t(min(row0 + lane + 32 * i, a.N - 1)) * uint32_t(a.scale_row);
      Batch s[kRows], b[kRows];
      const auto load = [&](int unit) {
        if (unit >= last_unit) return;
        const int at = unit * kUnit, left = a.scale_row - at;
#pragma unroll
        for (int i = 0; i < kRows; i++) {
          s[i].load(scales, row_at[i] + at, left, a.scale_vectors);
          if constexpr (Shape::kAffine)
            b[i].load(biases, row_at[i] + at, left, a.scale_vectors);
        }
      };
      load(first_unit + 2 * (warp < turn ? warp - turn + kWarps : warp - turn));
      if (!started) {  // while the first scales are on their way
        if constexpr (!Shape::kAffine) {
          for (int i = warp * 32 + lane; i < 256; i += 32 * kWarps)
            store_shared(table + 4 * i, Decode::entry(uint32_t(i)));
          sync_threads<32 * kWarps>(9);
        }
        Block::start(Block::kCopies), started = true;
      }
      // Whole lines into the L2 cache, ahead of the loads to come.
      for (int at = first_unit * kUnit + 128 * (warp + 1);
           at < min(last_unit * kUnit, a.scale_row); at += 128 * kWarps)
#pragma unroll
        for (int i = 0; i < kRows; i++) {
          prefetch_line(scales + (row_at[i] + at));
          if constexpr (Shape::kAffine) prefetch_line(biases + (row_at[i] + at));
        }
      for (int u = first_unit; u < last_unit; u += 2) {
        const bool mine = turn == warp;
        turn = turn + 1 == kWarps ? 0 : turn + 1;
        if (!mine) {
          ring.advance(min(2, last_unit - u));
          continue;
        }
#pragma unroll
        for (int h = 0; h < 2; h++) {
          if (u + h >= last_unit) break;
          if constexpr (Decode::kExtreme) {
#pragma unroll
            for (const Batch& batch : s)
#pragma unroll
              for (int i = h * kWords / 2; i < ((h + 1) * kWords + 1) / 2; i++)
                seen.add(batch.word[i]);
            if (seen.any()) store_shared(extreme_at(), 1);
          }
          wait_phase(empty(ring.slot), ring.parity ^ 1);
#pragma unroll
          for (int i = 0; i < kRows; i++)
            widen(s[i], b[i], h * kGroups, table, stage(ring.slot) + Shape::kEntriesAt,
                  lane + 32 * i);
          if (arrives()) arrive(full(ring.slot));
          ring.advance();
        }
        load(u + 2 * kWarps);
      }
    });
    if (kGather && !started)
      Block::start(Block::kCopies);  // the list may be shorter than the grid
  }

  // The entries of a unit of a row, from its group `first` of the batch on.
  static __device__ __forceinline__ void widen(const Batch& s, const Batch& b, int first,
                                               uint32_t table, uint32_t entries, int row) {
    constexpr int kRowBytes = Shape::kEntryRow, kGroups = 128 / F::kGroup;
    const uint32_t to = entries + row * kRowBytes + turn_of(row, kRowBytes) * 16;
#pragma unroll
    for (int chunk = 0; chunk < kRowBytes / 16; chunk++) {
      uint32_t v[4];
#pragma unroll
      for (int e = 0; e < 16 / Shape::kEntry; e++) {
        const int entry = chunk * 16 / Shape::kEntry + e;
        const int group = first + entry * kGroups / Shape::kEntries;
        if constexpr (Shape::kAffine) {
          const GroupPair g = Decode::group_pair(s.half(group), b.half(group));
          v[2 * e] = g.scale, v[2 * e + 1] = g.bias;
        } else {
          uint32_t scale;
          load_shared<4>(table + 4 * s.byte(group), &scale);
          v[e] = scale;
        }
      }
      store_shared(to ^ chunk * 16, v);
    }
  }
};

#endif  // LOWBIT_HOPPER

}  // namespace lowbit::cuda
