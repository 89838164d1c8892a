// skinny: up to 32 rows of x (tokens), and all of a block's rows of W along K at once, so that
// neither waits in shared memory for the other. mma.sync, W's rows on the m side, tokens on n.
// sm_90a.
//
//   block           up to 7 tiles of 16 rows of W, and then others
//     one thread    tensor copies: codes and x, a stage of some hundred k at a time, and scales
//     a warp        looks for scales that the decoder cannot carry
//     strips * parts warps   a strip of one or two tiles each, and of each stage 128 k: codes
//                   become weights, rounded once, and meet x. Sums stay in registers to the end
//                   of K
//   sums of a strip's parts through shared memory in fixed order
//
// matvec has all of x in shared memory before it multiplies, which 16 tokens fill, and reads it
// again for each tile; matmul's tiles of 128 rows leave 15 % of 132 multiprocessors idle with
// 14336 rows, and its operands come in an order that takes more instructions to decode.
//
// By stamps of clock64 (4-bit 4096x14336, M = 16; H200, 2026-11-29) copies were there after
// 6,100 cycles of 24,000, of which 1,200 went by until the first was asked for: a stage of all
// parts came in four copies a part, each 85 cycles of the thread that asks, and long rows of
// scales before it. Now a stage is three copies, the first stage's come before anything else,
// and scales in halves; y leaves four rows at a time (2,400 cycles before): 15.9 us
// became 14.4, and 14336x4096, where that thread was never idle, 16.9 became 14.5. From the
// first stage on 65 % of all issue slots are used, and the last copy is asked for at two thirds
// of the time. Stages that parts take in turn, of 128 k each, begin sooner and were no gain
// (16.6 for 16.2). Nor were pairs of blocks that copy half of x to each other: they begin after
// they have met, and wait for each other (14.6 and 14.9, 14336x4096 14.6 and 16.0, M = 32 19.9
// and 22.8).
#pragma once

#include "kernels.h"
#include "skinny_decode.cuh"
#include "skinny_rules.h"

