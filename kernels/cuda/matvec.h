// matvec: few rows of x. The packed weights stream once, whatever M is, and meet the tensor
// cores in the order in which they are stored (load.h): W's rows on the m side, tokens on n.
//
//   block       one per multiprocessor, or `split_k` of them (a cluster) with a part of K each
//   some warps  fill a ring in shared memory with the rows of W that the block multiplies, tile
//               after tile of 16 rows, some thousand codes of each row at a time
//   the others  take the ring's slices of K in turn: fragments from the codes, times x, and
//               per group    y += scale * (codes x X) + bias * (sum of X)
//   warps' sums of y through shared memory in fixed order; split_k: the cluster's as well
//
// x waits in shared memory in fragment order, and affine groups' sums of x beside it.
//
// Copies are the copy engine's, a row each, and as long as the ring allows: one warp issues
// about one in 7 ns (with 256 bytes a copy it could not keep up: 20 us for 4-bit 4096x14336
// without any arithmetic). Rings of each warp's own, filled by its own cp.async, tie the copies
// to the arithmetic: 14.9 us where reading alone takes 9.6 (H200, 2026-11-22). A tensor copy of
// all rows' scales, which are 32 of the 48 copies of a 4-bit stage, is slower than one a
// row: 11.9 and 12.8 us at M = 1, nvfp4 13.4 and 14.1, experts of 16 tokens 69 and 74
// (2026-11-29).
//
// What the 12.4 us of 4-bit 4096x14336 at M = 1 are (H200, 2026-11-28; reading alone 9.6): ncu
// counts, at 1.35 GHz, 19,700 cycles and 10,600 instructions a scheduler, 7,500 of them the
// products', 2,000 the copies'; 11 % of its samples wait for a stage, 12 % fall before the
// first one. Not faster: the first tiles asked for from the L2 cache before anything else (12.8
// to 14.2), the products' text run once while the first stage is awaited (no change), all lines
// of the arguments touched at once (12.5), and a fifth fewer instructions through stages of 16
// slices (12.5), which begin later.
//
// Stamps of clock64 in the same kernel (H200, 2026-11-29, 1.98 GHz, 12.0 us or 23,800 cycles):
// 4,400 cycles are none of a block's; a block asks for its first copy at 1,000, has x staged at
// 1,900 and the first stage at 3,500, from there on a stage every 1,080, which is 4.5 TB/s, the
// last at 17,700, and ends at 19,300. So what bounds it are the two ends: a third fewer
// instructions of products changed nothing (visits to only those stages that have a slice of
// the warp's; with M = 4 those cost up to 0.4 us), nor did 20 or 24 warps that multiply (11.8;
// 4096x4096 0.1 to 0.2 slower), nor sums gone through once before the first tile, so that their
// text is there at the end (no change). Blocks end between 8.4 and 10.8 us after the first has
// begun, those with seven tiles of 16 rows between 9.1 and 10.8, others from run to run: with
// as many rows for each of them, to the row, it takes 12.2 where whole tiles take 11.9
// (4096x28672 20.9 and 19.8, experts of one token 12.3 and 11.4).
//
// nvfp4 (14.7, and 13.9 in four teams) waits for no stage: with one team it takes 14,600
// instructions a scheduler, 8,200 of them its products', half of those logic, which issues
// every other cycle; 1,900 are visits of stages, 1,600 copies, 950 sums by column, 800 x.
// Without gain: e2m1 as float16 (6 % fewer operations of logic) or with shared signs (20 %
// fewer, more of others), 20 or 24 warps (13.9 with one team), sums in two accumulators in
// turn, half of the text in a loop. Nor as bytes from tables, by two byte permutes a word, and
// x in four limbs: 15 instructions where these take 20, and 4096x14336 takes 13.3 us instead of
// 13.5, experts of one token 13.9 and 13.7, 14336x4096, whose x then fills half of shared
// memory, 15.3 and 14.0.
//
// Experts, 3-bit, 16 tokens (73 us; H200, 2026-11-29): 85,200 instructions a scheduler at 0.57
// a cycle; products 46,100, copies 9,100, their waiting 8,000, addresses of slices 5,500, sums
// of tiles 3,600. Their 16 warps are in products 57 % of the time. Without gain: two teams
// (76), stages of 8 slices (70, but 123 with 64 tokens where this takes 116), waits that sleep
// (try_wait with a time: one row of x 1 % slower).
#pragma once

#include <cooperative_groups.h>

#include <type_traits>

#include "matvec_float.h"
#include "matvec_in_place.h"

