// matvec: few rows of x. The packed weights stream once, whatever M is, and meet the tensor
// cores in the order in which they are stored (load.h): W's rows on the m side, tokens on n.
//
//   block       one per multiprocessor, or `split_k` of them (a cluster) with a part of K each
//   some warps  fill a ring in shared memory with the rows of W that the block multiplies, tile
//               after tile of 16 rows, some thousand codes of each row at a time
//   the others  take the ring's slices of K in turn: fragments from the codes, times x, and
//               per group    y += scale * (codes x X) + (bias - offset * scale) * (sum of X)
//   warps' sums of y through shared memory in fixed order; split_k: the cluster's as well
//
// x waits in shared memory in fragment order, and affine groups' sums of x beside it.
//
// Copies are the copy engine's, a row each, and as long as the ring allows: one warp issues
// about one in 7 ns (with 256 bytes a copy it could not keep up: 20 us for 4-bit 4096x14336
// without any arithmetic). Rings of each warp's own, filled by its own cp.async, tie the copies
// to the arithmetic: 14.9 us where reading alone takes 9.6 (H200, 2026-11-22).
#pragma once

#include <cooperative_groups.h>

#include "matvec_integer.h"

namespace lowbit::cuda {

template <class F, class T, int TOK, bool gather = false>
struct MatvecBlock : MatvecInteger<F, T, TOK, gather> {
  using Base = MatvecStaging<F, T, TOK, gather>;
  using Integer = MatvecInteger<F, T, TOK, gather>;
  using Base::a, Base::at, Base::shared, Base::base, Base::warp, Base::lane, Base::g, Base::c;
  using Base::k0, Base::k1, Base::lane_at;
  using Base::kBatch, Base::kTogether, Base::kStride;
  using Base::kSlice, Base::kRows, Base::kDown, Base::kBarrier;
  using typename Base::Codes, typename Base::H, typename Base::Shape, typename Base::Place,
      typename Base::Slice;
  static constexpr int kPlanes = Codes::kPlanes, NT = Shape::kColumnTiles;
  static constexpr int kSlots = Shape::kSlots;

  // Scales (or biases) of group i of a row, and of group i + 1 if `n` is 2; i is then even.
  template <int n>
  __device__ __forceinline__ void load_scales(uint32_t row, int i, float (&s)[n]) const {
    if constexpr (Shape::kAffine && n == 2) {
      const uint32_t v = load_shared(row + 2 * i);
      s[0] = H::low(v), s[1] = H::high(v);
    } else if constexpr (Shape::kAffine) {
      uint16_t v;
      asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(row + 2 * i));
      s[0] = H::low(v);
    } else {
#pragma unroll
      for (int d = 0; d < n; d++) {
        uint32_t v;
        asm volatile("ld.shared.u8 %0, [%1];" : "=r"(v) : "r"(row + i + d));
        s[d] = F::Scale::decode(v);
      }
    }
  }
  // nvfp4's scale of this lane's codes of a block, as a pair of elements.
  __device__ __forceinline__ uint32_t folded_scale(uint32_t row, int block) const {
    uint32_t byte;
    asm volatile("ld.shared.u8 %0, [%1];" : "=r"(byte) : "r"(row + 2 * block + c / 2));
    return load_shared(base + at.table + 4 * byte);
  }

