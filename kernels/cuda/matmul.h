// matmul: many rows of x. wgmma with W's rows on the m side, decoded from their codes in
// registers, and tokens (rows of x) on the n side, from shared memory. sm_90a.
//
//   two clusters or one, for a tile and half of K or all of it
//   cluster      `share` blocks with neighbouring rows of W and the same tokens, times `split`
//                parts of K of the same tile
//   block        128 rows of W x kTokens tokens, tile after tile (split: one tile)
//     2 warpgroups      64 rows each: decode 16 k of their rows while the tensor cores
//                       multiply the 16 before them; sums stay in registers to the end
//     or 4 warpgroups   two for each 64 rows, with every other unit of K: for few tokens, where
//                       decoding takes longer than multiplying
//     one more warpgroup
//       a lane          tensor copies: codes, a unit (128 k) wide, and x, 64 k wide, of which
//                       each block copies its share of a tile's tokens to all that share it
//       other warps     scales and biases to shared memory, widened to what the decoder wants
//                       (matmul_scales.cuh)
//
// Shared memory: ring of stages, a unit each (x, where it is not apart; codes; scales) | x, a
// ring of its own for 256 tokens and more | y on its way out, before that sums between
// warpgroups | barriers. After the last multiply of a split tile the ring holds this block's
// sums, which the cluster adds in the order of the parts, and two clusters' sums meet in
// memory, where the second to come adds both: results do not depend on timing.
//
// qqmm's x comes in an order that suits codes better (lane_order.h).
//
// Gathered products are the same but for where a tile comes from and where y's rows go:
// matmul_gather.cuh. Their tiles are not split.
//
// What the time of few tokens went to (M=64, 4-bit, 4096x14336, 26.9 us; H200, 2026-11-22): not
// memory (without x 27.1, without codes 26.2) but instructions. Four warps a scheduler took
// 1040 cycles a unit, of which the tensor cores need 512 and the decoder's three instructions a
// pair 256; 180 of a warp's 300 instructions a unit were waits, arrivals and addresses. So a
// unit has one barrier to wait for and one to arrive at: 190 instructions, 22.5 us. A warp
// stays at a multiply with operands in registers until the tensor cores are done with them:
// what is loaded next is asked for before it. 3.7 us pass before the first unit is there, half
// of them before its copies are asked for, with instructions that no cache has yet. To ask for
// less at first, so that the first scales meet no queue, does not help, and to ask for the
// first lines from the warps that wait costs 1 us (2026-11-29). Nor does it help to ask for the
// first unit before the other barriers are there, as skinny does: 4-bit 21.0 and 20.9,
// M=256 54.5 and 55.1. In a graph the kernel asks at 1.3 us (2.1 with 256 tokens), begins to
// multiply at 2.7 (3.3), and with 64 tokens does so until 18.8 and ends at 19.7.
#pragma once

#include "kernels.h"
#include "matmul_decode.cuh"
#include "matmul_gather.cuh"
#include "matmul_rules.h"
#include "wgmma.h"

namespace lowbit::cuda {

struct MatmulArgs {
  // x: two ways to copy it, x_rows of a tile's tokens at once (half of them where two blocks
  // share them). Plain products: whole tiles, and the last one, if it is not whole. Gathered
  // ones: as it is, and sorted.
  CUtensorMap x[2], codes, y;
  const void *x_data, *sorted_x_data;
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
  int x_columns;    // from one row of x to the next
  bool lane_order;  // of x: lane_order.h
  // Tiles: `share` * 128 rows, kTokens tokens; see each_tile. token_tiles: gathered, at most.
  int row_groups, token_tiles, panel;
  int share, split;       // share: 1 or 2
  int clusters;           // in the grid
  uint32_t cluster_part;  // 2^32 over share * split and a little more; 0: a block is a cluster
  int x_rows[2];
  int units, part;  // of 128 k: of K, and of each part (even)
  int out_tokens;   // that leave at once: kOutTokens, or 16 of a split tile
  // Two clusters to a tile: where the second of them begin (else beyond the grid), sums of
  // each block, of first and second clusters, and for two that meet a word: what `meeting` says
  // once one has come, and one more if it met extreme scales.
  uint32_t second_block;
  float* sums;
  unsigned long long *met, meeting;
  MatmulGather gather;
};

template <class F, class T, int kTokens>
struct MatmulShape {
  static constexpr int kRows = 128;
  static constexpr int kParities = kTokens <= 64 ? 2 : 1;  // warpgroups to the same 64 rows
  static constexpr int kGroups = 2 * kParities, kThreads = 128 * (kGroups + 1);
  static constexpr bool kAffine = F::kHasBias;

