// matmul's way from a tile's sums to y, and the kernel.
#pragma once

#include <type_traits>

#include "matmul_extreme.cuh"
#include "matmul_group.cuh"
#include "matmul_scales.cuh"

namespace lowbit::cuda {

#if LOWBIT_HOPPER

// How a warpgroup brings a tile's sums to y.
template <class F, class T, int kTokens, bool kGather, bool kLanes>
struct MatmulWriter : MatmulGroup<F, T, kTokens, kGather, kLanes> {
  using Group = MatmulGroup<F, T, kTokens, kGather, kLanes>;
  using Group::a, Group::base, Group::group, Group::half, Group::kOwnTokens, Group::kParities;
  using Group::kQuads, Group::lane, Group::parity, Group::store_quad, Group::warp;
  using typename Group::Block, typename Group::Decode, typename Group::Own,
      typename Group::Shape, typename Group::Tile;

  uint32_t out_at;  // where this lane's row of an 8x8 tile of y goes
  uint32_t out_count = 0;

  __device__ MatmulWriter(const Block& block, int warp_of_block, int lane)
      : Group(block, warp_of_block, lane) {
    const int token = lane / 16 * 8 + lane % 8, chunk = warp * 2 + lane / 8 % 2;
    out_at = uint32_t(token * 128 + (chunk ^ token % 8) * 16);
  }

  // How sums become y.
  struct Epilogue {
    float alpha, bias[2];
    int row;  // the lane's first
  };
  __device__ __forceinline__ Epilogue epilogue(const Tile& tile) const {
    Epilogue e;
    e.row = tile.row0 + half * 64 + warp * 16 + lane / 4;
    e.alpha = __uint_as_float(uint32_t(127 + Group::Operand::kAlphaExponent) << 23);
    if (a.global_w) e.alpha *= tile.global_w(a.gather, a.global_w) / Nvfp4::kGlobalMax;
    if (a.global_x) e.alpha *= *a.global_x / Nvfp4::kGlobalMax;
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int row = e.row + 8 * r;
      e.bias[r] = 0.0f;
      const int at = tile.first_row(a.N) + row;
      if (a.bias && row < a.N)
        e.bias[r] = a.bias_is_f32 ? static_cast<const float*>(a.bias)[at]
                                  : float(static_cast<const T*>(a.bias)[at]);
    }
    return e;
  }

  // d: sums of 16 tokens from `token` on, this lane's two rows of each. As elements of y to
  // `room`, or, not gathered, straight to y where tensor copies cannot write it.
  __device__ __forceinline__ void put(const Epilogue& e, float (&d)[8], int token,
                                      uint32_t room) const {
    if (!kGather && !a.y_tiles) return put_straight(e, d, token);
    put_in_room(e, d, room);
  }
  static __device__ __forceinline__ void finish(const Epilogue& e, float (&d)[8]) {
#pragma unroll
    for (int j = 0; j < 8; j++) d[j] = fmaf(e.alpha, d[j], e.bias[j / 2 % 2]);
  }
  __device__ __forceinline__ void put_in_room(const Epilogue& e, float (&d)[8],
                                              uint32_t room) const {
    finish(e, d);
    uint32_t v[4];
#pragma unroll
    for (int j = 0; j < 4; j++) v[j] = Half<T>::pack(d[2 * j], d[2 * j + 1]);
    store_transposed(room + out_at, v);
  }
  __device__ __forceinline__ void put_straight(const Epilogue& e, float (&d)[8],
                                               int token) const {
    finish(e, d);
#pragma unroll
    for (int j = 0; j < 8; j++) {
      const int t = token + j / 4 * 8 + 2 * (lane % 4) + j % 2, row = e.row + j / 2 % 2 * 8;
      if (t < a.M && row < a.N) static_cast<T*>(a.y_data)[int64_t(t) * a.N + row] = T(d[j]);
    }
  }

