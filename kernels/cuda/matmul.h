// matmul: many rows of x. wgmma with W's rows on the m side, decoded from their codes in
// registers, and tokens (rows of x) on the n side, from shared memory. sm_90a.
//
//   cluster      `share` blocks with neighbouring rows of W and the same tokens, times `split`
//                parts of K of the same tile
//   block        128 rows of W x kTokens tokens, tile after tile (split: one tile)
//     2 warpgroups      64 rows each: decode 16 k of their rows while the tensor cores multiply
//     the
//                       16 before them; sums stay in registers to the end of the tile
//     or 4 warpgroups   two for each 64 rows, with every other unit of K: for few tokens, where
//                       decoding takes longer than multiplying
//     one more warpgroup, a warp each
//       0          tensor copies of x, 64 k wide, each half of a tile's tokens to both blocks
//       that
//                  share it
//       1          tensor copies of codes, a unit (128 k) wide
//       2, 3       scales and biases to shared memory, widened to what the decoder wants
//
// Shared memory: ring of x | ring of units (codes, then scales) | y on its way out | sums
// between warpgroups | barriers. After the last multiply of a split tile the ring of x holds
// this block's sums, which the cluster adds in the order of the parts: results do not depend on
// timing.
//
// The tensor cores take a multiply with operands in registers only when they begin it, so a
// warpgroup waits there: with 64 k decoded at a time and two warpgroups, M=64 took 30.5 us,
// with 16 and four 27.2 us (4-bit, 4096x14336, five instructions a pair of codes; H200,
// 2026-11-22).
#pragma once

#include "kernels.h"
#include "matmul_decode.cuh"
#include "tma.h"
#include "wgmma.h"

namespace lowbit::cuda {

struct MatmulArgs {
  CUtensorMap x, codes, y;
  const void* x_data;
  const uint8_t *code_data, *scales, *biases;
  int64_t row_bytes;   // of codes
  int scale_row;       // bytes
  bool scale_vectors;  // rows of scales allow vector loads
  bool y_tiles;        // y allows tensor copies
  void* y_data;
  const void* bias;
  bool bias_is_f32;  // else of x's type
  const float *global_x, *global_w;
  int M, N, K;
  int row_groups, token_tiles, panel;  // tiles: `share` * 128 rows, kTokens tokens; see tile_at
  int share, split;
  int units, part;  // of 128 k: of K, and of each part (even)
  int out_tokens;   // that leave at once: 32, or 16 of a split tile
};

template <class F, class T, int kTokens>
struct MatmulShape {
  static constexpr int kRows = 128;
  static constexpr int kParities = kTokens <= 64 ? 2 : 1;  // warpgroups to the same 64 rows
  static constexpr int kGroups = 2 * kParities, kThreads = 128 * (kGroups + 1);
  static constexpr bool kAffine = F::kHasBias;

  static constexpr int kXBytes = kTokens * 128;
  static constexpr int kXStages = kTokens == 256 ? 4 : 8;

  static constexpr int kRowBytes = 16 * F::kBits;  // codes of a unit
  static constexpr int kSwizzle = (kRowBytes & (kRowBytes - 1)) == 0 ? kRowBytes : 0;
  static constexpr int kCodeBytes = kRows * kRowBytes;
  static constexpr int kPer64 = F::kGroup < 64 ? 64 / F::kGroup : 1;
  // Scales of a unit, row after row: of each group, or of each half of a group of 128, a scale
  // or a scale and a bias.
  static constexpr int kEntries = 2 * kPer64, kEntry = WeightPairs<F, T>::kBias ? 8 : 4;
  static constexpr int kEntryRow = kEntries * kEntry;  // bytes: 16, 32 or 64
  static constexpr int kUnitBytes = kCodeBytes + kRows * kEntryRow;

  static constexpr int kOutBytes = 64 * 128;  // 64 tokens x 64 rows
  static constexpr int kSumBytes = kParities == 2 ? kTokens * kRows * 4 : 0;

  static constexpr int kTableBytes = kAffine ? 0 : 1024;  // entries by scale byte

  static constexpr int kOther =
      kXStages * kXBytes + 2 * kOutBytes + kSumBytes + kTableBytes + 512;
  static constexpr int kRoom = 227 * 1024 - 1024;
  static constexpr int kUnitStages = kOther + 8 * kUnitBytes <= kRoom ? 8 : 4;

