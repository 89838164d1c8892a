// matmul's arithmetic (what a block is and how its shared memory is filled: matmul.h), and the
// kernel.
#pragma once

#include "matmul.h"
#include "matmul_extreme.cuh"

namespace lowbit::cuda {

#if LOWBIT_HOPPER

// One of the warpgroups that multiply.
template <class F, class T, int kTokens>
struct MatmulGroup : MatmulBlock<F, T, kTokens> {
  using Block = MatmulBlock<F, T, kTokens>;
  using Shape = typename Block::Shape;
  using Decode = typename Block::Decode;
  using Block::a, Block::base;
  using Sums = float[kTokens / 2];
  static constexpr int kQuads = kTokens / 8, kParities = Shape::kParities;

  // What a lane loads at once: its two rows, 64 k or, where that takes many registers, 32.
  static constexpr int kPieces = F::kBits == 8 || F::kGroup == 16 ? 4 : 2;  // of a unit
  static constexpr int kChunks = 16 / kPieces, kSteps = kChunks / 2;        // of 8 k, of 16 k
  static constexpr int kWords = kChunks * F::kBits / 4;
  static constexpr int kPieceGroups = F::kGroup * kPieces < 128 ? 128 / kPieces / F::kGroup : 1;
  static constexpr int kCodeLoad = kWords % 4 == 0 ? 16 : 8;  // bytes
  static constexpr int kTurns = Shape::kSwizzle ? Shape::kSwizzle / 16 : 1;
  static constexpr int kEntryBytes = kPieceGroups * Shape::kEntry;
  static constexpr int kEntryLoad = kEntryBytes < 16 ? kEntryBytes : 16;
  static constexpr int kEntryTurns = Shape::kEntryRow / 16;
  struct Piece {
    uint32_t words[2][kWords];
    GroupPair groups[2][kPieceGroups];
  };
  // Steps (of 16 k) that are decoded, and then multiplied, together.
  static constexpr int kBatch = kTokens <= 64 ? 2 : 1;

  const Decode decode;
  int half, parity, warp, lane;  // 64 rows of 128; units of K; of this warpgroup
  // Where chunks i, i + kTurns, ... of this lane's first row begin in a unit; the second row is
  // 8 rows on.
  uint32_t code_at[kTurns], entry_at[kEntryTurns];
  uint32_t out_at;                        // where this lane's row of an 8x8 tile of y goes
  uint32_t peer = 0;                      // the other block that shares x: its x_empty(0)
  uint32_t x_taken = 0, units_taken = 0;  // before this tile
  uint32_t out_count = 0;

  __device__ MatmulGroup(const Block& block, int warp_of_block, int lane)
      : Block(block),
        decode(lane % 4),
        half(warp_of_block / 4 % 2),
        parity(warp_of_block / 8),
        warp(warp_of_block % 4),
        lane(lane) {
    const int row = half * 64 + warp * 16 + lane / 4;
#pragma unroll
    for (int i = 0; i < kTurns; i++)
      code_at[i] = base + Shape::kUnitsAt + row * Shape::kRowBytes +
                   (i ^ turn_of(row, Shape::kSwizzle)) * 16;
#pragma unroll
    for (int i = 0; i < kEntryTurns; i++)
      entry_at[i] = base + Shape::kUnitsAt + Shape::kCodeBytes + row * Shape::kEntryRow +
                    (i ^ turn_of(row, Shape::kEntryRow)) * 16;
    const int token = lane / 16 * 8 + lane % 8, chunk = warp * 2 + lane / 8 % 2;
    out_at = uint32_t(token * 128 + (chunk ^ token % 8) * 16);
    if (a.share > 1) peer = remote_address(Block::x_empty(0), cluster_rank() ^ 1);
  }

  template <int p>
  __device__ __forceinline__ void load(Piece& piece, uint32_t slot) const {
    const uint32_t unit = slot * Shape::kUnitBytes;
#pragma unroll
    for (int r = 0; r < 2; r++) {
#pragma unroll
      for (int i = 0; i < kWords * 4; i += kCodeLoad) {
        const int at = p * kWords * 4 + i;  // in the row
        const uint32_t from =
            Shape::kSwizzle ? code_at[at / 16 % kTurns] + at % 16 : code_at[0] + uint32_t(at);
        load_shared<kCodeLoad>(from + unit + r * 8 * Shape::kRowBytes, &piece.words[r][i / 4]);
      }
      constexpr int kFrom = p * Shape::kEntries / kPieces * Shape::kEntry;
      uint32_t v[kEntryBytes / 4];
#pragma unroll
      for (int i = 0; i < kEntryBytes; i += kEntryLoad)
        load_shared<kEntryLoad>(
            entry_at[(kFrom + i) / 16] + (kFrom + i) % 16 + unit + r * 8 * Shape::kEntryRow,
            &v[i / 4]);
#pragma unroll
      for (int i = 0; i < kPieceGroups; i++) {
        if constexpr (Decode::kBias)
          piece.groups[r][i] = {v[2 * i], v[2 * i + 1]};
        else
          piece.groups[r][i] = {v[i], 0};
      }
    }
  }

