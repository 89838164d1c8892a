// The warpgroups of matmul that multiply (what a block is and how its shared memory is filled:
// matmul.h), up to the sums of a tile.
//
// What bounds 16 tokens (4-bit, 4096x14336, 18.4 us; H200, 2026-11-23): without
// multiplying 13.1, without memory and scales 15.0, decoding alone 8.5. A multiply of 16 tokens
// takes the tensor cores 13 cycles, of 32 16, of 64 32, yet hardly overlaps with other warps'
// decoding: 8 byte permutes, 8 masks and 8 multiply-adds take 36 cycles a warp, two multiplies
// 27, both together 57 (82 with 64 tokens' 64). Byte permutes and logic have half the rate of
// multiply-adds, so they are what to save. mma.sync in wgmma's place takes as long with 16
// tokens and longer with more, and so do multiplies in batches of four.
//
// What bounds 64 tokens (4-bit, 4096x14336, 21.6 us): shared memory is near its limit, and what
// decodes does not overlap with what multiplies. For 128 rows and 128 k the former delivers x
// to the tensor cores in 256 cycles, codes in 256 (four lanes read the same 16 bytes, and a
// load takes as many cycles as it fills registers), scales in 64, and takes the copies in 210;
// the tensor cores need 512; a unit takes 830. Without decoding 17.6 us, without loads of codes
// 16.0, without multiplying 12.9, and 3.3 with neither. Warpgroups that multiply in turn, two
// of them or all four, with a barrier each time, are no help: 22.2 and 22.8.
//
// With x in lane order (matmul_operand.cuh) codes are read once: 19.7 (8-bit 24.6, nvfp4 22.1
// with a third fewer instructions, 24.0 before). qqmm has x so for nothing. Otherwise it takes
// a kernel of 2.5 us before, 1.8 where ours begins beside it (programmatic dependent launch);
// by warps of the block, through registers, 33.8 us: too few loads are under way. (H200,
// 2026-11-29.)
#pragma once

#include "matmul.h"
#include "matmul_operand.cuh"

namespace lowbit::cuda {

#if LOWBIT_HOPPER

// One of the warpgroups that multiply.
template <class F, class T, int kTokens, bool kGather, bool kLanes>
struct MatmulGroup : MatmulBlock<F, T, kTokens, kGather> {
  using Block = MatmulBlock<F, T, kTokens, kGather>;
  using Shape = typename Block::Shape;
  using Decode = typename Block::Decode;
  using Block::a, Block::base;
  using UnitRing = typename Block::UnitRing;
  using XRing = typename Block::XRing;
  static constexpr int kParities = Shape::kParities;
  using Sums = float[kTokens / 2];
  static constexpr int kOwnTokens = Shape::kOwnTokens, kOwners = kTokens / kOwnTokens;
  static constexpr int kQuads = kOwnTokens / 8;  // of sums
  using Own = float[kOwnTokens / 2];

  using Operand = std::conditional_t<kLanes, MatmulLaneOperand<F, T, kTokens>,
                                     MatmulOperand<F, T, kTokens>>;
  static constexpr int kPieces = Operand::kPieces, kSteps = 8 / kPieces;  // of 16 k
  // Steps (of 16 k) that are decoded, and then multiplied, together: the fewer groups of
  // multiplies, the less often the tensor cores run dry between two of them. Cycles a unit of
  // 256 tokens, 4 bits, with 1, 2 and 4: 2,334, 2,146 and 2,082, where multiplies alone take
  // 2,048; 4096x14336, M = 2048 379, 373 and 362 us (H200, 2026-11-29). With 288 tokens
  // registers are too few for four, with 64 and less four are no gain.
  static constexpr int kBatch = kTokens == 128 || kTokens == 256 ? 4 : 2;
  static_assert(kSteps % kBatch == 0);