  // A slice, or its first groups.
  template <bool whole>
  __device__ __forceinline__ void multiply(const Slice& slice, int groups,
                                           float (&y)[NT][4]) const {
    constexpr int kBlocks = Shape::kSpan / 32;
    // Columns: token g % TOK, of the groups whose turn is slot g / TOK.
    const int my_slot = g / (TOK < 8 ? TOK : 8);
    const uint32_t zeros = base + at.zeros + 16 * c;
#pragma unroll
    for (int first = 0; first < Shape::kInSlice; first += kSlots) {
      float sum[NT][kPlanes][4] = {};
#pragma unroll
      for (int slot = 0; slot < kSlots; slot++) {
        if (!whole && first + slot >= groups) break;
        const uint32_t there = slice.x + (first + slot) * kBlocks * TOK * 64;
        const uint32_t from = Shape::kFree == 1 || my_slot == slot ? there : zeros;
#pragma unroll
        for (int i = 0; i < kBlocks; i++) {
          const int block = (first + slot) * kBlocks + i;
          uint32_t pairs[2][kPlanes][4];
#pragma unroll
          for (int r = 0; r < 2; r++) {
            Codes::pairs(lane_at.load(slice.codes[r] + block * 4 * F::kBits), pairs[r]);
            if constexpr (Codes::kLift != 0) {
              uint32_t factor;
              if constexpr (Shape::kFolded) {
                factor = folded_scale(slice.scales[r], block);
              } else {
                constexpr uint32_t one = H::power(Codes::kLift);
                factor = one | one << 16;
              }
#pragma unroll
              for (int p = 0; p < 4; p++) pairs[r][0][p] = H::multiply(pairs[r][0][p], factor);
            }
          }
#pragma unroll
          for (int nt = 0; nt < NT; nt++) {
            const uint4 xb = load_shared4(from + i * TOK * 64 + nt * 512);
#pragma unroll
            for (int plane = 0; plane < kPlanes; plane++) {
              float(&into)[4] = *(Shape::kFolded ? &y[nt] : &sum[nt][plane]);
              H::mma(into,
                     {pairs[0][plane][0], pairs[1][plane][0], pairs[0][plane][1],
                      pairs[1][plane][1]},
                     xb.x, xb.y);
              H::mma(into,
                     {pairs[0][plane][2], pairs[1][plane][2], pairs[0][plane][3],
                      pairs[1][plane][3]},
                     xb.z, xb.w);
            }
          }
        }
      }
      if constexpr (!Shape::kFolded) apply<whole>(sum, slice, first, groups, y);
    }
  }

  // y += scale * sum + (bias - offset * scale) * (sum of x), each column with its group's.
  // (Columns beyond kSlots * TOK are left out when columns are summed.)
  template <bool whole>
  __device__ __forceinline__ void apply(const float (&sum)[NT][kPlanes][4], const Slice& slice,
                                        int first, int groups, float (&y)[NT][4]) const {
    constexpr int kDistinct = TOK == 1 ? 2 : 1;  // groups of this lane's two columns
    const int group = first + 2 * c / TOK % kSlots;
    float2 x_sum[NT] = {};
    if constexpr (Shape::kAffine) {
#pragma unroll
      for (int nt = 0; nt < NT; nt++) {
        const uint2 v = load_shared2(slice.x_sums + (first * TOK + nt * 8) * 4);
        x_sum[nt] = {__uint_as_float(v.x), __uint_as_float(v.y)};
      }
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float s[kDistinct], offset[kDistinct] = {};
      load_scales(slice.scales[r], group, s);
      if constexpr (Shape::kAffine) load_scales(slice.biases[r], group, offset);
#pragma unroll
      for (int d = 0; d < kDistinct; d++) {
        if constexpr (Shape::kAffine) offset[d] = fmaf(-Codes::kOffset, s[d], offset[d]);
        if (!whole && group + d >= groups) s[d] = offset[d] = 0.0f;
      }
#pragma unroll
      for (int nt = 0; nt < NT; nt++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
          float code = sum[nt][0][2 * r + i];
          if constexpr (kPlanes == 2) code = fmaf(16.0f, sum[nt][1][2 * r + i], code);
          float& into = y[nt][2 * r + i];
          into = fmaf(s[i % kDistinct], code, into);
          if constexpr (Shape::kAffine)
            into = fmaf(offset[i % kDistinct], i ? x_sum[nt].y : x_sum[nt].x, into);
        }
    }
  }

