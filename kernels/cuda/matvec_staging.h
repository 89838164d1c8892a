// How matvec's operands reach shared memory: each warp's ring of slices of W, and x in the
// order of the fragments.
#pragma once

#include "kernels.h"
#include "load.h"
#include "matvec_rules.h"
#include "pipeline.h"

namespace lowbit::cuda {

struct MatvecArgs {
  const uint8_t* codes;
  const uint8_t* scales;
  const uint8_t* biases;
  const void* x;
  void* y;
  const void* bias;
  const float* global_x;
  const float* global_w;
  int64_t row_bytes;       // of codes
  MatvecSizes::Layout at;  // in shared memory
  int N, K, M;
  int part;          // of K, for each block of a cluster
  bool bias_is_f32;  // else of x's type
  bool aligned;      // rows of codes to 16 bytes, of scales to a slice's
  bool x_aligned;    // to 16 bytes
};

// MatvecSizes as constants.
template <class F, class T, int TOK>
struct MatvecShape {
  static constexpr MatvecSizes kSizes{F::kBits, F::kGroup, F::kHasBias, TOK};
  static constexpr int kColumnTiles = TOK > 8 ? TOK / 8 : 1;
  static constexpr int kWarps = kSizes.warps(), kThreads = 32 * kWarps;
  static constexpr int kSlice = kSizes.kSlice, kRows = kSizes.kRows, kStages = kSizes.kStages;
  static constexpr int kGroup = F::kGroup, kSpan = kSizes.span();
  static constexpr bool kAffine = F::kHasBias, kFolded = kSizes.folded();
  static constexpr int kScaleSize = kSizes.scale_size(), kScaleRow = kSizes.scale_row();
  static constexpr int kCodeRow = kSizes.code_row(), kCodeBytes = kRows * kCodeRow;
  static constexpr int kStage = kSizes.stage(), kRing = kSizes.ring();
  // Fewer than 8 tokens leave columns of the accumulators free: groups take turns in them, and
  // scales are applied once for `kSlots` groups.
  static constexpr int kFree = TOK >= 8 ? 1 : 8 / TOK, kInSlice = kSlice / kSpan;
  static constexpr int kSlots = kFolded ? 1 : kFree < kInSlice ? kFree : kInSlice;
  static constexpr int kFlush = kSizes.flush(), kTokenSums = kSizes.kTokenSums;
  static constexpr int kWarpSums = kSizes.warp_sums(), kTileSums = kSizes.tile_sums();
  static constexpr int kZeros = kSizes.zeros();
};

template <class F, class T, int TOK>
struct MatvecStaging {
  using Shape = MatvecShape<F, T, TOK>;
  using Codes = LaneCodes<typename F::Code, T>;
  using H = Half<T>;
  static constexpr int kSlice = Shape::kSlice, kRows = Shape::kRows;

  const MatvecArgs& a;
  const MatvecSizes::Layout& at;
  char* shared;
  const uint32_t base;
  const int warp, lane, g, c;
  const int k0, k1;             // this block's part of K
  const int first_tile, tiles;  // this block's run
  const int tokens;
  const LaneAt<F::kBits> lane_at;

  __device__ uint32_t ring() const { return base + warp * Shape::kRing; }
  __device__ uint32_t after(uint32_t stage) const {
    stage += Shape::kStage;
    return stage == ring() + Shape::kRing ? ring() : stage;
  }

  // Slices of all tiles are dealt to the warps in turn: a tile's slice, and the next warp's
  // turn.
  struct Turn {
    int tile, slice;
  };
  __device__ int slices() const { return (k1 - k0 + kSlice - 1) / kSlice; }
  __device__ __forceinline__ void next_turn(Turn& turn) const {
    for (turn.slice += Shape::kWarps; turn.slice >= slices(); turn.tile++)
      turn.slice -= slices();
  }
  __device__ Turn first_turn() const {
    Turn turn{0, warp - Shape::kWarps};
    next_turn(turn);
    return turn;
  }

  // The turn whose copies start next, and where they come from and go.
  struct Source : Turn {
    const uint8_t* codes;   // of the tile's first row
    const uint8_t* scales;  // of this lane's row; biases for lanes from 16 on
    uint32_t to;
  };
  static constexpr int kSliceBytes = kSlice * F::kBits / 8;
  __device__ int64_t scale_row() const {
    return int64_t(a.K / Shape::kGroup) * Shape::kScaleSize;
  }
  __device__ Source first_source() const {
    Source s;
    static_cast<Turn&>(s) = first_turn();
    const int64_t n0 = int64_t(first_tile + s.tile) * kRows, k = k0 + s.slice * kSlice;
    s.codes = a.codes + n0 * a.row_bytes + k * F::kBits / 8;
    s.scales = (Shape::kAffine && lane >= kRows ? a.biases : a.scales) +
               (n0 + lane % kRows) * scale_row() + k / Shape::kGroup * Shape::kScaleSize;
    s.to = ring();
    return s;
  }
  __device__ __forceinline__ void next_source(Source& s) const {
    s.codes += Shape::kWarps * kSliceBytes, s.scales += Shape::kWarps * Shape::kScaleRow;
    for (s.slice += Shape::kWarps; s.slice >= slices(); s.tile++) {
      s.slice -= slices();
      s.codes += kRows * a.row_bytes - slices() * kSliceBytes;
      s.scales += kRows * scale_row() - slices() * Shape::kScaleRow;
    }
    s.to = after(s.to);
  }