namespace lowbit::cuda {

template <class F, class T, int TOK, bool gather>
using MatvecProducts = std::conditional_t<
    MatvecShape<F, T, TOK>::kInPlace, MatvecInPlace<F, T, gather>,
    std::conditional_t<MatvecShape<F, T, TOK>::kInteger, MatvecInteger<F, T, TOK, gather>,
                       MatvecFloat<F, T, TOK, gather>>>;

template <class F, class T, int TOK, bool gather = false>
struct MatvecBlock : MatvecProducts<F, T, TOK, gather> {
  using Base = MatvecProducts<F, T, TOK, gather>;
  using Base::a, Base::at, Base::shared, Base::base, Base::warp, Base::lane, Base::g, Base::c;
  using Base::k0, Base::k1;
  using Base::kBatch, Base::kTogether, Base::kStride;
  using Base::kSlice, Base::kRows, Base::kBarrier;
  using typename Base::Shape, typename Base::Place, typename Base::Slice;
  static constexpr int NT = Shape::kColumnTiles;

  __device__ void write(int row, int token, float sum) const {
    float alpha = 1.0f;
    if constexpr (Shape::kFolded) alpha = __uint_as_float((Base::kDown + 127) << 23);
    if (a.global_x) alpha *= *a.global_x / Nvfp4::kGlobalMax;
    const int64_t matrix = gather ? max(this->run.matrix, 0) : 0;
    if (a.global_w)
      alpha *= a.global_w[gather && a.global_w_count > 1 ? matrix : 0] / Nvfp4::kGlobalMax;
    sum *= alpha;
    if (a.bias) {
      const int64_t at = matrix * a.N + row;
      sum += a.bias_is_f32 ? static_cast<const float*>(a.bias)[at]
                           : float(static_cast<const T*>(a.bias)[at]);
    }
    if (gather && this->run.matrix < 0) sum = __uint_as_float(0x7fffffffu);
    static_cast<T*>(a.y)[this->y_row(token) * a.N + row] = T(sum);
  }
  // One sum over this block's part of K.
  template <bool split>
  __device__ __forceinline__ void keep(int tile, int r, int token, float sum) const {
    if constexpr (split) {
      auto* parts = reinterpret_cast<float*>(shared + at.parts);
      parts[(tile * TOK + token) * kRows + r] = sum;
    } else if ((this->run.first_tile + tile) * kRows + r < a.N) {
      write((this->run.first_tile + tile) * kRows + r, token, sum);
    }
  }

  // All of x, by the warps that multiply. Ends when it can be read; says what sums of products
  // are to be multiplied by, or 0 where x is so large that codes must not meet it before their
  // scale. first: the block's first run, which the ring's barriers must be there for. qx: x is
  // quantized first.
  template <bool qx>
  __device__ __forceinline__ float stage_x(bool first) const {
    // No team reads what was there before. (One alone has met since it did.)
    if (Shape::kMostTeams > 1 && !first) sync_threads<Shape::kWorkers>(kBarrier);
    for (int i = warp * 32 + lane; i < Shape::kZeros / 4; i += Shape::kWorkers)
      reinterpret_cast<uint32_t*>(shared + at.zeros)[i] = 0;
    this->fill_table();
    float unit = Base::kUnit;
    if constexpr (Base::kRaised) {
      const auto any_from = [](uint32_t largest, int e) {
        return sync_any<Shape::kWorkers>(kBarrier, largest >= uint32_t(127 + e) << 23);
      };
      // Once for x of ordinary size, twice where that is not what it turns out to be.
#pragma unroll 1
      for (int lifts = 1, before = -1; lifts != before;) {
        const uint32_t largest = store_all_x<qx>(lifts);
        before = lifts;
        if (any_from(largest, 127 - Base::kXLift))
          lifts = 0;
        else if (!any_from(largest, -Base::kXLift))
          lifts = 2;
        unit = Base::kUnit * __uint_as_float(uint32_t(127 + (1 - lifts) * Base::kXLift) << 23);
      }
    } else {
      const uint32_t largest = store_all_x<qx>(0);
      if (sync_any<Shape::kWorkers>(kBarrier, largest >= __float_as_uint(0x1p100f)))
        unit = 0.0f;
    }
    if (!gather || first) sync_threads<Shape::kThreads>(Base::kBegun);
    return unit;
  }
  // Returns the largest magnitude, as bits, of what this thread stored, where it matters.
  template <bool qx>
  __device__ __forceinline__ uint32_t store_all_x(int lifts) const {
    constexpr int NT = Shape::kTokenTiles;
    uint32_t largest = 0;
    constexpr int kStep = kBatch * kStride;
    struct Batch {
      uint4 x[NT][kBatch][kTogether];
    };
    Batch next;
    const auto load = [&](int k) {
#pragma unroll
      for (int nt = 0; nt < NT; nt++) {
        this->load_x(k, 8 * nt, next.x[nt]);
        if constexpr (qx) this->quantize(next.x[nt]);
      }
    };
    const int first = k0 + warp * kSlice + lane * 8;
    if constexpr (Shape::kAhead) load(first);
#pragma unroll 1
    for (int k = first; k - lane * 8 < k1; k += kStep) {
      if constexpr (!Shape::kAhead) load(k);
      const Batch in = next;
      if constexpr (Shape::kAhead) load(k + kStep);
#pragma unroll
      for (int b = 0; b < kBatch; b++)
#pragma unroll
        for (int nt = 0; nt < NT; nt++)
          if (k - lane * 8 + b * kStride < k1)
            Base::store_x(k + b * kStride, 8 * nt, in.x[nt][b], lifts, largest);
    }
    return largest;
  }
  // This warp's sums of a tile, of all columns, to its place in a room.
  __device__ __forceinline__ void store_sums(float (&y)[NT][4], float* room) const {
    this->sum_columns(y);
#pragma unroll
    for (int i = 0; i < 4 * Shape::kTokenTiles; i++) {
      const int token = i / 4 * 8 + 2 * c + i % 2;
      if (token < TOK) room[token * Shape::kTokenSums + i % 4 / 2 * 8] = y[i / 4][i % 4];
    }
  }