  // x apart: a ring of its own, in halves of a unit.
  static constexpr bool kApart = kTokens > 128;
  static constexpr int kXBytes = kTokens * 128;
  static constexpr int kXCopies = kTokens > 256 ? 2 : 1;  // a copy takes 256 rows
  static constexpr int kXStages = kApart ? 4 : 0;

  static constexpr int kRowBytes = 16 * F::kBits;  // codes of a unit
  static constexpr int kSwizzle = (kRowBytes & (kRowBytes - 1)) == 0 ? kRowBytes : 0;
  static constexpr int kCodeBytes = kRows * kRowBytes;
  static constexpr int kPer64 = F::kGroup < 64 ? 64 / F::kGroup : 1;
  // Scales of a unit, row after row: of each group, or of each half of a group of 128, a
  // scale or, as stored, a scale and a bias.
  static constexpr int kEntries = 2 * kPer64, kEntry = kAffine ? 8 : 4;
  static constexpr int kEntryRow = kEntries * kEntry;  // bytes: 16 or 32
  // Within a stage.
  static constexpr int kCodesAt = kApart ? 0 : 2 * kXBytes;
  static constexpr int kEntriesAt = kCodesAt + kCodeBytes;
  static constexpr int kStageBytes = kEntriesAt + kRows * kEntryRow;

  // Of each warpgroup that multiplies: kOutTokens tokens x 64 rows of y at a time. Warpgroups
  // of the same rows add up their sums there before; then each brings kOwnTokens to y, or the
  // first of them all. 32 of 256 tokens at a time take 4,200 cycles, 64 take 3,000.
  static constexpr int kOwnTokens = kTokens / kParities < 16 ? 16 : kTokens / kParities;
  static constexpr int kMostOut = kTokens == 256 ? 64 : 32;
  static constexpr int kOutTokens = kOwnTokens < kMostOut ? kOwnTokens : kMostOut;
  static constexpr int kOutBytes = kMostOut * 128 * (3 - kParities);
  static constexpr int kTableBytes = kAffine ? 0 : 1024;  // entries by scale byte
  static constexpr int kBarrierBytes = 256;

  static constexpr int kOther = kXStages * kXBytes + kGroups * kOutBytes + kTableBytes +
                                kBarrierBytes + 1024;  // and to align them
  static constexpr int kFit = (227 * 1024 - kOther) / kStageBytes;
  static constexpr int kStages = kFit < 8 ? kFit : 8;
  static_assert(kStages >= 3);

  static constexpr int kXAt = kStages * kStageBytes;
  static constexpr int kOutAt = kXAt + kXStages * kXBytes;
  static constexpr int kTableAt = kOutAt + kGroups * kOutBytes;
  static constexpr int kBarriersAt = kTableAt + kTableBytes;
  static constexpr int kBytes = kBarriersAt + kBarrierBytes + 1024;
  // A split tile's sums lie where the ring was.
  static_assert(kOutAt >= kTokens * kRows * 4);

  // A warp of scales skips the units of others, and must not come to a barrier two rounds of
  // the ring after those that it waited for.
  static constexpr int kScaleWarps = kApart || kStages < 5 ? 2 : 3;
  static_assert(kStages >= 2 * kScaleWarps - 1);
  // Scales that a lane loads at once: of 256 k of one row.
  static constexpr int kScaleSize = kAffine ? 2 : 1;
  static constexpr int kBatchBytes = 256 / F::kGroup * kScaleSize;
};

// matmul_format.cu, once a format.
template <Format>
void matmul_format(const Product&, const Plan&, Queue&);

#if LOWBIT_HOPPER

// Where a ring of `stages` is: the slot, and the parity of the round, which is what to wait
// for until the slot is full; its opposite until it is empty.
template <int stages>
struct Ring {
  uint32_t slot = 0, parity = 0;
  __device__ __forceinline__ void advance(uint32_t by = 1) {
    slot += by;
    if (slot >= stages) slot -= stages, parity ^= 1;
  }
  __device__ __forceinline__ void step_back() {
    if (slot == 0) slot = stages, parity ^= 1;
    slot--;
  }
};

template <class F, class T, int kTokens, bool kGather>
struct MatmulBlock {
  using Shape = MatmulShape<F, T, kTokens>;
  using Decode = WeightPairs<F, T>;
  using Tile = MatmulTile<kGather>;
  using UnitRing = Ring<Shape::kStages>;
  using XRing = Ring<Shape::kXStages ? Shape::kXStages : 1>;

