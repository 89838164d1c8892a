// How matmul's scales and biases reach shared memory: two warps load them ahead and widen them
// to what the decoder wants.
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
  struct Batch {
    uint32_t word[(Shape::kBatchBytes + 3) / 4];

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

  // One of two warps, 64 rows each: two rows a lane. The batch after this one is on its way.
  __device__ void copy_scales(int warp, int lane) const {
    UnitRing ring;
    bool started = false;
    if (lane == 0) store_shared(extreme_at(warp), 0);
    __syncwarp();
    constexpr int kRowBytes = Shape::kEntryRow, kGroups = 128 / F::kGroup;  // of a unit
    const uint32_t table = base + Shape::kTableAt;
    Block::each_tile([&](int row0, int place) {
      const Tile tile(a.gather, row0, place);
      const int64_t before = int64_t(tile.first_row(a.N)) * a.scale_row;
      const uint8_t *scales = a.scales + before, *biases = a.biases + before;
      // Rows beyond the matrix take the last row's: nothing of them is written.
      uint32_t row_at[2];
#pragma unroll
      for (int i = 0; i < 2; i++)
        row_at[i] =
            uint32_t(min(row0 + warp * 64 + lane + 32 * i, a.N - 1)) * uint32_t(a.scale_row);
      constexpr int kUnit = 128 / F::kGroup * Shape::kScaleSize;
      Batch s[2], b[2];
      const auto load = [&](int unit) {
        const int at = unit * kUnit, left = a.scale_row - at;
#pragma unroll
        for (int i = 0; i < 2; i++) {
          s[i].load(scales, row_at[i] + at, left, a.scale_vectors);
          if constexpr (Shape::kAffine)
            b[i].load(biases, row_at[i] + at, left, a.scale_vectors);
        }
      };
      if (first_unit < last_unit) load(first_unit);
      if (!started) {  // while the first scales are on their way
        if constexpr (!Shape::kAffine) {
          for (int i = warp * 32 + lane; i < 256; i += 64)
            store_shared(table + 4 * i, Decode::entry(uint32_t(i)));
          sync_threads<64>(9);
        }
        Block::start(Block::kScales), started = true;
      }
      // Whole lines into the L2 cache, ahead of the loads to come.
      for (int at = first_unit * kUnit + 128; at < min(last_unit * kUnit, a.scale_row);
           at += 128)
#pragma unroll
        for (int i = 0; i < 2; i++) {
          prefetch_line(scales + (row_at[i] + at));
          if constexpr (Shape::kAffine) prefetch_line(biases + (row_at[i] + at));
        }
      for (int u = first_unit; u < last_unit; u += 2) {
        const Batch now_s[2] = {s[0], s[1]}, now_b[2] = {b[0], b[1]};
        if (u + 2 < last_unit) load(u + 2);
#pragma unroll
        for (int h = 0; h < 2; h++) {
          if (u + h >= last_unit) break;
          wait_phase(empty(ring.slot), ring.parity ^ 1);
          bool extreme = false;
#pragma unroll
          for (int i = 0; i < 2; i++) {
#pragma unroll
            for (int group = h * kGroups; group < (h + 1) * kGroups; group++)
              extreme |=
                  Decode::extreme(Shape::kAffine ? now_s[i].half(group) : now_s[i].byte(group));
            const int row = warp * 64 + lane + 32 * i;
            const uint32_t to = stage(ring.slot) + Shape::kEntriesAt + row * kRowBytes +
                                turn_of(row, kRowBytes) * 16;
#pragma unroll
            for (int chunk = 0; chunk < kRowBytes / 16; chunk++) {
              uint32_t v[4];
#pragma unroll
              for (int e = 0; e < 16 / Shape::kEntry; e++) {
                const int entry = chunk * 16 / Shape::kEntry + e;
                const int group = h * kGroups + entry * kGroups / Shape::kEntries;
                if constexpr (Shape::kAffine) {
                  const GroupPair g =
                      Decode::group_pair(now_s[i].half(group), now_b[i].half(group));
                  v[2 * e] = g.scale, v[2 * e + 1] = g.bias;
                } else {
                  uint32_t scale;
                  load_shared<4>(table + 4 * now_s[i].byte(group), &scale);
                  v[e * Shape::kEntry / 4] = scale;
                  if constexpr (Decode::kBias) v[2 * e + 1] = Decode::bias_of(scale);
                }
              }
              store_shared(to ^ chunk * 16, v);
            }
          }
          if (extreme) store_shared(extreme_at(warp), 1);
          __syncwarp();
          if (lane < kArrivals) arrive(full(ring.slot));
          ring.advance();
        }
      }
    });
    if (kGather && !started)
      Block::start(Block::kScales);  // the list may be shorter than the grid
  }
};

#endif  // LOWBIT_HOPPER

}  // namespace lowbit::cuda