  // Where the next `out_tokens` tokens of 64 rows go; the copy that had the place has read it.
  __device__ __forceinline__ uint32_t next_room() {
    const uint32_t bytes = uint32_t(a.out_tokens) * 128;
    const uint32_t at = out_count++ * bytes % Shape::kOutBytes;
    if (!kGather && a.y_tiles && out_count * bytes > Shape::kOutBytes) {
      if (warp == 0 && lane == 0) {
        if (bytes == Shape::kOutBytes)
          wait_for_stores<0>();
        else if (bytes == Shape::kOutBytes / 2)
          wait_for_stores<1>();
        else
          wait_for_stores<3>();
      }
      sync_threads<128>(1 + group());
    }
    return base + Shape::kOutAt + group() * Shape::kOutBytes + at;
  }
  __device__ __forceinline__ void send(uint32_t room, int row0, int token) const {
    if (!a.y_tiles) return;
    fence_for_copies();
    sync_threads<128>(1 + group());
    if (warp == 0 && lane == 0) store_tile(a.y, row0 + half * 64, token, room);
  }

  // Gathered: no copy engine reads the room. The threads that do have read it when they next
  // meet after that: at the sums of the next tile, or, where those stay in their warpgroup, at
  // the other room.
  struct NoRows {
    __device__ __forceinline__ NoRows(const MatmulGather&, const Tile&, int, int) {}
  };
  using Rows = std::conditional_t<kGather, MatmulScatter<T, kOwnTokens>, NoRows>;
  static_assert(kParities == 2 ? Shape::kOutTokens == kOwnTokens
                               : Shape::kOutBytes >= 2 * Shape::kOutTokens * 128);
  __device__ __forceinline__ void scatter(const Rows& rows, uint32_t room, int row0,
                                          int first) const {
    sync_threads<128>(1 + group());
    rows.store(a.gather, a.y_data, row0 + half * 64, a.N, room, first, Shape::kOutTokens);
  }

  __device__ __forceinline__ void write(const Own& own, const Tile& tile) {
    if (!Group::owns()) return;
    const int token0 = tile.token0 + parity * kOwnTokens;
    const Rows rows(a.gather, tile, token0, warp * 32 + lane);
    const Epilogue e = epilogue(tile);
    const auto each_16 = [&](int first, int count, auto body) {
#pragma unroll
      for (int i = first; i < first + count; i += 16) {
        float d[8];
#pragma unroll
        for (int j = 0; j < 8; j++) d[j] = own[i / 2 + j];
        body(d, i);
      }
    };
    if (!kGather && !a.y_tiles) {  // text of its own: the other is gone through without jumps
      each_16(0, kOwnTokens, [&](float(&d)[8], int i) { put_straight(e, d, token0 + i); });
      return;
    }
#pragma unroll
    for (int first = 0; first < kOwnTokens; first += Shape::kOutTokens) {
      if (kGather && token0 + first >= tile.end(a.M)) break;
      const uint32_t room = next_room();
      each_16(first, Shape::kOutTokens,
              [&](float(&d)[8], int i) { put_in_room(e, d, room + (i - first) * 128); });
      if constexpr (kGather)
        scatter(rows, room, tile.row0, first);
      else
        send(room, tile.row0, token0 + first);
    }
  }

  // Whether a block that decoded this tile's rows met extreme scales.
  __device__ __forceinline__ bool met_extreme() const {
    if constexpr (!Decode::kExtreme) return false;
    uint32_t met = 0;
#pragma unroll
    for (int p = 0; p < kMostClusterSplit; p++)
      if (p < a.split) {
        const uint32_t rank = uint32_t(p * a.share + Block::share_rank);
        met |= load_remote_word(remote_address(Block::extreme_at(), rank));
      }
    return met != 0;
  }
  // If so: this block's part of the tile again, tokens 16i to 16i + 15 for i = first,
  // first + step, ...
  __device__ __forceinline__ void mend(bool met, const Tile& tile, int first, int step) const {
    if constexpr (!Decode::kExtreme) return;
    // The copying warps may be ahead and say so just now: all threads must agree. Nothing may
    // overtake the tile on its way out.
    constexpr int kThreads = 128 * Shape::kGroups;
    if (!sync_any<kThreads>(5, met)) return;
    wait_for_stores<0>(true);
    sync_threads<kThreads>(5);
    write_extreme<F, T, kTokens, kGather>(a, tile.row0 + (half * 4 + warp) * 16 + lane / 2,
                                          tile.token0 + lane % 2, first + parity * step,
                                          kParities * step, tile.place);
  }