namespace lowbit::cuda {

struct SkinnyArgs {
  CUtensorMap code_map, x_map, scale_map, bias_map;
  const uint8_t *codes, *scales, *biases;
  const void* x;
  void* y;
  const void* bias;
  const float *global_x, *global_w;
  int64_t row_bytes;       // of codes
  SkinnySizes::Layout at;  // in shared memory
  int N, K, M;
  int padded;   // K, to whole stages
  int spans_k;  // K, to whole spans of whole stages
  uint32_t stage_bytes;
  int groups;        // of at.tiles tiles, which blocks take in turn
  bool bias_is_f32;  // else of x's type
  bool y_quads;      // four elements of y, from a multiple of four on, are 8 aligned bytes
};

// skinny_format.cu, once a format.
template <Format>
void skinny_format(const Product&, const Plan&, Queue&);

#if LOWBIT_HOPPER

// The threads of some warps, as many as the numbers say at run time.
__device__ __forceinline__ void sync_some(int barrier, int threads) {
  asm volatile("barrier.cta.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

template <class F, class T, int kTokens>
struct SkinnyBlock {
  static constexpr SkinnySizes kSizes{F::kBits, F::kGroup, F::kHasBias, kTokens};
  static constexpr int kRows = kSizes.kRows, kChunk = kSizes.kChunk, kSpans = kSizes.kSpans;
  static constexpr int kBoxCodes = kSizes.box_codes(), kBoxRow = kSizes.box_row();
  static constexpr int kScaleSize = kSizes.scale_size();
  static constexpr bool kAffine = F::kHasBias, kWholeRows = kSizes.whole_rows();
  using Decode = WeightPairs<F, T>;
  // Barriers: of the warps that multiply, of these and the one that looks at scales, of all.
  static constexpr int kWorkers = 1, kSums = 2, kBegun = 3;

  const SkinnyArgs& a;
  const uint32_t base;  // of shared memory, a multiple of 1024
  const int warp, lane;

  __device__ __forceinline__ int rows() const { return a.at.tiles * kRows; }
  __device__ __forceinline__ int stage_codes() const { return a.at.parts * kChunk; }
  __device__ __forceinline__ int workers() const { return a.at.strips * a.at.parts; }
  // Barriers: of a stage or a span, whether it is full and, after that, whether it is empty.
  __device__ __forceinline__ uint32_t full(int stage) const {
    return base + a.at.barriers + 16 * stage;
  }
  __device__ __forceinline__ uint32_t span_full(int span) const {
    return full(SkinnySizes::kMostStages + span);
  }
  // Whether sums are read and the ring may be filled again.
  __device__ __forceinline__ uint32_t ring_free() const {
    return full(SkinnySizes::kMostStages + kSpans);
  }
  // Not zero: there are scales that the decoder cannot carry.
  __device__ __forceinline__ uint32_t extreme_at() const { return ring_free() + 8; }

  // Of stages and spans from `from` on, up to `to`.
  __device__ __forceinline__ void init(int from, int to) const {
    const int multiply = workers() * kArrivals;
#pragma unroll 1
    for (int i = from; i < to; i++) {
      if (i < a.at.stages) init_barrier(full(i), 1), init_barrier(full(i) + 8, multiply);
      if (i < kSpans)
        init_barrier(span_full(i), 1), init_barrier(span_full(i) + 8, multiply + kArrivals);
    }
    publish_barriers();
  }

  // A place in a ring.
  struct Slot {
    int index = 0;
    uint32_t parity = 0;
    __device__ __forceinline__ void advance(int count) {
      if (++index == count) index = 0, parity ^= 1;
    }
  };

  // Copies of a stage, and of a span of scales.
  __device__ __forceinline__ void ask_stage(int index, int row, int k) const {
    const uint32_t to = base + index * a.at.stage, bar = full(index);
    const uint64_t once = read_once();
    arrive_expecting(bar, a.stage_bytes);
    if constexpr (kWholeRows)
      load_tile(to, a.code_map, k * F::kBits / 16, row, bar, once);
    else
      load_blocks(to, a.code_map, row, 0, k / kBoxCodes, bar, once);
    load_blocks(to + a.at.x, a.x_map, 0, 0, k / kChunk, bar);
    load_blocks(to + a.at.x + a.at.x_half, a.x_map, 0, 1, k / kChunk, bar);
  }
  __device__ __forceinline__ void ask_span(int index, int row, int k) const {
    const uint32_t to = base + a.at.spans + index * a.at.span, bar = span_full(index);
    arrive_expecting(bar, uint32_t((kAffine ? 2 : 1) * rows() * a.at.scale_row));
    const uint64_t once = read_once();
    load_tile(to, a.scale_map, k / F::kGroup, row, bar, once);
    if (kAffine) load_tile(to + a.at.biases, a.bias_map, k / F::kGroup, row, bar, once);
  }
  // One thread: all of them as slots become free, but for the first of either, which has been
  // asked for.
  __device__ __forceinline__ void copy() const {
    Slot stage, span;
    uint32_t freed = 0;
    bool first = true;
#pragma unroll 1
    for (int group = int(blockIdx.x); group < a.groups; group += int(gridDim.x)) {
      const int row = group * rows();
      if (!first) wait_phase(ring_free(), freed), freed ^= 1;
      int spans_k = 0;
#pragma unroll 1
      for (int k = 0; k < a.padded; k += stage_codes()) {
        if (!first) {
          wait_phase(full(stage.index) + 8, stage.parity ^ 1);
          ask_stage(stage.index, row, k);
        }
        stage.advance(a.at.stages);
#pragma unroll 1
        for (; spans_k < k + stage_codes(); spans_k += a.at.span_k) {
          if (!first) {
            wait_phase(span_full(span.index) + 8, span.parity ^ 1);
            ask_span(span.index, row, spans_k);
          }
          first = false;
          span.advance(kSpans);
        }
      }
    }
  }

  // One warp: whether any scale is extreme.
  __device__ __forceinline__ void look_at_scales() const {
    Slot span;
    [[maybe_unused]] const int row_bits = 31 - __clz(a.at.scale_row);
#pragma unroll 1
    for (int group = int(blockIdx.x); group < a.groups; group += int(gridDim.x)) {
      Extremes<F, T> seen;
#pragma unroll 1
      for (int k = 0; k < a.spans_k; k += a.at.span_k) {
        const uint32_t bar = span_full(span.index);
        wait_phase(bar, span.parity);
        const uint32_t scales = base + a.at.spans + span.index * a.at.span;
        // What lies beyond the matrix is zero, which as an e8m0 byte is extreme. Whole pieces
        // of 16 bytes are within K.
        if constexpr (Decode::kExtreme)
#pragma unroll 2
          for (int at = lane * 16; at < rows() * a.at.scale_row; at += 512) {
            if constexpr (!kAffine) {
              const int row = at >> row_bits;
              const int first = (at & (a.at.scale_row - 1)) ^ turn_of(row, a.at.scale_row) * 16;
              if (group * rows() + row >= a.N || k + first * F::kGroup >= a.K) continue;
            }
            uint32_t v[4];
            load_shared<16>(scales + at, v);
#pragma unroll
            for (uint32_t word : v) seen.add(word);
          }
        __syncwarp();
        if (lane < kArrivals) arrive(bar + 8);
        span.advance(kSpans);
      }
      if (seen.any()) store_shared(extreme_at(), 1);
      sync_some(kSums, 32 * (workers() + 1));
    }
  }
};

#endif  // LOWBIT_HOPPER

}  // namespace lowbit::cuda