  const MatmulArgs& a;
  uint32_t base;
  // Whether tiles are found without divisions where there is one tile of tokens. So for the
  // warps that copy, whose first copies divisions held up by up to 900 cycles (4-bit, M=16:
  // 4096x4096 10.1 us for 10.7, 4096x14336 16.6 for 17.0; H200, 2026-11-29). Not for those that
  // multiply: numbers that take few instructions the compiler computes again in every unit, 20
  // instructions of 200.
  bool quick;
  int share_rank, part, first_unit, last_unit;

  __device__ MatmulBlock(const MatmulArgs& a, uint32_t base, bool quick)
      : a(a), base(base), quick(quick) {
    const int rank = int(cluster_rank()), before = is_second() ? a.split : 0;
    share_rank = quick ? rank & (a.share - 1) : rank % a.share;
    part = quick ? rank >> (a.share - 1) : rank / a.share;
    first_unit = min((before + part) * a.part, a.units);
    last_unit = min(first_unit + a.part, a.units);
  }

  // Of two clusters to a tile; and this block's number among those of the first or the second.
  __device__ __forceinline__ bool is_second() const { return blockIdx.x >= a.second_block; }
  __device__ __forceinline__ uint32_t block() const {
    return blockIdx.x - (is_second() ? a.second_block : 0);
  }

  __device__ __forceinline__ uint32_t stage(uint32_t slot) const {
    return base + slot * Shape::kStageBytes;
  }
  __device__ __forceinline__ uint32_t x_stage(uint32_t slot) const {
    return base + Shape::kXAt + slot * Shape::kXBytes;
  }
  __device__ __forceinline__ uint32_t full(uint32_t slot) const {
    return base + Shape::kBarriersAt + 8 * slot;
  }
  __device__ __forceinline__ uint32_t empty(uint32_t slot) const { return full(slot) + 64; }
  // Of x apart.
  __device__ __forceinline__ uint32_t x_full(uint32_t slot) const { return full(slot) + 128; }
  __device__ __forceinline__ uint32_t x_empty(uint32_t slot) const { return full(slot) + 160; }
  // Not zero: a warp of scales met some that the decoder cannot carry.
  __device__ __forceinline__ uint32_t extreme_at() const { return full(0) + 192; }

  __device__ void init() const {
    for (int i = 0; i < Shape::kStages; i++) {
      init_barrier(full(i), 1 + kArrivals);
      init_barrier(empty(i), 8 * kArrivals * (Shape::kApart ? 1 : a.share));
    }
    for (int i = 0; i < Shape::kXStages; i++) {
      init_barrier(x_full(i), 1);
      init_barrier(x_empty(i), 8 * kArrivals * a.share);
    }
    store_shared(extreme_at(), 0);
    publish_barriers();
  }

  // After this the block's barriers are there, and where blocks signal each other's, theirs.
  // Whoever initialised them goes on at once if it can; nobody waits for the first scales.
  enum Role { kInitialises, kCopies, kMultiplies };
  __device__ __forceinline__ void start(Role role) const {
    constexpr int kMost = 128 * Shape::kGroups + 32, kOthers = 128;
    if (a.share > 1)
      cluster_sync_relaxed();
    else if (role == kInitialises)
      arrive_threads<kMost>(0), arrive_threads<kOthers>(6);
    else if (role == kCopies)
      sync_threads<kOthers>(6);
    else if (role == kMultiplies)
      sync_threads<kMost>(0);
  }

  // block() / size. Not %clusterid, nor %nclusterid for their number: cudaGraphExecUpdate
  // leaves a node's cluster as it was (launch.cpp), and these with it. Where they told the
  // warps that copy how many clusters there are, these went on to a second tile, of which the
  // others knew nothing: through MLX, 3-bit 4096x1408, M = 65 (33 clusters) after M = 64 (22)
  // failed, and does not without them (H200, CUDA 13, 2026-11-29).
  __device__ __forceinline__ int quick_cluster() const {
    return int(a.cluster_part ? __umulhi(block(), a.cluster_part) : block());
  }