  // The work of the warps that multiply, for a run whose x is staged. unit: what stage_x said.
  // How many teams there are is part of the text: as a variable it took 3-bit experts 10 %.
  template <bool split = false, bool qx = false>
  __device__ __forceinline__ void multiply(Place& place, float unit) const {
    if (Shape::kMostTeams > 1 && at.teams > 1)
      multiply_by<split, qx, Shape::kMostTeams>(place, unit);
    else
      multiply_by<split, qx, 1>(place, unit);
  }
  template <bool split, bool qx, int teams>
  __device__ __forceinline__ void multiply_by(Place& place, float unit) const {
    constexpr int team_warps = Shape::kWarps / teams;
    const int tiles = this->run.tiles, tokens = this->run.tokens;
    const int team = warp / team_warps, member = warp % team_warps;
    const auto sync_team = [&] {
      sync_threads<32 * team_warps>(teams > 1 ? Base::kTeamBarrier + team : kBarrier);
    };
    constexpr int tile_sums = team_warps * Shape::kWarpSums;
    constexpr int one_room = Shape::kFlush * tile_sums;
    auto* const rooms =
        reinterpret_cast<float*>(shared + at.sums) + team * Shape::kRooms * one_room;
    auto* room = rooms;
    int waiting = 0, turn = member;  // turn: this warp's next slice of the stage
    const int of_tile = teams > 1 ? int(uint32_t(k1 - k0 + at.codes - 1) / at.codes) : 0;
    int passed = 0;  // tiles whose stages `place` has behind it
    for (int tile = team; tile < tiles; tile += teams) {
      if (teams > 1) this->skip_places(place, (tile - passed) * of_tile);
      passed = tile + 1;
      float y[NT][4] = {};
#pragma unroll 1
      for (int k = k0; k < k1; k += at.codes) {
        const int slices = int(uint32_t(min(at.codes, k1 - k) + kSlice - 1) / kSlice);
        // Parity tells a round only from the one before, and what was in this place then may
        // have been another team's, not copied yet: that team has left it.
        if (teams > 1 && place.round > 0) wait_phase(this->empty(place), (place.round - 1) & 1);
        wait_phase(this->full(place), place.round & 1);
#pragma unroll 1
        for (; turn < slices; turn += team_warps) {
          const int here = k + turn * kSlice, left = k1 - here;
          Slice s;
#pragma unroll
          for (int r = 0; r < 2; r++) {
            const int row = g + 8 * r;
            s.codes[r] = place.stage + row * at.code_row + turn * Shape::kSliceCodes;
            s.scales[r] = place.stage + kRows * at.code_row + row * at.scale_row +
                          turn * Shape::kSliceScales;
            s.biases[r] = s.scales[r] + kRows * at.scale_row;
          }
          s.x = Base::x_at(here), s.x_sums = Base::sums_at(here);
          if (left > kSlice - Shape::kSpan)
            Base::template multiply_slice<true>(s, 0, y);
          else
            Base::template multiply_slice<false>(s, (left + Shape::kSpan - 1) / Shape::kSpan,
                                                 y);
        }
        turn -= slices;
        __syncwarp();
        if (lane < kArrivals) arrive(this->empty(place));
        this->next_place(place);
      }
      store_sums(y, room + waiting * tile_sums + member * Shape::kWarpSums + g);
      if (++waiting < Shape::kFlush && tile + teams < tiles) continue;
      sync_team();
      for (int i = member * 32 + lane; i < waiting * kRows * TOK; i += 32 * team_warps) {
        const int r = i % kRows, token = i / kRows % TOK, which = i / kRows / TOK;
        if (token >= tokens) continue;
        const float* from = room + which * tile_sums + token * Shape::kTokenSums + r;
        float sum = 0.0f;
#pragma unroll
        for (int w = 0; w < team_warps; w++) sum += from[w * Shape::kWarpSums];
        if (unit != 0.0f)
          keep<split>(tile - (waiting - 1 - which) * teams, r, token, sum * unit);
      }
      // The other room is free: its sums were read before the barrier just passed.
      if constexpr (Shape::kRooms == 1)
        sync_team();
      else
        room = rooms + (room == rooms ? one_room : 0);
      waiting = 0;
    }
    if (teams > 1) this->skip_places(place, (tiles - passed) * of_tile);
    if (unit == 0.0f) {
      const MatvecBlock own = *this;  // whose address may escape: this one stays in registers
      own.template run_extreme<split, qx>();
    }
  }