  // This block's sums, where the blocks of the cluster find them: four of a lane to 16 bytes.
  __device__ __forceinline__ uint32_t shared_sums(int quad) const {
    return base + uint32_t((quad * 256 + half * 128 + warp * 32 + lane) * 16);
  }
  __device__ __forceinline__ void share_sums(const Own& own) const {
    sync_threads<128 * Shape::kGroups>(5);  // all of x is read
    if (!Group::owns()) return;
#pragma unroll
    for (int q = 0; q < kQuads; q++) store_quad(shared_sums(parity * kQuads + q), &own[4 * q]);
  }
  // This warpgroup's share of the tile's tokens, 16 at a time: body(tokens / 16).
  template <class Body>
  __device__ __forceinline__ void each_share(Body body) const {
    for (int i = Block::part + parity * a.split; i < kTokens / 16; i += kParities * a.split)
      body(i);
  }
  // The same, summed over the parts of K in their order: body(sums, tokens / 16). All parts are
  // asked for at once: one after the other took 2.3 us at M=64.
  template <class Body>
  __device__ __forceinline__ void each_shared_sum(Body body) const {
    each_share([&](int i) {
      float4 v[kMostClusterSplit][2];
#pragma unroll
      for (int p = 0; p < kMostClusterSplit; p++)
        if (p < a.split) {
          const uint32_t rank = uint32_t(p * a.share + Block::share_rank);
          const uint32_t from = remote_address(shared_sums(2 * i), rank);
          v[p][0] = load_remote(from), v[p][1] = load_remote(from + 4096);
        }
      float d[8] = {};
#pragma unroll
      for (int p = 0; p < kMostClusterSplit; p++)
        if (p < a.split) {
#pragma unroll
          for (int h = 0; h < 2; h++) {
            const float4& w = v[p][h];
            d[4 * h] += w.x, d[4 * h + 1] += w.y, d[4 * h + 2] += w.z, d[4 * h + 3] += w.w;
          }
        }
      body(d, i);
    });
  }
  // Where this lane's of them lie in memory, of the first or the second of two clusters.
  __device__ __forceinline__ float4* summed(bool second, int i) const {
    const size_t block = (second ? a.second_block : 0) + Block::block();
    return reinterpret_cast<float4*>(a.sums) + ((block * (kTokens / 16) + i) * 2 + half) * 256 +
           (warp * 32 + lane) * 2;
  }
  // To y, or to memory for the second of two clusters that comes to. Returns whether they are
  // in y; met: whether extreme scales were met, of both.
  __device__ __forceinline__ bool write_shared(const Tile& tile, bool& met) {
    constexpr int kThreads = 128 * Shape::kGroups;
    const Epilogue e = epilogue(tile);
    const auto to_y = [&](float(&d)[8], int i) {
      const uint32_t room = next_room();
      put(e, d, tile.token0 + 16 * i, room);
      send(room, tile.row0, tile.token0 + 16 * i);
    };
    if (!a.sums) {
      each_shared_sum(to_y);
      return true;
    }
    each_shared_sum([&](float(&d)[8], int i) {
      float4* const to = summed(Block::is_second(), i);
      __stcg(to, float4{d[0], d[1], d[2], d[3]});
      __stcg(to + 1, float4{d[4], d[5], d[6], d[7]});
    });
    __threadfence();
    met = sync_any<kThreads>(5, met);
    bool last = false, other_met = false;
    if (threadIdx.x == 0) {
      auto* const word = a.met + Block::block();
      const unsigned long long was = atomicExch(word, a.meeting + met);
      last = (was & ~1ull) == a.meeting, other_met = last && (was & 1) != 0;
      if (last) *word = 0;  // the next run of a captured graph has the same `meeting`
    }
    last = sync_any<kThreads>(5, last);
    met |= sync_any<kThreads>(5, other_met);
    if (!last) return false;
    __threadfence();
    each_share([&](int i) {
      float4 v[2][2];
#pragma unroll
      for (int s = 0; s < 2; s++)
        v[s][0] = __ldcg(summed(s, i)), v[s][1] = __ldcg(summed(s, i) + 1);
      float d[8] = {v[0][0].x + v[1][0].x, v[0][0].y + v[1][0].y, v[0][0].z + v[1][0].z,
                    v[0][0].w + v[1][0].w, v[0][1].x + v[1][1].x, v[0][1].y + v[1][1].y,
                    v[0][1].z + v[1][1].z, v[0][1].w + v[1][1].w};
      to_y(d, i);
    });
    return true;
  }
};