  static constexpr int kUnitsAt = kXStages * kXBytes;
  static constexpr int kOutAt = kUnitsAt + kUnitStages * kUnitBytes;
  static constexpr int kSumsAt = kOutAt + 2 * kOutBytes;
  static constexpr int kTableAt = kSumsAt + kSumBytes;
  static constexpr int kBarriersAt = kTableAt + kTableBytes;
  static constexpr int kBytes = kBarriersAt + 512 + 1024;  // and what aligning them takes
  static_assert(kBytes <= 227 * 1024);

  // Scales that a lane loads at once: of 256 k of one row.
  static constexpr int kScaleSize = kAffine ? 2 : 1;
  static constexpr int kBatchBytes = 256 / F::kGroup * kScaleSize;
};

// matmul_format.cu, once a format.
template <Format>
void matmul_format(const Product&, const Plan&, Queue&);

#if LOWBIT_HOPPER

// 16-byte chunk i of row `row` lies at chunk i ^ turn: rows of 32, 64 or 128 bytes then have
// equal chunks of 8 rows in different banks. Tensor copies lay out codes so; the same 8 rows
// on.
__device__ __forceinline__ int turn_of(int row, int row_bytes) {
  return row_bytes == 128  ? row % 8
         : row_bytes == 64 ? row / 2 % 4
         : row_bytes == 32 ? row / 4 % 2
                           : 0;
}

// Where a ring is: how many slots were taken so far.
template <int kStages>
struct Ring {
  static_assert((kStages & (kStages - 1)) == 0);
  uint32_t taken = 0;
  __device__ __forceinline__ uint32_t slot() const { return taken % kStages; }
  // Parity of the round: what to wait for until a slot is full; its opposite until it is empty.
  __device__ __forceinline__ uint32_t parity() const { return taken / kStages % 2; }
};

template <class F, class T, int kTokens>
struct MatmulBlock {
  using Shape = MatmulShape<F, T, kTokens>;
  using Decode = WeightPairs<F, T>;
  using XRing = Ring<Shape::kXStages>;
  using UnitRing = Ring<Shape::kUnitStages>;

  const MatmulArgs& a;
  uint32_t base;
  int share_rank, part, first_unit, last_unit;

  __device__ MatmulBlock(const MatmulArgs& a, uint32_t base) : a(a), base(base) {
    const int rank = int(cluster_rank());
    share_rank = rank % a.share, part = rank / a.share;
    first_unit = min(part * a.part, a.units), last_unit = min(first_unit + a.part, a.units);
  }

  __device__ __forceinline__ uint32_t x_at(uint32_t slot) const {
    return base + slot * Shape::kXBytes;
  }
  __device__ __forceinline__ uint32_t unit_at(uint32_t slot) const {
    return base + Shape::kUnitsAt + slot * Shape::kUnitBytes;
  }
  __device__ __forceinline__ uint32_t x_full(uint32_t slot) const {
    return base + Shape::kBarriersAt + 8 * slot;
  }
  __device__ __forceinline__ uint32_t x_empty(uint32_t slot) const { return x_full(slot) + 64; }
  __device__ __forceinline__ uint32_t unit_full(uint32_t slot) const {
    return x_full(slot) + 128;
  }
  __device__ __forceinline__ uint32_t unit_empty(uint32_t slot) const {
    return x_full(slot) + 192;
  }
  __device__ __forceinline__ uint32_t begun() const { return x_full(0) + 256; }
  // Not zero: scales that the decoder cannot carry have come.
  __device__ __forceinline__ uint32_t extreme_at() const { return x_full(0) + 264; }

  __device__ void init() const {
    for (int i = 0; i < Shape::kXStages; i++) {
      init_barrier(x_full(i), 1);
      init_barrier(x_empty(i), 8 * a.share);
    }
    for (int i = 0; i < Shape::kUnitStages; i++) {
      init_barrier(unit_full(i), 3);
      init_barrier(unit_empty(i), 8);
    }
    init_barrier(begun(), 1);
    store_shared(extreme_at(), 0);
    publish_barriers();
  }

