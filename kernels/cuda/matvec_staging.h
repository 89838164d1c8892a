// How matvec's operands reach shared memory: a ring of rows of W, which one warp fills, and x
// in the order of the fragments.
#pragma once

#include "encode.cuh"
#include "group.cuh"
#include "kernels.h"
#include "load.h"
#include "matvec_rules.h"
#include "one_weight.cuh"
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
  int part;                       // of K, for each block of a cluster
  int teams, tiles, more_tiles;   // clusters; tiles of each, the first `more_tiles` one more
  int codes_piece, scales_piece;  // bytes that rows are multiples of and aligned to: 16, 4, 1
  bool bias_is_f32;               // else of x's type
  bool x_aligned;                 // to 16 bytes
  // Gathered products: rows of x in tiles of up to TOK, or where `list` is null those of a
  // pair. `tiles` are then those of a matrix. list_stride: not zero where each block makes a
  // list of its own.
  GatheredRows gathered;
  RowTile* list;
  const int* list_count;
  int *x_rows, *y_rows;
  int list_stride;
  int global_w_count;
};

// What a block multiplies in a row: tiles of W, and rows of x that meet them.
struct MatvecRun {
  int first_tile, tiles, tokens;
  // Gathered: which matrix of w, negative where the indices do not exist and y becomes NaN; the
  // first of the sorted rows, or which pair. Few words: they stay in registers all along.
  int matrix, rows;
};

// MatvecSizes as constants.
template <class F, class T, int TOK>
struct MatvecShape {
  static constexpr MatvecSizes kSizes{F::kBits, F::kGroup, F::kHasBias, TOK};
  static constexpr bool kInteger = kSizes.integer();
  static constexpr int kTokenTiles = TOK > 8 ? TOK / 8 : 1;
  static constexpr int kColumnTiles = !kInteger  ? kTokenTiles
                                      : TOK == 1 ? 1
                                                 : (3 * TOK + 7) / 8;
  static constexpr int kWarps = kSizes.kWarps, kWorkers = 32 * kWarps;
  static constexpr int kMostTeams = kSizes.most_teams();
  static constexpr int kCopyWarps = kSizes.kCopyWarps;
  static constexpr int kThreads = kWorkers + 32 * kCopyWarps;
  static constexpr int kSlice = kSizes.kSlice, kRows = kSizes.kRows;
  static constexpr int kJoin = kSizes.join();
  static constexpr int kSliceCodes = kSlice * F::kBits / 8,
                       kSliceScales = kSizes.slice_scales();
  static constexpr int kGroup = F::kGroup, kSpan = kSizes.span();
  static constexpr bool kAffine = F::kHasBias, kFolded = kSizes.folded();
  static constexpr bool kE4m3 = kSizes.e4m3(), kInPlace = kSizes.in_place();
  static constexpr bool kAhead = kSizes.reads_ahead();
  static constexpr int kScaleSize = kSizes.scale_size();
  // Fewer than 8 tokens leave columns of the accumulators free: the groups of `kSlots` spans
  // take turns in them, and scales are applied once for all of these.
  static constexpr int kInSpan = kGroup < kSpan && !kFolded ? kSpan / kGroup : 1;
  static constexpr int kFree = TOK >= 8 ? 1 : 8 / TOK, kInSlice = kSlice / kSpan;
  static constexpr int kSlots = kInteger                     ? (TOK == 1 ? 2 : 1)
                                : kFolded                    ? 1
                                : kFree / kInSpan < kInSlice ? kFree / kInSpan
                                                             : kInSlice;
  static constexpr int kFlush = kSizes.flush(), kTokenSums = kSizes.kTokenSums;
  static constexpr int kRooms = kSizes.rooms();
  static constexpr int kWarpSums = kSizes.warp_sums();
  static constexpr int kZeros = kSizes.zeros();
};

template <class F, class T, int TOK, bool gather>
struct MatvecStaging {
  using Shape = MatvecShape<F, T, TOK>;
  using H = Half<T>;
  static constexpr int kSlice = Shape::kSlice, kRows = Shape::kRows;
  // Barriers: of the warps that multiply, of those that copy, of all when both have begun, and
  // of the first team.
  static constexpr int kBarrier = 1, kCopyBarrier = 2, kBegun = 3, kTeamBarrier = 4;

  const MatvecArgs& a;
  const MatvecSizes::Layout& at;
  char* shared;
  const uint32_t base;
  const int warp, lane, g, c;
  const int k0, k1;  // this block's part of K
  const MatvecRun run;
  const LaneAt<F::kBits, Shape::kJoin> lane_at;