  int half, parity, warp, lane;  // 64 rows of 128; units of K; of this warpgroup
  Operand codes;
  uint32_t peer;  // the other block that shares x
  UnitRing unit;  // this warpgroup's next
  XRing x;        // where x is apart

  __device__ MatmulGroup(const Block& block, int warp_of_block, int lane)
      : Block(block),
        half(warp_of_block / 4 % 2),
        parity(warp_of_block / 8),
        warp(warp_of_block % 4),
        lane(lane),
        codes(half * 64 + warp * 16 + lane / 4, lane % 4) {
    unit.advance(parity);
    peer = cluster_rank() ^ 1;
  }

  // What all lanes have alike, told to the compiler: descriptors then stay in uniform
  // registers.
  static __device__ __forceinline__ uint32_t uniform(uint32_t v) {
    return __shfl_sync(0xffffffffu, v, 0);
  }

  // This warp has read what `empty` guards, here and, of x, for the other block.
  __device__ __forceinline__ void release(uint32_t empty, bool x) const {
    if (arrives()) {
      arrive(empty);
      if (x && a.share > 1) arrive_remote(remote_address(empty, peer));
    }
  }

  // 16 k of the tile's first `width` tokens: a multiply takes 256.
  template <int width>
  static __device__ __forceinline__ void multiply(Sums& sums, const uint32_t (&operand)[4],
                                                  uint64_t b) {
    constexpr int kFirst = width < 256 ? width : 256, kRest = width - kFirst;
    Wgmma<T, kFirst>::run(reinterpret_cast<float(&)[kFirst / 2]>(sums), operand, b);
    if constexpr (kRest > 0)
      Wgmma<T, kRest>::run(reinterpret_cast<float(&)[kRest / 2]>(sums[kFirst / 2]), operand,
                           b + kFirst * 128 / 16);
  }

  // Of the tile's tokens the first `width`.
  template <int width>
  __device__ __forceinline__ void multiply_tile(Sums& sums) {
    uint32_t operands[2][kBatch][4] = {};
#pragma unroll
    for (float& s : sums) s = 0.0f;
    const int count = Block::last_unit - Block::first_unit;
    if (parity < count) {
      wait_phase(Block::full(unit.slot), unit.parity);
      codes.template load<0>(Block::stage(unit.slot));
    }
    uint32_t held = 0, held_x = 0;  // barriers of what multiplies under way read
    for (int u = parity; u < count; u += kParities) {
      const uint32_t stage = Block::stage(unit.slot), empty = Block::empty(unit.slot);
      const bool more = u + kParities < count;
      uint64_t b = b_descriptor(uniform(stage));
      unit.advance(kParities);
#pragma unroll
      for (int step = 0; step < 8; step += kBatch) {  // 16 k each
        const int p = step / kSteps, s = step % kSteps;
        auto& operand = operands[step / kBatch % 2];
        auto& before = operands[step / kBatch % 2 ^ 1];
        if (s == 0) {
          codes.begin_piece();
          if constexpr (Operand::kAhead) load_next(p, stage, more);
        }
#pragma unroll
        for (int i = 0; i < kBatch; i++) codes.decode_step(p, s + i, operand[i]);
        if constexpr (Shape::kApart) {
          if (step % 4 == 0) {
            wait_phase(Block::x_full(x.slot), x.parity);
            b = b_descriptor(uniform(Block::x_stage(x.slot)));
          }
        }
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < kBatch; i++) {
          const int half_at = Shape::kApart ? 0 : (step + i) / 4 * (Shape::kXBytes / 16);
          multiply<width>(sums, operand[i],
                          b + uint64_t(half_at) + (step + i) % 4 * kDescriptorStep);
        }
        wgmma_commit();
        if constexpr (!Operand::kAhead)
          if (s + kBatch == kSteps) load_next(p, stage, more);
        wgmma_wait<1>();  // those before: their operands and the x they read are free
#pragma unroll
        for (int i = 0; i < kBatch; i++) keep_alive(before[i]);
        if (step == 0 && held) release(held, !Shape::kApart);
        if constexpr (Shape::kApart) {
          if (step % 4 == 0) {
            if (held_x) release(held_x, true);
            held_x = Block::x_empty(x.slot);
            x.advance();
          }
        }
      }
      // A stage that is held into the next unit of its parity keeps the ring short: 33.4 us
      // where letting go at once took 29.2 (8-bit, 4096x14336, M=64; H200, 2026-11-22).
      if constexpr (kParities == 2) {
        wgmma_wait<0>();
        release(empty, true);
      } else {
        held = empty;
      }
    }
    wgmma_wait<0>();
    keep_alive(sums);
    if (held) release(held, !Shape::kApart);
    if (held_x) release(held_x, true);
    // An odd number of units: the other warpgroups' next is this one's.
    if (kParities == 2 && count % 2) {
      if (parity)
        unit.advance();
      else
        unit.step_back();
    }
  }