  // A for step s (16 k) of the piece.
  __device__ __forceinline__ void decode_step(const Piece& piece, int s,
                                              uint32_t (&operand)[4]) const {
    const auto group = [](int j) { return j * kPieceGroups / kChunks; };
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const auto& w = piece.words[r];
      const auto& g = piece.groups[r];
      const int j = 2 * s;
      if constexpr (Decode::kByTwo) {
        decode.two_pairs(w, j, g[group(j)], g[group(j + 1)], operand[r], operand[2 + r]);
      } else {
        operand[r] = decode.pair(w, j, g[group(j)]);
        operand[2 + r] = decode.pair(w, j + 1, g[group(j + 1)]);
      }
    }
  }

  __device__ __forceinline__ void release_x(uint32_t slot) const {
    if (lane == 0) {
      arrive(Block::x_empty(slot));
      if (peer) arrive_remote(peer + 8 * slot);
    }
  }

  __device__ __forceinline__ void multiply_tile(Sums& sums) {
    Piece pieces[2];
    uint32_t operands[2][kBatch][4] = {};
#pragma unroll
    for (float& s : sums) s = 0.0f;
    const int count = Block::last_unit - Block::first_unit;
    UnitRing unit{units_taken + parity};
    XRing x{x_taken + 2 * parity};
    if (parity < count) {
      wait_phase(Block::unit_full(unit.slot()), unit.parity());
      load<0>(pieces[0], unit.slot());
    }
    uint32_t held = 0;
    for (int u = parity; u < count; u += kParities) {
      const uint32_t slot = unit.slot();
      unit.taken += kParities;
      uint64_t b = 0;
#pragma unroll
      for (int step = 0; step < 8; step += kBatch) {  // 16 k each
        const int p = step / kSteps, s = step % kSteps;
        auto& operand = operands[step / kBatch % 2];
        auto& before = operands[step / kBatch % 2 ^ 1];
#pragma unroll
        for (int i = 0; i < kBatch; i++) decode_step(pieces[p % 2], s + i, operand[i]);
        if (step % 4 == 0) {
          wait_phase(Block::x_full(x.slot()), x.parity());
          b = b_descriptor(Block::x_at(x.slot()));
        }
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < kBatch; i++)
          Wgmma<T, kTokens>::run(sums, operand[i], b + (step + i) % 4 * kDescriptorStep);
        wgmma_commit();
        wgmma_wait<1>();  // those before: their operands and the x they read are free
#pragma unroll
        for (int i = 0; i < kBatch; i++) keep_alive(before[i]);
        if (step % 4 == 0) {
          if (step >= 4 || u >= kParities) release_x(held);
          held = x.slot();
        }
        if (step % 4 + kBatch == 4) x.taken += step >= 4 && kParities == 2 ? 3 : 1;
        if (s == 0) load_next(p, pieces, slot, unit, u + kParities < count);
      }
      __syncwarp();
      if (lane == 0) arrive(Block::unit_empty(slot));
    }
    wgmma_wait<0>();
    keep_alive(sums);
    if (parity < count) release_x(held);
    units_taken += count, x_taken += 2 * count;
  }

  // The piece after piece p, while p is multiplied.
  __device__ __forceinline__ void load_next(int p, Piece (&pieces)[2], uint32_t slot,
                                            const typename Block::UnitRing& next, bool more) {
    if (p + 1 == kPieces) {
      if (!more) return;
      wait_phase(Block::unit_full(next.slot()), next.parity());
      return load<0>(pieces[0], next.slot());
    }
    if (p == 0) load<1>(pieces[1], slot);
    if constexpr (kPieces == 4) {
      if (p == 1) load<2>(pieces[0], slot);
      if (p == 2) load<3>(pieces[1], slot);
    }
  }

  using UnitRing = typename Block::UnitRing;
  using XRing = typename Block::XRing;

  // Adds the sums of the units of the other parity. False: this warpgroup's were added
  // elsewhere.
  __device__ __forceinline__ bool gather_parities(Sums& sums) const {
    if constexpr (kParities == 1) return true;
    const uint32_t at = base + Shape::kSumsAt + (half * 128 + warp * 32 + lane) * 16;
    if (parity == 1) {
#pragma unroll
      for (int q = 0; q < kQuads; q++) store_quad(at + q * 4096, &sums[4 * q]);
    }
    sync_threads(3, 512);
    if (parity == 0) {
#pragma unroll
      for (int q = 0; q < kQuads; q++) {
        uint32_t v[4];
        load_shared<16>(at + q * 4096, v);
#pragma unroll
        for (int i = 0; i < 4; i++) sums[4 * q + i] += __uint_as_float(v[i]);
      }
    }
    sync_threads(3, 512);  // the next tile's sums may come
    return parity == 0;
  }
  static __device__ __forceinline__ void store_quad(uint32_t to, const float* v) {
    store_shared(to, {__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]),
                      __float_as_uint(v[3])});
  }

  // How sums become y.
  struct Epilogue {
    float alpha, bias[2];
    int row;  // the lane's first
  };
  __device__ __forceinline__ Epilogue epilogue(int row0) const {
    Epilogue e;
    e.row = row0 + half * 64 + warp * 16 + lane / 4;
    e.alpha = __uint_as_float(uint32_t(127 + Decode::kAlphaExponent) << 23);
    if (a.global_w) e.alpha *= *a.global_w / Nvfp4::kGlobalMax;
    if (a.global_x) e.alpha *= *a.global_x / Nvfp4::kGlobalMax;
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int row = e.row + 8 * r;
      e.bias[r] = 0.0f;
      if (a.bias && row < a.N)
        e.bias[r] = a.bias_is_f32 ? static_cast<const float*>(a.bias)[row]
                                  : float(static_cast<const T*>(a.bias)[row]);
    }
    return e;
  }

  // d: sums of 16 tokens from `token` on, this lane's two rows of each. To y's type, and to
  // `room`, or straight to y where tensor copies cannot write it.
  __device__ __forceinline__ void put(const Epilogue& e, float (&d)[8], int token,
                                      uint32_t room) const {
#pragma unroll
    for (int j = 0; j < 8; j++) d[j] = fmaf(e.alpha, d[j], e.bias[j / 2 % 2]);
    if (a.y_tiles) {
      uint32_t v[4];
#pragma unroll
      for (int j = 0; j < 4; j++) v[j] = Half<T>::pack(d[2 * j], d[2 * j + 1]);
      return store_transposed(room + out_at, v);
    }
#pragma unroll
    for (int j = 0; j < 8; j++) {
      const int t = token + j / 4 * 8 + 2 * (lane % 4) + j % 2, row = e.row + j / 2 % 2 * 8;
      if (t < a.M && row < a.N) static_cast<T*>(a.y_data)[int64_t(t) * a.N + row] = T(d[j]);
    }
  }

  // Where the next `out_tokens` tokens of 64 rows go; the copy that had the place has read it.
  __device__ __forceinline__ uint32_t next_room() {
    const uint32_t at = out_count++ * uint32_t(a.out_tokens) * 128 % Shape::kOutBytes;
    if (a.y_tiles) {
      if (warp == 0 && lane == 0) {
        if (a.out_tokens == 16)
          wait_for_stores<3>();
        else
          wait_for_stores<1>();
      }
      sync_threads(1 + half, 128);
    }
    return base + Shape::kOutAt + half * Shape::kOutBytes + at;
  }
  __device__ __forceinline__ void send(uint32_t room, int row0, int token) const {
    if (!a.y_tiles) return;
    fence_for_copies();
    sync_threads(1 + half, 128);
    if (warp == 0 && lane == 0) store_tile(a.y, row0 + half * 64, token, room);
  }

  __device__ __forceinline__ void write(const Sums& sums, int row0, int token0) {
    const Epilogue e = epilogue(row0);
#pragma unroll
    for (int first = 0; first < kTokens; first += 32) {
      const uint32_t room = next_room();
#pragma unroll
      for (int i = 0; i < 2; i++) {
        float d[8];
#pragma unroll
        for (int j = 0; j < 8; j++) d[j] = sums[first / 2 + 8 * i + j];
        put(e, d, token0 + first + 16 * i, room + i * 16 * 128);
      }
      send(room, row0, token0 + first);
    }
  }

  // If a block that decoded this tile's rows met extreme scales: this block's part of the tile
  // again, tokens 16i to 16i + 15 for i = first, first + step, ...
  __device__ __forceinline__ void mend(int row0, int token0, int first, int step) const {
    if constexpr (!Decode::kExtreme) return;
    bool met = false;
    for (int p = 0; p < a.split; p++)
      met |= 0 != load_remote_word(remote_address(Block::extreme_at(),
                                                  uint32_t(p * a.share + Block::share_rank)));
    // The copying warps may be ahead and say so just now: all threads must agree. Nothing may
    // overtake the tile on its way out.
    if (!sync_any(4 + 1, 256, met)) return;
    wait_for_stores<0>(true);
    sync_threads(4 + 1, 256);
    write_extreme<F, T, kTokens>(a, row0 + (half * 4 + warp) * 16 + lane / 2, token0 + lane % 2,
                                 first, step);
  }

  // This block's sums, where the blocks of the cluster find them: four of a lane to 16 bytes.
  __device__ __forceinline__ uint32_t shared_sums(int quad) const {
    return base + uint32_t((quad * 256 + half * 128 + warp * 32 + lane) * 16);
  }
  __device__ __forceinline__ void share_sums(const Sums& sums) const {
    if constexpr (kParities == 1) sync_threads(3, 256);  // all of x is read
#pragma unroll
    for (int q = 0; q < kQuads; q++) store_quad(shared_sums(q), &sums[4 * q]);
  }
  // This block's share of the tile's tokens, summed over the parts of K in their order.
  __device__ __forceinline__ void write_shared(int row0, int token0) {
    const Epilogue e = epilogue(row0);
    for (int i = Block::part; i < kTokens / 16; i += a.split) {
      const uint32_t room = next_room();
      float d[8] = {};
      for (int p = 0; p < a.split; p++) {
        const uint32_t rank = uint32_t(p * a.share + Block::share_rank);
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const float4 v = load_remote(remote_address(shared_sums(2 * i + h), rank));
          d[4 * h] += v.x, d[4 * h + 1] += v.y, d[4 * h + 2] += v.z, d[4 * h + 3] += v.w;
        }
      }
      put(e, d, token0 + 16 * i, room);
      send(room, row0, token0 + 16 * i);
    }
  }
};

