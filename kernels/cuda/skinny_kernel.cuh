// The warps of skinny that multiply, and the kernel.
#pragma once

#include "one_weight.cuh"
#include "skinny.h"

namespace lowbit::cuda {

#if LOWBIT_HOPPER

template <class F, class T, int kTokens>
struct SkinnyWorker : SkinnyBlock<F, T, kTokens> {
  using Block = SkinnyBlock<F, T, kTokens>;
  using Block::a, Block::base, Block::extreme_at, Block::full, Block::kAffine, Block::kBoxCodes,
      Block::kBoxRow, Block::kChunk, Block::kRows, Block::kScaleSize, Block::kSpans,
      Block::lane, Block::ring_free, Block::rows, Block::span_full, Block::stage_codes,
      Block::warp, Block::workers;
  using typename Block::Decode, typename Block::Slot;
  using H = Half<T>;
  using Row = LaneRow<F, T, kTokens>;
  static constexpr int kTokenSums = Block::kSizes.kTokenSums;
  static constexpr int kTileSums = kTokens * kTokenSums * 4, NT = kTokens / 8;
  static constexpr int kGroups = F::kGroup < 32 ? 32 / F::kGroup : 1;  // of a lane's 32 codes

  __device__ explicit SkinnyWorker(const Block& block) : Block(block) {}

  // The scales and biases of a lane's codes of a row; at: of the first as stored.
  __device__ __forceinline__ void load_scales(uint32_t at, GroupPair (&out)[kGroups]) const {
    if constexpr (kAffine) {
      const auto twice = [](uint32_t address) {
        uint16_t v;
        asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(address));
        return uint32_t(v) * 0x10001u;
      };
      out[0] = Decode::group_pair(twice(at), twice(at + a.at.biases));
    } else {
#pragma unroll
      for (int i = 0; i < kGroups; i++) {
        uint32_t byte;
        asm volatile("ld.shared.u8 %0, [%1];" : "=r"(byte) : "r"(at + i));
        load_shared<4>(base + a.at.table + 4 * byte, &out[i].scale);
        if constexpr (Row::kBias) out[i].bias = Decode::bias_of(out[i].scale);
      }
    }
  }