  // Stored row n of this run's matrix among all of them; rows of x and y for a token.
  __device__ __forceinline__ int64_t w_row(int64_t n) const {
    return gather ? int64_t(max(run.matrix, 0)) * a.N + n : n;
  }
  __device__ __forceinline__ int64_t x_row(int token) const {
    if constexpr (!gather) return token;
    if (a.list) return a.x_rows[run.rows + token];
    return run.matrix < 0 ? token : a.gathered.lhs[run.rows] * a.M + token;
  }
  __device__ __forceinline__ int64_t y_row(int token) const {
    if constexpr (!gather) return token;
    return a.list ? a.y_rows[run.rows + token] : int64_t(run.rows) * a.M + token;
  }

  // Where a slice lies in shared memory, for this lane: of rows g and g + 8.
  struct Slice {
    uint32_t codes[2], scales[2], biases[2];
    uint32_t x, x_sums;  // x of this lane's first column, and what is known of its group
  };
  // A place in the ring, and how often the ring was gone through.
  struct Place {
    uint32_t stage, index, round;
  };
  __device__ Place first_place() const { return {base + at.ring, 0, 0}; }
  __device__ __forceinline__ void next_place(Place& p) const {
    p.stage += at.stage;
    if (++p.index == uint32_t(at.stages)) p = {base + at.ring, 0, p.round + 1};
  }
  // Past `count` stages, no more than the ring has.
  __device__ __forceinline__ void skip_places(Place& p, int count) const {
    p.stage += count * at.stage, p.index += count;
    if (p.index < uint32_t(at.stages)) return;
    p.stage -= at.stages * at.stage, p.index -= at.stages, p.round++;
  }
  __device__ uint32_t full(const Place& p) const { return base + 16 * p.index; }
  __device__ uint32_t empty(const Place& p) const { return base + 16 * p.index + 8; }

