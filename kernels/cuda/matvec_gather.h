// matvec for pairs of rows of x and matrices of w: mixtures of experts, few tokens. The tiles
// of all matrices that are hit are one line, which blocks share evenly; a block goes through
// its part in runs of tiles of one matrix and one tile of rows, and stages the run's rows of x
// while its ring fills on.
#pragma once

#include "matvec.h"

namespace lowbit::cuda {

// The run that begins at tile `at` of the line, and goes no further than `end`.
__device__ __forceinline__ MatvecRun run_at(const MatvecArgs& a, int64_t at, int64_t end) {
  const int64_t rows = at / a.tiles;
  MatvecRun run{};
  run.first_tile = int(at % a.tiles);
  run.tiles = int(min(int64_t(a.tiles - run.first_tile), end - at));
  if (a.list) {
    const RowTile tile = a.list[rows];
    run.matrix = tile.matrix, run.rows = tile.first, run.tokens = tile.count;
  } else {
    const int64_t x = a.lhs[rows], w = a.rhs[rows];
    const bool exists = x >= 0 && x < a.x_matrices && w >= 0 && w < a.matrices;
    run.matrix = exists ? int(w) : -1, run.rows = int(rows), run.tokens = a.M;
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
  const int64_t all = (a.list ? *a.list_count : a.pairs) * int64_t(a.tiles);
  const int64_t begin = all * blockIdx.x / gridDim.x, end = all * (blockIdx.x + 1) / gridDim.x;
  const auto block_of = [&](const MatvecRun& run) {
    return Block{{a, a.at, shared, shared_address(shared), warp, lane, lane / 4, lane % 4, 0,
                  a.K, run, LaneAt<F::kBits>(lane % 4)}};
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
    each_run([&](const Block& block, auto& at) {
      block.template multiply_run<false, false>(at, first);
      first = false;
    });
  }
}

}  // namespace lowbit::cuda