#endif  // LOWBIT_HOPPER

// kLanes: x in lane order.
template <class F, class T, int kTokens, bool kGather, bool kLanes>
__global__ void __launch_bounds__(MatmulShape<F, T, kTokens>::kThreads, 1)
    matmul_kernel(const __grid_constant__ MatmulArgs a) {
#if LOWBIT_HOPPER
  using Shape = MatmulShape<F, T, kTokens>;
  extern __shared__ char shared[];
  uint32_t base = (shared_address(shared) + 1023u) & ~1023u;
  asm volatile("" : "+r"(base));  // else the loops compute it again: 20 of 200 instructions
  const int warp = __shfl_sync(0xffffffffu, int(threadIdx.x) / 32, 0);
  using Writer = MatmulWriter<F, T, kTokens, kGather, kLanes>;
  constexpr int kCopy = 4 * Shape::kGroups;  // the first warp that copies
  // Registers a thread: 3 * 168 = 2 * 224 + 56, 5 * 96 = 4 * 104 + 64.
  if (warp >= kCopy) {
    using Block = typename Writer::Block;
    const Block block(a, base, true);
    const int lane = lane_id();
    if (warp == kCopy) {
      if (lane == 0) {
        prefetch_map(a.codes);
        prefetch_map(a.x[block.way_of_x(0, Writer::Tile::copied(a.gather))]);
        block.init();
      }
      __syncwarp();
      block.start(Block::kInitialises);
    }
    // The last warps bring scales; one before them copies x where it is apart, or has no work.
    constexpr int kFirst = kCopy + 4 - Shape::kScaleWarps;
    if (warp > kCopy && warp < kFirst) block.start(Block::kCopies);
    give_registers<Shape::kGroups == 2 ? 56 : 64>();
    if (warp == kCopy && lane == 0) {
      block.copy();
    } else if (warp >= kFirst) {
      if (warp == kFirst && lane == 0) prefetch_map(a.y);
      MatmulScales<F, T, kTokens, kGather>(block).copy_scales(warp - kFirst, lane);
    } else if (Shape::kApart && lane == 0) {
      block.copy_apart();
    }
    __syncwarp();
    if (!kGather && a.split > 1) cluster_sync();
  } else {
    const typename Writer::Block block(a, base, false);
    block.start(Writer::kMultiplies);
    claim_registers<Shape::kGroups == 2 ? 224 : 104>();
    Writer group(block, warp, lane_id());
    // Matrices do not fill a gathered tile evenly.
    const auto tile_sums = [&](typename Writer::Own& own, const typename Writer::Tile& tile) {
      typename Writer::Sums sums;
      if (kGather && kTokens > 256 && tile.at_most(64))
        group.template multiply_tile < kTokens<64 ? kTokens : 64>(sums);
      else if (kGather && kTokens > 256 && tile.at_most(256))
        group.template multiply_tile < kTokens<256 ? kTokens : 256>(sums);
      else
        group.template multiply_tile<kTokens>(sums);
      group.gather_parities(sums, own);
    };
    if (kGather || a.split == 1) {
      block.each_tile([&](int row0, int place) {
        typename Writer::Own own;
        tile_sums(own, typename Writer::Tile(a.gather, row0, place));
        const typename Writer::Tile tile(a.gather, row0, place);
        group.write(own, tile);
        group.mend(group.met_extreme(), tile, 0, 1);
      });
    } else {
      {
        typename Writer::Own own;
        tile_sums(own, typename Writer::Tile(a.gather, 0, 0));
        group.share_sums(own);
      }
      cluster_sync();
      block.each_tile([&](int row0, int place) {
        bool met = group.met_extreme();
        const typename Writer::Tile tile(a.gather, row0, place);
        if (group.write_shared(tile, met)) group.mend(met, tile, block.part, a.split);
      });
    }
    wait_for_stores<0>();
  }
  // No block ends while others may read its shared memory or signal its barriers.
  if (a.share * a.split > 1) cluster_sync_relaxed();
#endif
}

}  // namespace lowbit::cuda