#endif  // LOWBIT_HOPPER

template <class F, class T, int kTokens>
__global__ void __launch_bounds__(MatmulShape<F, T, kTokens>::kThreads, 1)
    matmul_kernel(const __grid_constant__ MatmulArgs a) {
#if LOWBIT_HOPPER
  using Shape = MatmulShape<F, T, kTokens>;
  extern __shared__ char shared[];
  const uint32_t base = (shared_address(shared) + 1023u) & ~1023u;
  const int warp = __shfl_sync(0xffffffffu, int(threadIdx.x) / 32, 0);
  const int lane = int(threadIdx.x) % 32;
  const MatmulBlock<F, T, kTokens> block(a, base);
  if (threadIdx.x == 0) {
    prefetch_map(a.x), prefetch_map(a.codes), prefetch_map(a.y);
    block.init();
  }
  cluster_sync();
  constexpr int kCopy = 4 * Shape::kGroups;  // the first warp that copies
  // Registers a thread: 3 * 168 = 2 * 224 + 56, 5 * 96 = 4 * 104 + 64.
  if (warp >= kCopy) {
    give_registers<Shape::kGroups == 2 ? 56 : 64>();
    if (warp == kCopy && lane == 0) block.copy_x();
    if (warp == kCopy + 1 && lane == 0) block.copy_codes();
    if (warp >= kCopy + 2) block.copy_scales(warp - kCopy - 2, lane);
    __syncwarp();
    if (a.split > 1) cluster_sync();
  } else {
    claim_registers<Shape::kGroups == 2 ? 224 : 104>();
    MatmulGroup<F, T, kTokens> group(block, warp, lane);
    if (a.split == 1) {
      block.each_tile([&](int row0, int token0) {
        typename MatmulGroup<F, T, kTokens>::Sums sums;
        group.multiply_tile(sums);
        if (!group.gather_parities(sums)) return;
        group.write(sums, row0, token0);
        group.mend(row0, token0, 0, 1);
      });
    } else {
      bool writes;
      {
        typename MatmulGroup<F, T, kTokens>::Sums sums;
        group.multiply_tile(sums);
        writes = group.gather_parities(sums);
        if (writes) group.share_sums(sums);
      }
      cluster_sync();
      if (writes)
        block.each_tile([&](int row0, int token0) {
          group.write_shared(row0, token0);
          group.mend(row0, token0, block.part, a.split);
        });
    }
    wait_for_stores<0>();
  }
  // No block ends while others may read its shared memory or signal its barriers.
  if (a.share * a.split > 1) cluster_sync();
#endif
}

}  // namespace lowbit::cuda