  // One of the warps that multiply, with a strip of `tiles` from `tile` on.
  template <int tiles>
  __device__ __forceinline__ void multiply(int part, int tile) const {
    const int g = lane / 4, c = lane % 4;
    // Rows whose codes are read at once turn their chunks by different bits.
    const int g_row = F::kBits == 8 ? g : g % 2 * 4 + g / 2 % 2 * 2 + g / 4;
    const int row = tile * kRows + g_row;
    const int code_row = Block::kWholeRows ? a.at.code_row : kBoxRow;
    uint32_t code_at;
    if constexpr (Block::kWholeRows)
      code_at = uint32_t(row * code_row + part * kBoxRow + 12 * c);
    else
      code_at = uint32_t(part * kChunk / kBoxCodes * rows() + row) * kBoxRow +
                ((part * kChunk % kBoxCodes / 32 + c) * (F::kBits / 4) ^ row % 8) * 16;
    // In pieces of 128 bytes: of the first half, and of this lane's.
    const int x_row = part * a.M + g, x_turn = x_row + c / 2 * (SkinnySizes::kXShift / 128);
    const uint32_t x_at =
        a.at.x + c / 2 * a.at.x_half + x_row * 128 + ((c % 2 * 4) ^ x_turn % 8) * 16;
    const uint32_t scale_turn = turn_of(row, a.at.scale_row) * 16, end = full(a.at.stages);
    uint32_t stage = base, bar = full(0), parity = 0;
    Slot span;
    const float factor = alpha();
#pragma unroll 1
    for (int group = int(blockIdx.x); group < a.groups; group += int(gridDim.x)) {
      float y[tiles][NT][4] = {};
      const auto leave_span = [&] {
        __syncwarp();
        if (lane < kArrivals) arrive(span_full(span.index) + 8);
        span.advance(kSpans);
      };
      int spans_k = 0;  // where the next span begins
#pragma unroll 1
      for (int k = part * kChunk; k < a.padded; k += stage_codes()) {
#pragma unroll 1
        for (; k >= spans_k; spans_k += a.at.span_k) {
          if (spans_k > 0) leave_span();
          wait_phase(span_full(span.index), span.parity);
        }
        wait_phase(bar, parity);
        Row codes[tiles][2];
        GroupPair groups[tiles][2][kGroups];
        const int group_at = ((k & (a.at.span_k - 1)) + 32 * c) / F::kGroup * kScaleSize;
        const uint32_t scale = base + a.at.spans + span.index * a.at.span +
                               row * a.at.scale_row + (uint32_t(group_at) ^ scale_turn);
#pragma unroll
        for (int t = 0; t < tiles; t++)
#pragma unroll
          for (int r = 0; r < 2; r++) {
            codes[t][r].load(stage + code_at + (t * kRows + r * 8) * code_row);
            load_scales(scale + (t * kRows + r * 8) * a.at.scale_row, groups[t][r]);
          }
#pragma unroll
        for (int j = 0; j < 4; j++) {
          uint32_t x[NT][4];
#pragma unroll
          for (int nt = 0; nt < NT; nt++) {
            load_shared<16>(((stage + x_at) ^ j * 16) + nt * 1024, x[nt]);
            Row::pair_up(x[nt]);
          }
#pragma unroll
          for (int t = 0; t < tiles; t++) {
            uint32_t p[4], q[4];
            codes[t][0].decode(j, groups[t][0][j * kGroups / 4], p);
            codes[t][1].decode(j, groups[t][1][j * kGroups / 4], q);
#pragma unroll
            for (int nt = 0; nt < NT; nt++) {
              H::mma(y[t][nt], {p[0], q[0], p[1], q[1]}, x[nt][0], x[nt][1]);
              H::mma(y[t][nt], {p[2], q[2], p[3], q[3]}, x[nt][2], x[nt][3]);
            }
          }
        }
        __syncwarp();
        if (lane < kArrivals) arrive(bar + 8);
        stage += a.at.stage, bar += 16;
        if (bar == end) stage = base, bar = full(0), parity ^= 1;
      }
      leave_span();
      for (; spans_k < a.spans_k; spans_k += a.at.span_k) {
        wait_phase(span_full(span.index), span.parity);
        leave_span();
      }
      sync_some(Block::kWorkers, 32 * workers());  // the ring is read
      // [part][tile][token][row]
      const uint32_t mine = base + (part * a.at.tiles + tile) * kTileSums;
#pragma unroll
      for (int t = 0; t < tiles; t++)
#pragma unroll
        for (int nt = 0; nt < NT; nt++)
#pragma unroll
          for (int i = 0; i < 4; i++) {
            const int token = nt * 8 + 2 * c + i % 2, r = g_row + i / 2 * 8;
            store_shared(mine + t * kTileSums + (token * kTokenSums + r) * 4,
                         __float_as_uint(y[t][nt][i]));
          }
      sync_some(Block::kSums, 32 * (workers() + 1));
      write(group, factor);
      if (group + int(gridDim.x) >= a.groups) break;
      fence_for_copies();
      __syncwarp();
      if (lane < kArrivals) arrive(ring_free());
    }
  }

  // What sums are to be multiplied by, known before they are there.
  __device__ __forceinline__ float alpha() const {
    float alpha = __uint_as_float(uint32_t(127 + Row::kAlphaExponent) << 23);
    if (a.global_x) alpha *= *a.global_x / Nvfp4::kGlobalMax;
    if (a.global_w) alpha *= *a.global_w / Nvfp4::kGlobalMax;
    asm volatile("" : "+f"(alpha));
    return alpha;
  }
  // The sums of all parts, to y.
  __device__ __forceinline__ void write(int group, float alpha) const {
    const int worker = warp - SkinnySizes::kOthers;
    uint32_t extreme;
    load_shared<4>(extreme_at(), &extreme);
    if (Decode::kExtreme && extreme) {
      write_extreme(a, group * rows(), worker, workers(), lane);
      return;
    }
    // Four rows of a token at a time.
    const int tile_parts = a.at.tiles * kTileSums;
#pragma unroll 1
    for (int i = worker * 32 + lane; i < rows() * kTokens / 4; i += 32 * workers()) {
      const int quad = i % 4 * 4, token = i / 4 % kTokens, tile = i / 4 / kTokens;
      const int row = group * rows() + tile * kRows + quad;
      const uint32_t from = base + tile * kTileSums + (token * kTokenSums + quad) * 4;
      float sums[4] = {};
#pragma unroll
      for (int part = 0; part < SkinnySizes::kMostParts; part++) {
        if (part >= a.at.parts) break;
        uint32_t v[4];
        load_shared<16>(from + part * tile_parts, v);
#pragma unroll
        for (int r = 0; r < 4; r++) sums[r] += __uint_as_float(v[r]);
      }
      if (token >= a.M) continue;
#pragma unroll
      for (int r = 0; r < 4; r++) sums[r] = with_bias(a, row + r, sums[r] * alpha);
      T* y = static_cast<T*>(a.y) + int64_t(token) * a.N + row;
      if (a.y_quads && row + 3 < a.N) {
        *reinterpret_cast<uint2*>(y) = {H::pack(sums[0], sums[1]), H::pack(sums[2], sums[3])};
      } else {
#pragma unroll
        for (int r = 0; r < 4; r++)
          if (row + r < a.N) y[r] = T(sums[r]);
      }
    }
  }
  static __device__ __forceinline__ float with_bias(const SkinnyArgs& a, int row, float sum) {
    if (!a.bias || row >= a.N) return sum;
    return sum + (a.bias_is_f32 ? static_cast<const float*>(a.bias)[row]
                                : float(static_cast<const T*>(a.bias)[row]));
  }

