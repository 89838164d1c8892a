// matvec for pairs of rows of x and matrices of w: mixtures of experts, few tokens. The tiles
// of all matrices that are hit are one line, which blocks share evenly; a block goes through
// its part in runs of tiles of one matrix and one tile of rows, and stages the run's rows of x
// while its ring fills on.
#pragma once

#include "matvec.h"

namespace lowbit::cuda {

// The rows of a.gathered, at most 512, sorted by their matrices, by this block for itself: its
// list, whose length this returns, and its parts of x_rows and y_rows. All blocks come to the
// same order. `room`: kMatvecSortBytes a matrix, and 128 more.
template <int kThreads, int TOK>
__device__ int sort_rows(const MatvecArgs& a, char* room) {
  constexpr int kSorters = 16;  // warps with a row a lane
  const int thread = int(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const GatheredRows& rows = a.gathered;
  const int matrices = int(rows.matrices), own = int(blockIdx.x);
  RowTile* const list = a.list + int64_t(own) * a.list_stride;
  int* const warp_sums = reinterpret_cast<int*>(room);
  int* const first = warp_sums + 32;  // of a matrix's rows
  // Of each warp, its rows of each matrix; then those of the warps before it.
  auto* const counts = reinterpret_cast<uint16_t*>(first + matrices);
  for (int i = thread; i < kSorters * matrices; i += kThreads) counts[i] = 0;
  __syncthreads();
  int matrix = -1, before = 0;  // rows of the same matrix in the lanes before
  if (warp < kSorters) {
    if (thread < rows.count) matrix = rows.matrix_of(thread);
    const uint32_t same = __match_any_sync(0xffffffffu, matrix);
    before = __popc(same & ((1u << lane) - 1));
    if (matrix >= 0 && before == 0) counts[warp * matrices + matrix] = uint16_t(__popc(same));
  }
  __syncthreads();
  int rows_before = 0, tiles_before = 0;  // of the matrices before these
  for (int from = 0; from < matrices; from += kThreads) {
    const int m = from + thread;
    int count = 0;
    for (int w = 0; w < kSorters && m < matrices; w++) {
      const int of_warp = counts[w * matrices + m];
      counts[w * matrices + m] = uint16_t(count);
      count += of_warp;
    }
    // Rows and tiles in one sum: neither is more than 512.
    const int tiles = (count + TOK - 1) / TOK;
    int all;
    const int sums = sum_before<kThreads>(count << 16 | tiles, warp_sums, all);
    const int start = rows_before + (sums >> 16), tile = tiles_before + (sums & 0xffff);
    for (int t = 0; t < tiles; t++)
      list[tile + t] = {m, own * rows.count + start + t * TOK, min(TOK, count - t * TOK), 0};
    if (m < matrices) first[m] = start;
    rows_before += all >> 16, tiles_before += all & 0xffff;
  }
  __syncthreads();
  if (matrix >= 0) {
    const int at = own * rows.count + first[matrix] + counts[warp * matrices + matrix] + before;
    a.x_rows[at] = rows.x_row_of(thread);
    a.y_rows[at] = thread;
  } else if (own == 0 && thread < rows.count) {
    fill_with_nan(a.y, thread, int64_t(a.N) * 2);
  }
  __syncthreads();
  return tiles_before;
}

// The run that begins at tile `at` of the line, and goes no further than `end`.
__device__ __forceinline__ MatvecRun run_at(const MatvecArgs& a, int64_t at, int64_t end) {
  const int64_t rows = at / a.tiles;
  MatvecRun run{};
  run.first_tile = int(at % a.tiles);
  run.tiles = int(min(int64_t(a.tiles - run.first_tile), end - at));
  if (a.list) {
    const RowTile tile = a.list[int64_t(blockIdx.x) * a.list_stride + rows];
    run.matrix = tile.matrix, run.rows = tile.first, run.tokens = tile.count;
  } else {
    const GatheredRows& pairs = a.gathered;
    run.matrix = pairs.matrix_of(int(rows) * a.M), run.rows = int(rows), run.tokens = a.M;
  }
  return run;
}

template <class F, class T, int TOK>
__global__ void __launch_bounds__(MatvecShape<F, T, TOK>::kThreads, 1)
    matvec_gather_kernel(const __grid_constant__ MatvecArgs a) {
  using Shape = MatvecShape<F, T, TOK>;
  using Block = MatvecBlock<F, T, TOK, true>;
  extern __shared__ __align__(128) char shared[];
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  int lines = a.gathered.count / a.M;  // of tiles
  if (a.list_stride)
    lines = sort_rows<Shape::kThreads, TOK>(a, shared + a.at.x);
  else if (a.list)
    lines = *a.list_count;
  const int64_t all = lines * int64_t(a.tiles);
  const int64_t begin = all * blockIdx.x / gridDim.x, end = all * (blockIdx.x + 1) / gridDim.x;
  const auto block_of = [&](const MatvecRun& run) {
    return Block{{a, a.at, shared, shared_address(shared), warp, lane, lane / 4, lane % 4, 0,
                  a.K, run, LaneAt<F::kBits, Shape::kJoin>(lane % 4)}};
  };
  const Block any = block_of({});
  auto place = any.first_place();
  const auto each_run = [&](auto body) {
#pragma unroll 1
    for (int64_t at = begin; at < end;) {
      const MatvecRun run = run_at(a, at, end);
      body(block_of(run), place);
      at += run.tiles;
    }
  };
  if (warp >= Shape::kWarps) {
    any.fill_ring(each_run);
  } else if (begin == end) {
    sync_threads<Shape::kThreads>(Block::kBegun);
  } else {
    bool first = true;
    float unit = 1.0f;
    int staged = -1;
    each_run([&](const Block& block, auto& at) {
      // One row a run: pairs of the same one, as a token's experts are, find it staged.
      const int row = TOK == 1 ? int(block.x_row(0)) : -1;
      if (TOK > 1 || first || row != staged)
        unit = block.template stage_x<false>(first);
      else
        sync_threads<Shape::kWorkers>(Block::kBarrier);  // sums of the run before are read
      block.multiply(at, unit);
      first = false, staged = row;
    });
  }
}

}  // namespace lowbit::cuda