  // The work of the warps that copy: all stages in order, each when the others have left it.
  // each_run(body): calls body(block, place) for the block of each run.
  template <class EachRun>
  __device__ __forceinline__ void fill_ring(EachRun each_run) const {
#if __CUDA_ARCH__ >= 900
    const bool bulk = a.codes_piece == 16 && a.scales_piece == 16;
#elif __CUDA_ARCH__ >= 800
    const bool bulk = false;
#endif
#if __CUDA_ARCH__ >= 800
    const int mine = __shfl_sync(0xffffffffu, warp - Shape::kWarps, 0);
    // By one thread of each warp: addresses that differ by lane would be gone through in turn,
    // each time with a fence (0.2 us). With 8 rows of x, which take longer to stage than that
    // saves, by one of all: copies that begin sooner are in the way of x (4-bit 4096x14336,
    // M = 8: 12.9 us so, 14.0 otherwise; M = 1: 12.6 and 12.4; H200, 2026-11-28).
    constexpr int kInitialisers = TOK < 8 ? Shape::kCopyWarps : 1;
    if (lane == 0 && mine < kInitialisers) {
      const bool one_team = Shape::kMostTeams == 1 || at.teams == 1;
      const int team_warps = one_team ? Shape::kWarps : Shape::kWarps / Shape::kMostTeams;
#pragma unroll 1
      for (int i = mine; i < at.stages; i += kInitialisers) {
        init_barrier(base + 16 * i, (bulk ? 1 : 32) * Shape::kCopyWarps);
        init_barrier(base + 16 * i + 8, team_warps * kArrivals);
      }
#if __CUDA_ARCH__ >= 900
      publish_barriers();
#endif
    }
    sync_threads<32 * Shape::kCopyWarps>(kCopyBarrier);
    arrive_threads<Shape::kThreads>(kBegun);
#if __CUDA_ARCH__ >= 900
    if (bulk) {
      if (elect_one())
        each_run([&](const auto& block, Place& place) { block.fill_in_bulk(mine, place); });
      return;
    }
#endif
    each_run([&](const auto& block, Place& place) { block.fill_in_pieces(mine, place); });
#endif
  }

#if __CUDA_ARCH__ >= 900
  // By the copy engine: a row of codes, of scales or of biases at a time. One thread of each
  // warp that copies has kMine rows of each tile.
  __device__ __forceinline__ void fill_in_bulk(int mine, Place& place) const {
    constexpr int kMine = kRows / Shape::kCopyWarps;
    const int first = mine * kMine, row_scales = a.K / Shape::kGroup * Shape::kScaleSize;
    const int64_t n0 = w_row(int64_t(run.first_tile) * kRows + first);
    const uint8_t* codes = a.codes + n0 * a.row_bytes + int64_t(k0 / 32) * (4 * F::kBits);
    int64_t scales = n0 * row_scales + k0 / Shape::kGroup * Shape::kScaleSize;
    const int some_codes = at.codes / 32 * (4 * F::kBits);
    const int some_scales = at.codes / Shape::kGroup * Shape::kScaleSize;
    const uint32_t to_codes = first * at.code_row;
    const uint32_t to_scales = kRows * at.code_row + first * at.scale_row;
    const uint32_t to_biases = to_scales + kRows * at.scale_row;
    const int64_t next_codes = kRows * a.row_bytes, next_scales = int64_t(kRows) * row_scales;
    const uint64_t once = read_once();
    int left = a.N - run.first_tile * kRows - first;  // rows
#pragma unroll 1
    for (int tile = 0; tile < run.tiles; tile++) {
      const int rows = max(0, min(kMine, left));
      const uint8_t* from_codes = codes;
      int64_t from_scales = scales;
#pragma unroll 1
      for (int k = k0; k < k1; k += at.codes) {
        const bool whole = k1 - k >= at.codes;
        const int bytes = whole ? some_codes : (k1 - k) / 32 * (4 * F::kBits);
        const int scale_bytes =
            whole ? some_scales : (k1 - k) / Shape::kGroup * Shape::kScaleSize;
        const uint32_t bar = full(place);
        if (place.round > 0) wait_phase(empty(place), (place.round - 1) & 1);
        arrive_expecting(bar, rows * (bytes + (Shape::kAffine ? 2 : 1) * scale_bytes));
#pragma unroll
        for (int i = 0; i < kMine; i++)
          if (i < rows)
            copy_bulk(place.stage + to_codes + i * at.code_row, from_codes + i * a.row_bytes,
                      bytes, bar, once);
#pragma unroll
        for (int i = 0; i < kMine; i++)
          if (i < rows) {
            const int64_t from = from_scales + i * row_scales;
            const uint32_t to = place.stage + i * at.scale_row;
            copy_bulk(to + to_scales, a.scales + from, scale_bytes, bar, once);
            if (Shape::kAffine)
              copy_bulk(to + to_biases, a.biases + from, scale_bytes, bar, once);
          }
        from_codes += some_codes, from_scales += some_scales;
        next_place(place);
      }
      codes += next_codes, scales += next_scales, left -= kRows;
    }
  }
#endif

#if __CUDA_ARCH__ >= 800
  // The same by all threads, in pieces as large as addresses allow: devices before Hopper, and
  // rows that are no multiples of 16 bytes.
  __device__ __forceinline__ void fill_in_pieces(int mine, Place& place) const {
    const int64_t row_scales = int64_t(a.K / Shape::kGroup) * Shape::kScaleSize;
#pragma unroll 1
    for (int tile = run.first_tile; tile < run.first_tile + run.tiles; tile++)
#pragma unroll 1
      for (int k = k0; k < k1; k += at.codes) {
        const int64_t n0 = w_row(int64_t(tile) * kRows);
        const int rows = min(kRows, a.N - tile * kRows), count = min(at.codes, k1 - k);
        const int64_t from = n0 * row_scales + k / Shape::kGroup * Shape::kScaleSize;
        const uint32_t to_scales = place.stage + kRows * at.code_row, bar = full(place);
        if (place.round > 0) wait_phase(empty(place), (place.round - 1) & 1);
        copy_pieces(mine, place.stage, at.code_row,
                    a.codes + n0 * a.row_bytes + int64_t(k / 32) * (4 * F::kBits), a.row_bytes,
                    rows, count / 32 * (4 * F::kBits), a.codes_piece);
#pragma unroll 1
        for (int i = 0; i < (Shape::kAffine ? 2 : 1); i++)
          copy_pieces(mine, to_scales + i * kRows * at.scale_row, at.scale_row,
                      (i ? a.biases : a.scales) + from, row_scales, rows,
                      count / Shape::kGroup * Shape::kScaleSize, a.scales_piece);
        if (a.codes_piece == 1 ||
            a.scales_piece == 1) {  // stored, not copied: arrives for these as well
          wait_for_copies();
          arrive(bar);
        } else {
          arrive_after_copies(bar);
        }
        next_place(place);
      }
  }
  // `bytes` of each of some rows.
  __device__ __forceinline__ void copy_pieces(int mine, uint32_t to, int to_row,
                                              const uint8_t* from, int64_t from_row, int rows,
                                              int bytes, int piece) const {
#pragma unroll 1
    for (int r = mine; r < rows; r += Shape::kCopyWarps)
#pragma unroll 1
      for (int i = lane * piece; i < bytes; i += 32 * piece) {
        const uint32_t there = to + r * to_row + i;
        const uint8_t* here = from + r * from_row + i;
        if (piece == 16)
          copy_async<16>(there, here);
        else if (piece == 4)
          copy_async<4>(there, here);
        else
          shared[there - base] = char(*here);
      }
  }
#endif