  // The piece after piece p, maybe of the next unit.
  __device__ __forceinline__ void load_next(int p, uint32_t stage, bool more) {
    if (p + 1 == kPieces) {
      if (!more) return;
      wait_phase(Block::full(unit.slot), unit.parity);
      return codes.template load<0>(Block::stage(unit.slot));
    }
    if constexpr (kPieces >= 2)
      if (p == 0) codes.template load<1>(stage);
    if constexpr (kPieces == 4) {
      if (p == 1) codes.template load<2>(stage);
      if (p == 2) codes.template load<3>(stage);
    }
  }

  __device__ __forceinline__ int group() const { return half + 2 * parity; }

  // Whether this warpgroup brings tokens to y.
  __device__ __forceinline__ bool owns() const { return parity < kOwners; }

  // Both warpgroups of 64 rows add up their sums: half of the tokens each, or the first all.
  __device__ __forceinline__ void gather_parities(const Sums& sums, Own& own) const {
    if constexpr (kParities == 1) {
#pragma unroll
      for (int i = 0; i < kOwnTokens / 2; i++) own[i] = sums[i];
    } else {
      // Through the rooms of y, as many quads of sums at a time as they hold.
      constexpr int kHalf = kQuads * 4, kFit = Shape::kOutBytes / 2048;
      constexpr int kRound = kQuads < kFit ? kQuads : kFit, kOther = kOwners == 2 ? kHalf : 0;
      static_assert(kQuads % kRound == 0);
      const uint32_t at = base + Shape::kOutAt + (warp * 32 + lane) * 16;
      const uint32_t mine = at + group() * Shape::kOutBytes;
      const uint32_t other = at + (group() ^ 2) * Shape::kOutBytes;
      float give[kHalf];
#pragma unroll
      for (int i = 0; i < kHalf; i++) {
        own[i] = parity ? sums[kOther + i] : sums[i];
        give[i] = parity ? sums[i] : sums[kOther + i];
      }
      if (warp == 0 && lane == 0) wait_for_stores<0>();  // of the tile before
      sync_threads<256>(7 + half);
#pragma unroll
      for (int first = 0; first < kQuads; first += kRound) {
#pragma unroll
        for (int q = 0; q < kRound; q++)
          if (kOwners == 2 || parity) store_quad(other + q * 2048, &give[4 * (first + q)]);
        sync_threads<256>(7 + half);
#pragma unroll
        for (int q = 0; q < kRound; q++) {
          if (!owns()) break;
          uint32_t v[4];
          load_shared<16>(mine + q * 2048, v);
#pragma unroll
          for (int i = 0; i < 4; i++) own[4 * (first + q) + i] += __uint_as_float(v[i]);
        }
        sync_threads<256>(7 + half);  // they may be overwritten
      }
    }
  }
  static __device__ __forceinline__ void store_quad(uint32_t to, const float* v) {
    store_shared(to, {__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]),
                      __float_as_uint(v[3])});
  }
};

#endif  // LOWBIT_HOPPER

}  // namespace lowbit::cuda