  __device__ void write(int row, int token, float sum) const {
    float alpha = Shape::kFolded ? __uint_as_float((kDown + 127) << 23) : 1.0f;
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

  // All of x, by the warps that multiply. Ends when it can be read; says whether it is small
  // enough for codes to meet it before their scale. first: the block's first run, which the
  // ring's barriers must be there for. qx: x is quantized first.
  template <bool qx>
  __device__ __forceinline__ bool stage_x(bool first) const {
    constexpr int NT = Shape::kTokenTiles;
    uint32_t largest = 0;
#pragma unroll 1
    for (int k = k0 + warp * kSlice + lane * 8; k - lane * 8 < k1; k += kBatch * kStride) {
      uint4 in[NT][kBatch][kTogether];
#pragma unroll
      for (int nt = 0; nt < NT; nt++) {
        this->load_x(k, 8 * nt, in[nt]);
        if constexpr (qx) this->quantize(in[nt]);
      }
#pragma unroll
      for (int b = 0; b < kBatch; b++)
#pragma unroll
        for (int nt = 0; nt < NT; nt++)
          if (k - lane * 8 + b * kStride < k1) {
            if constexpr (Shape::kInteger)
              Integer::store_x(k + b * kStride, 8 * nt, in[nt][b], largest);
            else
              Base::store_x(k + b * kStride, 8 * nt, in[nt][b], largest);
          }
    }
    for (int i = warp * 32 + lane; i < Shape::kZeros / 4; i += Shape::kWorkers)
      reinterpret_cast<uint32_t*>(shared + at.zeros)[i] = 0;
    if constexpr (Shape::kFolded) {
      constexpr int kUp = Codes::kLift - kDown;
      auto* table = reinterpret_cast<uint32_t*>(shared + at.table);
      for (int i = warp * 32 + lane; i < 256; i += Shape::kWorkers) {
        const uint32_t s =
            H::bits(F::Scale::decode(uint32_t(i)) * __uint_as_float((kUp + 127) << 23));
        table[i] = s | s << 16;
      }
    }
    if (!gather || first) sync_threads<Shape::kThreads>(Base::kBegun);
    return !sync_any<Shape::kWorkers>(kBarrier, largest >= __float_as_uint(0x1p100f));
  }
  // This lane's x for its first column of a slice that starts at k, and the sums of its group.
  __device__ uint32_t x_at(int k) const {
    return base + at.x + (k - k0) / 32 * TOK * 64 + (g % (TOK < 8 ? TOK : 8) * 4 + c) * 16;
  }
  __device__ uint32_t sums_at(int k) const {
    return base + at.x_sums + ((k - k0) / Shape::kGroup * TOK + 2 * c % (kSlots * TOK)) * 4;
  }
  template <bool whole>
  __device__ __forceinline__ void multiply_slice(const Slice& s, int groups,
                                                 float (&y)[NT][4]) const {
    if constexpr (Shape::kInteger)
      Integer::template multiply<whole>(s, groups, y);
    else
      multiply<whole>(s, groups, y);
  }

  // This warp's sums of a tile, of all columns, to its place in a room.
  __device__ __forceinline__ void store_sums(float (&y)[NT][4], float* room) const {
    if constexpr (Shape::kInteger) {
      Integer::add_limbs(y, c);
    } else if constexpr (kSlots > 1) {
      // The sum over a token's columns: of a lane, then of lanes of the quad.
#pragma unroll
      for (int r = 0; r < 2; r++) {
        float low = 2 * c < kSlots * TOK ? y[0][2 * r] : 0.0f;
        float high = 2 * c + 1 < kSlots * TOK ? y[0][2 * r + 1] : 0.0f;
        if constexpr (TOK == 1) low += high;
#pragma unroll
        for (int other = TOK <= 2 ? 1 : TOK / 2; other < 4; other *= 2) {
          low += __shfl_xor_sync(0xffffffffu, low, other);
          high += __shfl_xor_sync(0xffffffffu, high, other);
        }
        y[0][2 * r] = low, y[0][2 * r + 1] = high;
      }
    }
#pragma unroll
    for (int i = 0; i < 4 * Shape::kTokenTiles; i++) {
      const int token = i / 4 * 8 + 2 * c + i % 2;
      if (token < TOK) room[token * Shape::kTokenSums + i % 4 / 2 * 8] = y[i / 4][i % 4];
    }
  }

  // The work of the warps that multiply, for a run; x of the run before is no longer read.
  template <bool split, bool qx>
  __device__ __forceinline__ void multiply_run(Place& place, bool first) const {
    const int tiles = this->run.tiles, tokens = this->run.tokens;
    const bool plain = this->template stage_x<qx>(first);
    auto* const rooms = reinterpret_cast<float*>(shared + at.sums);
    auto* room = rooms;
    int waiting = 0, turn = warp;  // turn: this warp's next slice of the stage
    for (int tile = 0; tile < tiles; tile++) {
      float y[NT][4] = {};
#pragma unroll 1
      for (int k = k0; k < k1; k += at.codes) {
        const int slices = (min(at.codes, k1 - k) + kSlice - 1) / kSlice;
        wait_phase(this->full(place), place.round & 1);
#pragma unroll 1
        for (; turn < slices; turn += Shape::kWarps) {
          const int here = k + turn * kSlice;
          const int spans = (k1 - here + Shape::kSpan - 1) / Shape::kSpan;
          Slice s;
#pragma unroll
          for (int r = 0; r < 2; r++) {
            const int row = g + 8 * r;
            s.codes[r] = place.stage + row * at.code_row + turn * Shape::kSliceCodes;
            s.scales[r] = place.stage + kRows * at.code_row + row * at.scale_row +
                          turn * Shape::kSliceScales;
            s.biases[r] = s.scales[r] + kRows * at.scale_row;
          }
          s.x = Shape::kInteger ? Integer::x_at(here) : x_at(here);
          s.x_sums = Shape::kInteger ? Integer::sums_at(here) : sums_at(here);
          if (spans >= Shape::kInSlice)
            multiply_slice<true>(s, 0, y);
          else
            multiply_slice<false>(s, spans, y);
        }
        turn -= slices;
        __syncwarp();
        if (lane < kArrivals) arrive(this->empty(place));
        this->next_place(place);
      }
      store_sums(y, room + waiting * Shape::kTileSums + warp * Shape::kWarpSums + g);
      if (++waiting < Shape::kFlush && tile + 1 < tiles) continue;
      sync_threads<Shape::kWorkers>(kBarrier);
      for (int i = warp * 32 + lane; i < waiting * kRows * TOK; i += Shape::kWorkers) {
        const int r = i % kRows, token = i / kRows % TOK, which = i / kRows / TOK;
        if (token >= tokens) continue;
        const float* from = room + which * Shape::kTileSums + token * Shape::kTokenSums + r;
        float sum = 0.0f;
#pragma unroll
        for (int w = 0; w < Shape::kWarps; w++) sum += from[w * Shape::kWarpSums];
        if (plain) keep<split>(tile - waiting + 1 + which, r, token, sum);
      }
      // The other room is free: its sums were read before the barrier just passed.
      if constexpr (Shape::kRooms == 1)
        sync_threads<Shape::kWorkers>(kBarrier);
      else
        room = rooms + (room == rooms ? Shape::kFlush * Shape::kTileSums : 0);
      waiting = 0;
    }
    if (!plain) {
      const MatvecBlock own = *this;  // whose address may escape: this one stays in registers
      own.template run_extreme<split>();
    }
  }

  // The same sums from weights decoded one by one, for extreme x.
  template <bool split>
  __device__ __noinline__ void run_extreme() const {
    for (int tile = 0; tile < this->run.tiles; tile++)
      for (int i = warp; i < kRows * this->run.tokens; i += Shape::kWarps) {
        const int r = i % kRows, token = i / kRows;
        const int64_t row =
            this->w_row(min((this->run.first_tile + tile) * kRows + r, a.N - 1));
        float sum = 0.0f;
        for (int k = k0 + lane; k < k1; k += 32)
          sum = fmaf(float(static_cast<const T*>(a.x)[this->x_row(token) * a.K + k]),
                     one_weight<F, T>(a, row, k), sum);
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
                                      LaneAt<F::kBits>(lane % 4)}};
  auto place = block.first_place();
  if (warp >= Shape::kWarps)
    block.fill_ring([&](auto body) { body(block, place); });
  else
    block.template multiply_run<split, qx>(place, true);
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
