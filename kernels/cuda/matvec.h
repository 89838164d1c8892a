// matvec: few rows of x. The packed weights stream once, whatever M is, and meet the tensor
// cores in the order in which they are stored (load.h): W's rows on the m side, tokens on n.
//
//   block       one per multiprocessor, or `split_k` of them (a cluster) with a part of K each
//   for each    tile of 16 rows of W, of the block's run of tiles
//     warp w    its slices of K, from a ring of its own in shared memory that it fills several
//               slices ahead and across tiles: fragments from the codes, times x, and
//               per group    y += scale * (codes x X) + (bias - offset * scale) * (sum of X)
//     warps' sums of y through shared memory in fixed order; split_k: the cluster's as well
//
// x waits in shared memory in fragment order, and affine groups' sums of x beside it.
//
// A ring for the whole block, filled by one warp through the copy engine, was twice as slow:
// one warp cannot issue the copies of 16 rows fast enough (20 us for 4-bit 4096x14336 without
// any arithmetic; H200, 2026-11-22).
#pragma once

#include <cooperative_groups.h>

#include "matvec_staging.h"

namespace lowbit::cuda {

// The value of one code, decoded from global memory: for x so large that codes must not meet it
// before the scale does.
template <class F, class T>
__device__ float one_weight(const MatvecArgs& a, int row, int k) {
  constexpr int B = F::kBits;
  const auto* words = reinterpret_cast<const uint32_t*>(a.codes + row * a.row_bytes);
  const int bit = k * B, word = bit / 32;
  uint32_t code = words[word] >> (bit % 32);
  if (bit % 32 + B > 32) code |= words[word + 1] << (32 - bit % 32);
  const float value = F::Code::decode(code & ((B < 32 ? 1u << B : 0u) - 1u));
  const int64_t group = int64_t(row) * (a.K / F::kGroup) + k / F::kGroup;
  if constexpr (F::kHasBias) {
    const float s = float(reinterpret_cast<const T*>(a.scales)[group]);
    return fmaf(s, value, float(reinterpret_cast<const T*>(a.biases)[group]));
  } else {
    return F::Scale::decode(a.scales[group]) * value;
  }
}
template <class F, class T, int TOK>
struct MatvecBlock : MatvecStaging<F, T, TOK> {
  using Base = MatvecStaging<F, T, TOK>;
  using Base::a, Base::at, Base::shared, Base::base, Base::warp, Base::lane, Base::g, Base::c;
  using Base::copy, Base::first_source, Base::load_x, Base::next_source, Base::next_turn;
  using Base::k0, Base::k1, Base::first_tile, Base::tiles, Base::tokens, Base::lane_at;
  using Base::kSlice, Base::kRows, Base::ring, Base::after, Base::slices;
  using Base::store_x;
  using typename Base::Codes, typename Base::H, typename Base::Shape;
  using typename Base::Source, typename Base::Turn, typename Base::Pieces;
  static constexpr int kPlanes = Codes::kPlanes, NT = Shape::kColumnTiles;
  static constexpr int kSlots = Shape::kSlots;
  // nvfp4: scale times code is exact in T when its power of two is moved down a little.
  static constexpr int kDown = Codes::kLift - (H::kMantissaBits == 7 ? 110 : 7);

  // Scale (or bias) of group i of a row of a slice.
  __device__ __forceinline__ float scale(uint32_t row, int i) const {
    if constexpr (Shape::kAffine) {
      uint16_t v;
      asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(row + 2 * i));
      return H::low(v);
    } else {
      uint32_t v;
      asm volatile("ld.shared.u8 %0, [%1];" : "=r"(v) : "r"(row + i));
      return __uint_as_float(v == 0u ? 0x00400000u : v << 23);  // E8m0::decode
    }
  }
  // nvfp4's scale of this lane's codes of a block, as a pair of elements.
  __device__ __forceinline__ uint32_t folded_scale(uint32_t row, int block) const {
    uint32_t byte;
    asm volatile("ld.shared.u8 %0, [%1];" : "=r"(byte) : "r"(row + 2 * block + c / 2));
    return load_shared(base + at.table + 4 * byte);
  }