  // x in pieces of 8 elements a lane: kTogether tokens from `token` on, of kBatch slices. Each
  // slice is text that no cache has yet: with 8 of them 4-bit 4096x4096 takes 6.86 us at M = 1,
  // with 2 and barriers initialised by four warps 6.37 (H200, 2026-11-28).
  static constexpr int kTogether = TOK < 8 ? TOK : 8, kBatch = TOK < 8 ? 2 : 1;
  static constexpr int kStride = kSlice * Shape::kWarps;  // from one slice to the next
  // From k on, zero outside.
  __device__ __forceinline__ void load_x(int k, int token,
                                         uint4 (&v)[kBatch][kTogether]) const {
#pragma unroll
    for (int b = 0; b < kBatch; b++)
#pragma unroll
      for (int t = 0; t < kTogether; t++) {
        v[b][t] = make_uint4(0, 0, 0, 0);
        if (k + b * kStride >= k1 || token + t >= run.tokens) continue;
        const T* from = static_cast<const T*>(a.x) + x_row(token + t) * a.K + k + b * kStride;
        if (a.x_aligned) {
          v[b][t] = __ldg(reinterpret_cast<const uint4*>(from));
        } else {
          const auto* h = reinterpret_cast<const uint16_t*>(from);
          v[b][t] = make_uint4(h[0] | h[1] << 16, h[2] | h[3] << 16, h[4] | h[5] << 16,
                               h[6] | h[7] << 16);
        }
      }
  }
  // Q(x) in x's place, in bfloat16: exact, but for the factor of the global scale, which is
  // applied to y. Of formats that matvec_quantizes.
  __device__ __forceinline__ void quantize(uint4 (&v)[kBatch][kTogether]) const {
    const float enlarge = enlarge_by(a.global_x);
#pragma unroll
    for (int b = 0; b < kBatch; b++)
#pragma unroll
      for (int t = 0; t < kTogether; t++) {
        uint32_t(&pairs)[4] = reinterpret_cast<uint32_t(&)[4]>(v[b][t]);
        float x[8];
#pragma unroll
        for (int i = 0; i < 8; i++) x[i] = i % 2 ? H::high(pairs[i / 2]) : H::low(pairs[i / 2]);
        round_trip_across<F>(x, enlarge);
#pragma unroll
        for (int i = 0; i < 4; i++) pairs[i] = H::pack(x[2 * i], x[2 * i + 1]);
      }
  }
  // One of them, of groups that lie across the warp.
  __device__ __forceinline__ float quantize(float x) const {
    const float own[1] = {x};
    float some[8] = {x};
    round_trip<F>(some, Block<F>(largest_of<F>(own), enlarge_by(a.global_x)));
    return some[0];
  }
  // Of the 8 codes at k of this lane, when x is staged: their block of 32, and the lane of a
  // quad that takes them.
  __device__ __forceinline__ int block_at(int k) const {
    return Shape::kJoin == 1 ? (k - k0) / 32 : (k - k0) / 64 * 2 + lane % 2;
  }
  __device__ __forceinline__ int taker() const {
    return Shape::kJoin == 1 ? lane % 4 : lane % 8 / 2;
  }
  // Words of scales of a slice, and of the biases.
  template <int n>
  static __device__ __forceinline__ void load_words(uint32_t from, uint32_t (&to)[n]) {
    if constexpr (n == 1) {
      to[0] = load_shared(from);
    } else if constexpr (n == 2) {
      const uint2 v = load_shared2(from);
      to[0] = v.x, to[1] = v.y;
    } else {
      const uint4 v = load_shared4(from);
      to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
    }
  }
};

}  // namespace lowbit::cuda