  // The same from weights decoded one by one, for scales that the decoder cannot carry.
  static __device__ __noinline__ void write_extreme(const SkinnyArgs& a, int first, int warp,
                                                    int warps, int lane) {
    const int rows = min(a.at.tiles * kRows, a.N - first);
    for (int i = warp; i < rows * a.M; i += warps) {
      const int row = first + i % rows, token = i / rows;
      float sum = 0.0f;
      for (int k = lane; k < a.K; k += 32)
        sum = fmaf(float(static_cast<const T*>(a.x)[int64_t(token) * a.K + k]),
                   one_weight<F, T>(a, row, k), sum);
      for (int other = 16; other > 0; other /= 2)
        sum += __shfl_xor_sync(0xffffffffu, sum, other);
      if (a.global_x) sum *= *a.global_x / Nvfp4::kGlobalMax;
      if (a.global_w) sum *= *a.global_w / Nvfp4::kGlobalMax;
      if (lane == 0)
        static_cast<T*>(a.y)[int64_t(token) * a.N + row] = T(with_bias(a, row, sum));
    }
  }
};

#endif  // LOWBIT_HOPPER

template <class F, class T, int kTokens>
__global__ void __launch_bounds__(32 * (SkinnySizes::kMostWarps + SkinnySizes::kOthers), 1)
    skinny_kernel(const __grid_constant__ SkinnyArgs a) {
#if LOWBIT_HOPPER
  using Block = SkinnyBlock<F, T, kTokens>;
  extern __shared__ char shared[];
  const uint32_t base = (shared_address(shared) + 1023u) & ~1023u;
  const int warp = __shfl_sync(0xffffffffu, int(threadIdx.x) / 32, 0);
  const Block block{a, base, warp, int(threadIdx.x) % 32};
  const int threads = int(blockDim.x);
  // The first copies are asked for before anything else.
  if (warp == 0) {
    if (elect_one()) {
      block.init(0, 1);
      block.ask_stage(0, int(blockIdx.x) * block.rows(), 0);
      block.ask_span(0, int(blockIdx.x) * block.rows(), 0);
    }
    __syncwarp();
  } else if (warp == 1) {
    if (elect_one()) {
      prefetch_map(a.x_map), prefetch_map(a.scale_map), prefetch_map(a.bias_map);
      init_barrier(block.ring_free(), block.workers() * kArrivals);
      store_shared(block.extreme_at(), 0);
      block.init(1, SkinnySizes::kMostStages);
    }
    __syncwarp();
  } else if constexpr (!F::kHasBias) {
    for (int i = int(threadIdx.x) - 64; i < 256; i += threads - 64)
      store_shared(base + a.at.table + 4 * i, Block::Decode::entry(uint32_t(i)));
  }
  sync_some(Block::kBegun, threads);
  if (warp == 0) {
    if (elect_one()) block.copy();
  } else if (warp == 1) {
    block.look_at_scales();
  } else {
    const int worker = warp - SkinnySizes::kOthers;
    const int part = worker % a.at.parts, strip = worker / a.at.parts;
    // Strips of two tiles first.
    const int wide = a.at.tiles - a.at.strips;
    const SkinnyWorker<F, T, kTokens> multiplies(block);
    if (strip < wide)
      multiplies.template multiply<2>(part, 2 * strip);
    else
      multiplies.template multiply<1>(part, strip + wide);
  }
#endif
}

}  // namespace lowbit::cuda
