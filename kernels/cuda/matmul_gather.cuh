// Tiles of matmul: of a plain product, a grid of them; of a gathered one, a list that the
// device has made (group.h), whose tokens are rows of x sorted by the matrix that they meet.
//
//   plain     tokens from token0 on, up to M, rows of the one matrix
//   gathered  tokens [token0, end) of the sorted ones, all of `matrix`; y's rows are scattered.
//             Copies of whole tiles of x and codes run on into the next matrix: what these
//             sums are reaches no y.
#pragma once

#include "group.h"
#include "tma.h"

namespace lowbit::cuda {

// Null and zero for plain products.
struct MatmulGather {
  const RowTile* list;
  const int* list_count;
  const int* y_rows;    // of the sorted tokens
  const int* in_order;  // not zero: x itself is sorted
  int global_w_count;
  bool y_vectors;  // rows of y allow stores of 16 bytes
};

#if LOWBIT_HOPPER

template <bool kGather>
struct MatmulTile {
  static constexpr int place = 0;
  int row0, token0;

  __device__ __forceinline__ MatmulTile(const MatmulGather&, int row0, int token0)
      : row0(row0), token0(token0) {}
  static __device__ __forceinline__ int count(const MatmulGather&) { return 0; }
  static __device__ __forceinline__ bool copied(const MatmulGather&) { return false; }
  // Of the tile's matrix among the rows of all of them.
  __device__ __forceinline__ int first_row(int) const { return 0; }
  __device__ __forceinline__ int end(int M) const { return M; }
  __device__ __forceinline__ bool at_most(int) const { return false; }
  __device__ __forceinline__ int y_row(const MatmulGather&, int token) const { return token; }
  __device__ __forceinline__ float global_w(const MatmulGather&, const float* w) const {
    return *w;
  }
};

template <>
struct MatmulTile<true> {
  int row0, token0, matrix, tokens_end, place;

  // Tile i of the list. Its line is in the L1 cache for all but the first warp that asks.
  __device__ __forceinline__ MatmulTile(const MatmulGather& g, int row0, int i)
      : row0(row0), place(i) {
    const int4 v = __ldg(reinterpret_cast<const int4*>(g.list) + i);
    matrix = v.x, token0 = v.y, tokens_end = v.y + v.z;
  }
  // Of the list. Read anew at every tile: kept all along it was one value too many for nvfp4's
  // registers.
  static __device__ __forceinline__ int count(const MatmulGather& g) {
    int n;
    asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(n) : "l"(g.list_count));
    return n;
  }
  // Whether tokens come from a copy of x.
  static __device__ __forceinline__ bool copied(const MatmulGather& g) { return !*g.in_order; }
  __device__ __forceinline__ int first_row(int N) const { return matrix * N; }
  __device__ __forceinline__ int end(int) const { return tokens_end; }
  __device__ __forceinline__ bool at_most(int n) const { return tokens_end - token0 <= n; }
  __device__ __forceinline__ int y_row(const MatmulGather& g, int token) const {
    return __ldg(g.y_rows + token);
  }
  __device__ __forceinline__ float global_w(const MatmulGather& g, const float* w) const {
    return w[g.global_w_count > 1 ? matrix : 0];
  }
};

// The way of 64 columns of y from shared memory to scattered rows, by a warpgroup: 8 threads a
// token, 16 bytes each, 16 tokens at a time. `kTokens`: of a tile that the warpgroup brings to
// y. Their rows are asked for before the first sums are staged: one round trip a tile.
template <class T, int kTokens>
struct MatmulScatter {
  static_assert(sizeof(T) == 2);
  int y_rows[kTokens / 16];  // negative: not of the tile
  int thread;                // of the warpgroup

  __device__ __forceinline__ MatmulScatter(const MatmulGather& g, const MatmulTile<true>& tile,
                                           int token, int thread)
      : thread(thread) {
#pragma unroll
    for (int i = 0; i < kTokens / 16; i++) {
      const int t = token + 16 * i + thread / 8;
      y_rows[i] = t < tile.tokens_end ? tile.y_row(g, t) : -1;
    }
  }

  // Tokens first .. first + count - 1, multiples of 16, staged at `room`: rows of 128 bytes,
  // 16-byte chunk c at c ^ (row % 8). column: of y, of the first.
  __device__ __forceinline__ void store(const MatmulGather& g, void* y, int column, int N,
                                        uint32_t room, int first, int count) const {
    const int n = column + thread % 8 * 8;
    if (n >= N) return;
    const uint32_t from =
        room + uint32_t(thread / 8 * 128 + (thread % 8 ^ thread / 8 % 8) * 16);
#pragma unroll
    for (int i = 0; i < count / 16; i++) {
      const int row = y_rows[first / 16 + i];
      if (row < 0) continue;
      uint32_t v[4];
      load_shared<16>(from + i * 16 * 128, v);
      auto* to = static_cast<uint16_t*>(y) + int64_t(row) * N + n;
      if (g.y_vectors) {
        *reinterpret_cast<uint4*>(to) = make_uint4(v[0], v[1], v[2], v[3]);
      } else {
#pragma unroll
        for (int j = 0; j < 8; j++)
          if (n + j < N) to[j] = uint16_t(v[j / 2] >> (16 * (j % 2)));
      }
    }
  }
};

#endif  // LOWBIT_HOPPER

}  // namespace lowbit::cuda