  // The same sums from weights decoded one by one, for extreme x.
  template <bool split, bool qx>
  __device__ __noinline__ void run_extreme() const {
    for (int tile = 0; tile < this->run.tiles; tile++)
      for (int i = warp; i < kRows * this->run.tokens; i += Shape::kWarps) {
        const int r = i % kRows, token = i / kRows;
        const int64_t row =
            this->w_row(min((this->run.first_tile + tile) * kRows + r, a.N - 1));
        float sum = 0.0f;
        for (int k = k0 + lane; k < k1; k += 32) {
          float x = float(static_cast<const T*>(a.x)[this->x_row(token) * a.K + k]);
          if constexpr (qx) x = this->quantize(x);
          sum = fmaf(x, one_weight<F, T>(a, row, k), sum);
        }
        for (int other = 16; other > 0; other /= 2)
          sum += __shfl_xor_sync(0xffffffffu, sum, other);
        if (lane == 0) keep<split>(tile, r, token, sum);
      }
  }
};

template <class F, class T, int TOK, bool split, bool qx>
__global__ void __launch_bounds__(MatvecShape<F, T, TOK>::kThreads, 1)
    matvec_kernel(const __grid_constant__ MatvecArgs a) {
  using Shape = MatvecShape<F, T, TOK>;
  namespace cg = cooperative_groups;
  extern __shared__ __align__(128) char shared[];
  const int parts = split ? int(gridDim.x) / a.teams : 1;
  const int rank = split ? int(blockIdx.x) % parts : 0;
  const int team = int(blockIdx.x) / parts;
  const int first = team * a.tiles + min(team, a.more_tiles);
  const int tiles = a.tiles + (team < a.more_tiles);
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  const int k0 = rank * a.part, k1 = k0 + a.part < a.K ? k0 + a.part : a.K;
  const MatvecBlock<F, T, TOK> block{{a, a.at, shared, shared_address(shared), warp, lane,
                                      lane / 4, lane % 4, k0, k1, MatvecRun{first, tiles, a.M},
                                      LaneAt<F::kBits, Shape::kJoin>(lane % 4)}};
  auto place = block.first_place();
  if (warp >= Shape::kWarps)
    block.fill_ring([&](auto body) { body(block, place); });
  else
    block.template multiply<split, qx>(place, block.template stage_x<qx>(true));
#if __CUDA_ARCH__ >= 900
  if constexpr (split) {
    auto cluster = cg::this_cluster();
    cluster.sync();
    const auto* mine = reinterpret_cast<const float*>(shared + block.at.parts);
    const int total = tiles * TOK * Shape::kRows;
    for (int i = rank * int(blockDim.x) + int(threadIdx.x); i < total;
         i += parts * int(blockDim.x)) {
      const int token = i / Shape::kRows % TOK;
      const int row = (first + i / (Shape::kRows * TOK)) * Shape::kRows + i % Shape::kRows;
      if (token >= a.M || row >= a.N) continue;
      float sum = 0.0f;
      for (int r = 0; r < parts; r++) sum += cluster.map_shared_rank(mine, r)[i];
      block.write(row, token, sum);
    }
    cluster.sync();
  }
#endif
}

// matvec_format.cu, once a format.
template <Format>
void matvec_format(const Product&, const Plan&, Queue&);

}  // namespace lowbit::cuda