  // This lane's pieces of 16 bytes of a slice's codes.
  static constexpr int kPieces = kSlice * F::kBits / 8 / 16;  // of a row
  static constexpr int kLanePieces = kPieces * kRows / 32;
  struct Pieces {
    uint32_t from[kLanePieces], to[kLanePieces];
    __device__ Pieces(int lane, int64_t row_bytes) {
#pragma unroll
      for (int i = 0; i < kLanePieces; i++) {
        const int r = (lane + 32 * i) / kPieces, byte = (lane + 32 * i) % kPieces * 16;
        from[i] = uint32_t(r * row_bytes + byte), to[i] = r * Shape::kCodeRow + byte;
      }
    }
  };

  // Starts the copies of a slice into the ring.
  __device__ __forceinline__ void copy(const Source& s, const Pieces& pieces) const {
    if (s.tile < tiles) {
      const int rows = a.N - (first_tile + s.tile) * kRows, left = k1 - k0 - s.slice * kSlice;
      if (a.aligned && rows >= kRows && left >= kSlice) {
#pragma unroll
        for (int i = 0; i < kLanePieces; i++)
          copy_async<16>(s.to + pieces.to[i], s.codes + pieces.from[i]);
        if (Shape::kAffine || lane < kRows)
          copy_async<Shape::kScaleRow>(s.to + Shape::kCodeBytes + lane * Shape::kScaleRow,
                                       s.scales);
      } else {
        copy_rest(s, min(kSlice, left), rows);
      }
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  }
  // The same for the ends of N and K and for rows that are not aligned.
  __device__ __forceinline__ void copy_rest(const Source& s, int count, int rows) const {
    const int words = count * F::kBits / 32;
#pragma unroll 1
    for (int r = 0; r < kRows && r < rows; r++)
      for (int i = lane; i < words; i += 32)
        copy_async<4>(s.to + r * Shape::kCodeRow + 4 * i, s.codes + r * a.row_bytes + 4 * i);
    if (lane % kRows >= rows || (!Shape::kAffine && lane >= kRows)) return;
    const int bytes = count / Shape::kGroup * Shape::kScaleSize;
    char* to = shared + (s.to - base) + Shape::kCodeBytes + lane * Shape::kScaleRow;
#pragma unroll 1
    for (int i = 0; i < bytes; i++) to[i] = char(s.scales[i]);
  }

  // Eight tokens of this lane's 8 elements of x from k on, zero outside.
  __device__ __forceinline__ void load_x(int k, int token, uint4 (&v)[8]) const {
#pragma unroll
    for (int t = 0; t < 8; t++) v[t] = make_uint4(0, 0, 0, 0);
    if (k >= k1) return;
    const T* from = static_cast<const T*>(a.x) + int64_t(token) * a.K + k;
    if (a.x_aligned) {
#pragma unroll
      for (int t = 0; t < 8; t++)
        if (token + t < tokens)
          v[t] = __ldg(reinterpret_cast<const uint4*>(from + t * int64_t(a.K)));
    } else {
#pragma unroll
      for (int t = 0; t < 8; t++)
        if (token + t < tokens) {
          const auto* h = reinterpret_cast<const uint16_t*>(from + t * int64_t(a.K));
          v[t] = make_uint4(h[0] | h[1] << 16, h[2] | h[3] << 16, h[4] | h[5] << 16,
                            h[6] | h[7] << 16);
        }
    }
  }
  // Puts them into fragment order, [block of 32][token][lane of the quad][8], and sums groups.
  __device__ __forceinline__ void store_x(int k, int token, const uint4 (&in)[8],
                                          uint32_t& largest) const {
    auto* x_sums =
        reinterpret_cast<float*>(shared + at.x_sums) + (k - k0) / Shape::kGroup * TOK + token;
    auto* x =
        reinterpret_cast<uint4*>(shared + at.x) + ((k - k0) / 32 * TOK + token) * 4 + lane % 4;
#pragma unroll
    for (int t = 0; t < 8 && t < TOK; t++) {
      const uint32_t v[4] = {in[t].x, in[t].y, in[t].z, in[t].w};
      if constexpr (Shape::kAffine) {
        float sum = 0.0f;
#pragma unroll
        for (int q = 0; q < 4; q++) {
          const float low = H::low(v[q]), high = H::high(v[q]);
          largest = max(largest, __float_as_uint(fabsf(low)));  // bits: NaN is largest
          largest = max(largest, __float_as_uint(fabsf(high)));
          sum += low + high;
        }
#pragma unroll
        for (int other = 1; other < Shape::kGroup / 8; other *= 2)
          sum += __shfl_xor_sync(0xffffffffu, sum, other);
        if (lane % (Shape::kGroup / 8) == 0) x_sums[t] = sum;
      }
      uint32_t out[4];
#pragma unroll
      for (int p = 0; p < 4; p++) {
        const int even = Codes::order(2 * p), odd = Codes::order(2 * p + 1);
        out[p] = __byte_perm(v[even / 2], v[odd / 2],
                             (even % 2 ? 0x32 : 0x10) | (odd % 2 ? 0x7600 : 0x5400));
      }
      x[t * 4] = make_uint4(out[0], out[1], out[2], out[3]);
    }
  }
};

}  // namespace lowbit::cuda