  // Tiles in the order in which clusters take them: tokens first within a panel of `panel`
  // token tiles, so that what runs at once shares W's rows and stays within a part of x that
  // the L2 cache holds. The body gets its first row and what Tile makes a tile of: the first
  // token, or, gathered, the place in the list.
  template <class Body>
  __device__ __forceinline__ void each_tile(Body body) const {
    const int size = a.share * a.split;
    const int cluster = quick ? quick_cluster() : int(block()) / size;
    const int clusters = quick ? a.clusters : int(gridDim.x) / size;
    const int whole = a.row_groups * a.panel;
    const int most = a.row_groups * a.token_tiles;
    const auto token_tiles = [&] { return kGather ? Tile::count(a.gather) : a.token_tiles; };
    const auto tiles = [&] { return kGather ? a.row_groups * token_tiles() : most; };
    for (int t = cluster; t < tiles(); t += clusters) {
      int row = t, place = 0;
      if (kGather || !quick || a.token_tiles > 1) {
        const int first = t / whole * a.panel, within = t % whole;
        const int width = min(a.panel, token_tiles() - first);
        row = within / width, place = (first + within % width) * (kGather ? 1 : kTokens);
      }
      body((row * a.share + share_rank) * Shape::kRows, place);
    }
  }

  // Which of the two ways. `sorted`: as Tile::copied said.
  __device__ __forceinline__ int way_of_x(int token0, bool sorted) const {
    return kGather ? sorted : token0 + kTokens > a.M;
  }
  // What arrives of x for 64 k.
  __device__ __forceinline__ uint32_t x_bytes(int way) const {
    return uint32_t(a.x_rows[way] * Shape::kXCopies * a.share * 128);
  }
  // 64 k of a tile's tokens, or of those that this block copies to all that share them.
  __device__ __forceinline__ void copy_x(int way, uint32_t to, int k, int token0,
                                         uint32_t bar) const {
    constexpr int kOne = kTokens / Shape::kXCopies;
    if (a.share == 1) {
#pragma unroll
      for (int i = 0; i < Shape::kXCopies; i++)
        load_tile(to + i * kOne * 128, a.x[way], k, token0 + i * kOne, bar);
    } else {
      const int tokens = a.x_rows[way] * share_rank;
      multicast_tile(to + tokens * 128, a.x[way], k, token0 + tokens, bar,
                     uint16_t(3 << 2 * part));
    }
  }

  // A lane: codes, and x where it is not apart.
  __device__ void copy() const {
    UnitRing ring;
    const uint64_t policy = !kGather && a.token_tiles == 1 ? read_once() : read_again();
    const bool sorted = Tile::copied(a.gather);
    each_tile([&](int row0, int place) {
      const Tile tile(a.gather, row0, place);
      const int row = tile.first_row(a.N) + row0, token0 = tile.token0;
      const int way = way_of_x(token0, sorted);
      for (int u = first_unit; u < last_unit; u++, ring.advance()) {
        const uint32_t bar = full(ring.slot), to = stage(ring.slot);
        wait_phase(empty(ring.slot), ring.parity ^ 1);
        arrive_expecting(bar, Shape::kCodeBytes + (Shape::kApart ? 0 : 2 * x_bytes(way)));
        load_tile(to + Shape::kCodesAt, a.codes, u * Shape::kRowBytes, row, bar, policy);
        if constexpr (!Shape::kApart) {
          copy_x(way, to, u * 128, token0, bar);
          copy_x(way, to + Shape::kXBytes, u * 128 + 64, token0, bar);
        }
      }
    });
  }
  // A lane: x apart.
  __device__ void copy_apart() const {
    XRing ring;
    const bool sorted = Tile::copied(a.gather);
    each_tile([&](int row0, int place) {
      const int token0 = Tile(a.gather, row0, place).token0;
      const int way = way_of_x(token0, sorted);
      for (int k = first_unit * 128; k < last_unit * 128; k += 64, ring.advance()) {
        wait_phase(x_empty(ring.slot), ring.parity ^ 1);
        arrive_expecting(x_full(ring.slot), x_bytes(way));
        copy_x(way, x_stage(ring.slot), k, token0, x_full(ring.slot));
      }
    });
  }
};

#endif  // LOWBIT_HOPPER

}  // namespace lowbit::cuda