  // Tiles in the order in which clusters take them: tokens first within a panel of `panel`
  // token tiles, so that what runs at once shares W's rows and stays within a part of x that
  // the L2 cache holds.
  template <class Body>
  __device__ __forceinline__ void each_tile(Body body) const {
    const int size = a.share * a.split, clusters = int(gridDim.x) / size;
    const int tiles = a.row_groups * a.token_tiles, whole = a.row_groups * a.panel;
    for (int t = int(blockIdx.x) / size; t < tiles; t += clusters) {
      const int first = t / whole * a.panel, within = t % whole;
      const int width = min(a.panel, a.token_tiles - first);
      body((within / width * a.share + share_rank) * Shape::kRows,
           (first + within % width) * kTokens);
    }
  }

  __device__ void copy_x() const {
    XRing ring;
    const int tokens = kTokens / a.share;
    const uint16_t blocks = uint16_t(((1 << a.share) - 1) << (part * a.share));
    wait_phase(begun(), 0);
    each_tile([&](int, int token0) {
      for (int k = first_unit * 128; k < last_unit * 128; k += 64, ring.taken++) {
        const uint32_t full = x_full(ring.slot());
        const uint32_t to = x_at(ring.slot()) + share_rank * tokens * 128;
        wait_phase(x_empty(ring.slot()), ring.parity() ^ 1);
        arrive_expecting(full, Shape::kXBytes);
        if (a.share == 1)
          load_tile(to, a.x, k, token0, full);
        else
          load_tile(to, a.x, k, token0 + share_rank * tokens, full, blocks);
      }
    });
  }

  // The first two units go ahead of all of x, which would keep them waiting for longer than
  // they take: everything that fits into the rings is asked for at once.
  __device__ void copy_codes() const {
    UnitRing ring;
    each_tile([&](int row0, int) {
      for (int u = first_unit; u < last_unit; u++, ring.taken++) {
        const uint32_t full = unit_full(ring.slot());
        wait_phase(unit_empty(ring.slot()), ring.parity() ^ 1);
        arrive_expecting(full, Shape::kCodeBytes);
        load_tile(unit_at(ring.slot()), a.codes, u * Shape::kRowBytes, row0, full);
        if (ring.taken == 1) arrive(begun());
      }
    });
    if (ring.taken < 2) arrive(begun());
  }

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
    constexpr int kRowBytes = Shape::kEntryRow, kGroups = 128 / F::kGroup;  // of a unit
    const uint32_t table = base + Shape::kTableAt;
    if constexpr (!Shape::kAffine) {
      for (int i = warp * 32 + lane; i < 256; i += 64)
        store_shared(table + 4 * i, Decode::entry(uint32_t(i)));
      sync_threads(4, 64);
    }
    each_tile([&](int row0, int) {
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
          s[i].load(a.scales, row_at[i] + at, left, a.scale_vectors);
          if constexpr (Shape::kAffine)
            b[i].load(a.biases, row_at[i] + at, left, a.scale_vectors);
        }
      };
      if (first_unit < last_unit) load(first_unit);
      // Whole lines into the L2 cache, ahead of the loads to come.
      for (int at = first_unit * kUnit + 128; at < min(last_unit * kUnit, a.scale_row);
           at += 128)
#pragma unroll
        for (int i = 0; i < 2; i++) {
          prefetch_line(a.scales + (row_at[i] + at));
          if constexpr (Shape::kAffine) prefetch_line(a.biases + (row_at[i] + at));
        }
      for (int u = first_unit; u < last_unit; u += 2) {
        const Batch now_s[2] = {s[0], s[1]}, now_b[2] = {b[0], b[1]};
        if (u + 2 < last_unit) load(u + 2);
#pragma unroll
        for (int h = 0; h < 2; h++) {
          if (u + h >= last_unit) break;
          wait_phase(unit_empty(ring.slot()), ring.parity() ^ 1);
          bool extreme = false;
#pragma unroll
          for (int i = 0; i < 2; i++) {
#pragma unroll
            for (int group = h * kGroups; group < (h + 1) * kGroups; group++)
              extreme |=
                  Decode::extreme(Shape::kAffine ? now_s[i].half(group) : now_s[i].byte(group));
            const int row = warp * 64 + lane + 32 * i;
            const uint32_t to = unit_at(ring.slot()) + Shape::kCodeBytes + row * kRowBytes +
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
          if (extreme) store_shared(extreme_at(), 1);
          __syncwarp();
          if (lane == 0) arrive(unit_full(ring.slot()));
          ring.taken++;
        }
      }
    });
  }
};

#endif  // LOWBIT_HOPPER

}  // namespace lowbit::cuda