  // This warp's slice in the ring at `stage`, or its first groups, with x and its sums from
  // `x` (this lane's token) and `x_sums` on.
  template <bool whole>
  __device__ __forceinline__ void multiply(uint32_t stage, uint32_t x, uint32_t x_sums,
                                           int groups, float (&y)[NT][4]) const {
    const uint32_t codes = stage + g * Shape::kCodeRow;
    const uint32_t scales = stage + Shape::kCodeBytes + g * Shape::kScaleRow;
    constexpr int kBlocks = Shape::kSpan / 32;
    // Columns: token g % TOK, of the groups whose turn is slot g / TOK.
    const int my_slot = g / (TOK < 8 ? TOK : 8);
    const uint32_t zeros = base + at.zeros + 16 * c;
#pragma unroll
    for (int first = 0; first < Shape::kInSlice; first += kSlots) {
      float fresh[NT][kPlanes][4] = {};
      float(&sum)[NT][kPlanes][4] = fresh;
#pragma unroll
      for (int slot = 0; slot < kSlots; slot++) {
        if (!whole && first + slot >= groups) break;
        const uint32_t there = x + (first + slot) * kBlocks * TOK * 64;
        const uint32_t from = Shape::kFree == 1 || my_slot == slot ? there : zeros;
#pragma unroll
        for (int i = 0; i < kBlocks; i++) {
          const int block = (first + slot) * kBlocks + i;
          uint32_t pairs[2][kPlanes][4];
#pragma unroll
          for (int r = 0; r < 2; r++) {
            Codes::pairs(lane_at.load(codes + 8 * r * Shape::kCodeRow + block * 4 * F::kBits),
                         pairs[r]);
            if constexpr (Codes::kLift != 0) {
              uint32_t factor;
              if constexpr (Shape::kFolded) {
                factor = folded_scale(scales + 8 * r * Shape::kScaleRow, block);
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
      if constexpr (!Shape::kFolded) apply<whole>(sum, scales, x_sums, first, groups, y);
    }
  }

  // y += scale * sum + (bias - offset * scale) * (sum of x), each column with its group's.
  template <bool whole>
  __device__ __forceinline__ void apply(const float (&sum)[NT][kPlanes][4], uint32_t scales,
                                        uint32_t x_sums, int first, int groups,
                                        float (&y)[NT][4]) const {
    constexpr int kDistinct = TOK == 1 ? 2 : 1;  // groups of this lane's two columns
#pragma unroll
    for (int d = 0; d < kDistinct; d++) {
      const int group = first + (2 * c + d) / TOK % kSlots;
      if (!whole && group >= groups) continue;
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const uint32_t row = scales + 8 * r * Shape::kScaleRow;
        const float s = scale(row, group);
        float offset = 0.0f;
        if constexpr (Shape::kAffine)
          offset = fmaf(-Codes::kOffset, s, scale(row + kRows * Shape::kScaleRow, group));
#pragma unroll
        for (int nt = 0; nt < NT; nt++)
#pragma unroll
          for (int i = d; i < d + 3 - kDistinct; i++) {
            float code = sum[nt][0][2 * r + i];
            if constexpr (kPlanes == 2) code = fmaf(16.0f, sum[nt][1][2 * r + i], code);
            float& into = y[nt][2 * r + i];
            into = fmaf(s, code, into);
            if constexpr (Shape::kAffine) {
              const uint32_t at_sum = x_sums + (group * TOK + (2 * c + i) % TOK + nt * 8) * 4;
              // (Columns beyond kSlots * TOK are left out when columns are summed.)
              into = fmaf(offset, __uint_as_float(load_shared(at_sum)), into);
            }
          }
      }
    }
  }

  __device__ void write(int row, int token, float sum) const {
    float alpha = Shape::kFolded ? __uint_as_float((kDown + 127) << 23) : 1.0f;
    if (a.global_x) alpha *= *a.global_x / Nvfp4::kGlobalMax;
    if (a.global_w) alpha *= *a.global_w / Nvfp4::kGlobalMax;
    sum *= alpha;
    if (a.bias)
      sum += a.bias_is_f32 ? static_cast<const float*>(a.bias)[row]
                           : float(static_cast<const T*>(a.bias)[row]);
    static_cast<T*>(a.y)[int64_t(token) * a.N + row] = T(sum);
  }
  // One sum over this block's part of K.
  template <bool split>
  __device__ __forceinline__ void keep(int tile, int r, int token, float sum) const {
    if constexpr (split) {
      auto* parts = reinterpret_cast<float*>(shared + at.parts);
      parts[(tile * TOK + token) * kRows + r] = sum;
    } else if ((first_tile + tile) * kRows + r < a.N) {
      write((first_tile + tile) * kRows + r, token, sum);
    }
  }

  template <bool split>
  __device__ void run() const {
    // The first of x is asked for before the weights, which would keep it waiting.
    uint4 in[NT][8];
    const int mine = k0 + warp * 256 + lane * 8;
#pragma unroll
    for (int nt = 0; nt < NT; nt++) load_x(mine, 8 * nt, in[nt]);
    const Pieces pieces(lane, a.row_bytes);
    Source next = first_source();
    Turn turn = next;
    uint32_t stage = ring();
#pragma unroll 1
    for (int i = 0; i + 1 < Shape::kStages; i++) {
      copy(next, pieces);
      next_source(next);
    }
    uint32_t largest = 0;
#pragma unroll 1
    for (int k = mine; k - lane * 8 < k0 + slices() * kSlice; k += 256 * Shape::kWarps)
#pragma unroll
      for (int nt = 0; nt < NT; nt++) {
        if (k != mine) load_x(k, 8 * nt, in[nt]);
        store_x(k, 8 * nt, in[nt], largest);
      }
    for (int i = warp * 32 + lane; i < Shape::kZeros / 4; i += Shape::kThreads)
      reinterpret_cast<uint32_t*>(shared + at.zeros)[i] = 0;
    __syncthreads();
    const uint32_t x = base + at.x + (g % (TOK < 8 ? TOK : 8) * 4 + c) * 16;
    const uint32_t x_sums = base + at.x_sums;
    auto* room = reinterpret_cast<float*>(shared + at.sums);
    int waiting = 0;
    for (int tile = 0; tile < tiles; tile++) {
      float y[NT][4] = {};
#pragma unroll 1
      while (turn.tile == tile) {
        wait_for_copies<Shape::kStages - 2>();
        __syncwarp();
        copy(next, pieces);
        next_source(next);
        const int k = turn.slice * kSlice,
                  spans = (k1 - k0 - k + Shape::kSpan - 1) / Shape::kSpan;
        const uint32_t my_x = x + k / 32 * TOK * 64;
        const uint32_t my_sums = x_sums + k / Shape::kGroup * TOK * 4;
        if (spans >= Shape::kInSlice)
          multiply<true>(stage, my_x, my_sums, 0, y);
        else
          multiply<false>(stage, my_x, my_sums, spans, y);
        stage = after(stage);
        next_turn(turn);
      }
      float* mine = room + waiting * Shape::kTileSums + warp * Shape::kWarpSums + g;
      if constexpr (Shape::kSlots > 1) {
        // The sum over this token's columns: of a lane, then of lanes of the quad.
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
      for (int i = 0; i < 4 * NT; i++) {
        const int token = i / 4 * 8 + 2 * c + i % 2;
        if (token < TOK) mine[token * Shape::kTokenSums + i % 4 / 2 * 8] = y[i / 4][i % 4];
      }
      if (++waiting < Shape::kFlush && tile + 1 < tiles) continue;
      __syncthreads();
      for (int i = warp * 32 + lane; i < waiting * kRows * tokens; i += Shape::kThreads) {
        const int r = i % kRows, token = i / kRows % tokens, which = i / kRows / tokens;
        const float* from = room + which * Shape::kTileSums + token * Shape::kTokenSums + r;
        float sum = 0.0f;
#pragma unroll
        for (int w = 0; w < Shape::kWarps; w++) sum += from[w * Shape::kWarpSums];
        keep<split>(tile - waiting + 1 + which, r, token, sum);
      }
      // The other room is free: its sums were read before the barrier just passed.
      auto* rooms = reinterpret_cast<float*>(shared + at.sums);
      room = rooms + (room == rooms ? Shape::kFlush * Shape::kTileSums : 0);
      waiting = 0;
    }
    if (!__syncthreads_and(largest < __float_as_uint(0x1p100f))) {
      const MatvecBlock own = *this;  // whose address may escape: this one stays in registers
      own.template run_extreme<split>();
    }
  }

  // The same sums from weights decoded one by one, for extreme x.
  template <bool split>
  __device__ __noinline__ void run_extreme() const {
    for (int tile = 0; tile < tiles; tile++)
      for (int i = warp; i < kRows * tokens; i += Shape::kWarps) {
        const int r = i % kRows, token = i / kRows;
        const int row = min((first_tile + tile) * kRows + r, a.N - 1);
        float sum = 0.0f;
        for (int k = k0 + lane; k < k1; k += 32)
          sum = fmaf(float(static_cast<const T*>(a.x)[int64_t(token) * a.K + k]),
                     one_weight<F, T>(a, row, k), sum);
        for (int other = 16; other > 0; other /= 2)
          sum += __shfl_xor_sync(0xffffffffu, sum, other);
        if (lane == 0) keep<split>(tile, r, token, sum);
      }
  }
};

template <class F, class T, int TOK, bool split>
__global__ void __launch_bounds__(MatvecShape<F, T, TOK>::kThreads, 1)
    matvec_kernel(const __grid_constant__ MatvecArgs a) {
  using Shape = MatvecShape<F, T, TOK>;
  namespace cg = cooperative_groups;
  extern __shared__ __align__(128) char shared[];
  const int parts = split ? (a.K + a.part - 1) / a.part : 1;
  const int rank = split ? int(blockIdx.x) % parts : 0;
  const int team = int(blockIdx.x) / parts, teams = int(gridDim.x) / parts;
  const int all = (a.N + Shape::kRows - 1) / Shape::kRows;
  const int first = int(int64_t(all) * team / teams);
  const int tiles = int(int64_t(all) * (team + 1) / teams) - first;
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  const int k0 = rank * a.part, k1 = k0 + a.part < a.K ? k0 + a.part : a.K;
  const MatvecBlock<F, T, TOK> block{{a, a.at, shared, shared_address(shared), warp, lane,
                                      lane / 4, lane % 4, k0, k1, first, tiles, a.M,
                                      LaneAt<F::kBits>(lane % 4)}};
  if constexpr (Shape::kFolded) {
    constexpr int kUp = LaneCodes<typename F::Code, T>::kLift - MatvecBlock<F, T, TOK>::kDown;
    auto* table = reinterpret_cast<uint32_t*>(shared + block.at.table);
    for (int i = threadIdx.x; i < 256; i += Shape::kThreads) {
      const uint32_t s =
          Half<T>::bits(F::Scale::decode(uint32_t(i)) * __uint_as_float((kUp + 127) << 23));
      table[i] = s | s << 16;
    }
    __syncthreads();
  }
  block.template run<split>();
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
