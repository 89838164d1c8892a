// Counting, offsets and places: one block, since a list of pairs is short beside the products.
#include "group.h"

#include <algorithm>

namespace lowbit::cuda {

namespace {

constexpr int kThreads = 1024, kWarps = kThreads / 32;

struct GroupArgs {
  const int64_t *lhs, *rhs;
  int64_t x_matrices;
  void* y;
  int64_t N;
  int M, rows, matrices, room;
  int y_size;  // bytes of an element
  RowTile* tiles;
  int *tile_count, *x_rows, *y_rows;
};

// The matrix that row i meets, or -1.
__device__ int matrix_of(const GroupArgs& a, int i) {
  const int64_t x = a.lhs[i / a.M], w = a.rhs[i / a.M];
  return x >= 0 && x < a.x_matrices && w >= 0 && w < a.matrices ? int(w) : -1;
}

// Adds one to a count for each lane; what it was before this lane's.
__device__ int count_up(int* counts, int matrix) {
  const uint32_t same = __match_any_sync(__activemask(), matrix);
  const int leader = __ffs(int(same)) - 1, lane = int(threadIdx.x) % 32;
  int before = 0;
  if (lane == leader) before = atomicAdd(&counts[matrix], __popc(same));
  return __shfl_sync(same, before, leader) + __popc(same & ((1u << lane) - 1));
}

// Sum of the values of the threads before this one; total: of all. `room`: kWarps values.
__device__ int sum_before(int value, int* room, int& total) {
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  int sum = value;
  for (int by = 1; by < 32; by *= 2) {
    const int other = __shfl_up_sync(0xffffffffu, sum, by);
    if (lane >= by) sum += other;
  }
  __syncthreads();
  if (lane == 31) room[warp] = sum;
  __syncthreads();
  int before = 0;
  total = 0;
#pragma unroll
  for (int w = 0; w < kWarps; w++) {
    if (w < warp) before += room[w];
    total += room[w];
  }
  return before + sum - value;
}

__global__ void __launch_bounds__(kThreads) group_kernel(GroupArgs a) {
  extern __shared__ int counts[];  // of each matrix; then where its next row goes
  __shared__ int room[kWarps];
  const int thread = int(threadIdx.x);
  for (int i = thread; i < a.matrices; i += kThreads) counts[i] = 0;
  __syncthreads();
  for (int i = thread; i < a.rows; i += kThreads) {
    const int matrix = matrix_of(a, i);
    if (matrix >= 0) count_up(counts, matrix);
  }
  __syncthreads();

  int rows_before = 0, tiles_before = 0;  // of the matrices before these
  for (int from = 0; from < a.matrices; from += kThreads) {
    const int matrix = from + thread, count = matrix < a.matrices ? counts[matrix] : 0;
    const int tiles = (count + a.room - 1) / a.room;
    int all_rows, all_tiles;
    const int first = rows_before + sum_before(count, room, all_rows);
    const int tile = tiles_before + sum_before(tiles, room, all_tiles);
    for (int t = 0; t < tiles; t++)
      a.tiles[tile + t] = {matrix, first + t * a.room, min(a.room, count - t * a.room), 0};
    if (matrix < a.matrices) counts[matrix] = first;
    rows_before += all_rows, tiles_before += all_tiles;
  }
  if (thread == 0) *a.tile_count = tiles_before;
  for (int i = rows_before + thread; i < a.rows; i += kThreads) a.x_rows[i] = a.y_rows[i] = 0;
  __syncthreads();

  for (int i = thread; i < a.rows; i += kThreads) {
    const int matrix = matrix_of(a, i);
    if (matrix >= 0) {
      const int at = count_up(counts, matrix);
      a.x_rows[at] = int(a.lhs[i / a.M]) * a.M + i % a.M;
      a.y_rows[at] = i;
    } else {  // all bits set are NaN in every type
      auto* y = static_cast<uint8_t*>(a.y) + int64_t(i) * a.N * a.y_size;
      for (int64_t n = 0; n < a.N * a.y_size; n++) y[n] = 0xff;
    }
  }
}

// Rows as `Piece`s, a warp a row.
template <class Piece>
__global__ void __launch_bounds__(256)
    copy_rows_kernel(const Piece* from, Piece* to, const int* rows, int count, int pieces) {
  const int lane = int(threadIdx.x) % 32, warps = int(gridDim.x * blockDim.x) / 32;
  for (int s = int(blockIdx.x * blockDim.x + threadIdx.x) / 32; s < count; s += warps) {
    const Piece* row = from + int64_t(rows[s]) * pieces;
    for (int i = lane; i < pieces; i += 32) to[int64_t(s) * pieces + i] = __ldg(row + i);
  }
}

}  // namespace

Grouping group_rows(const Product& p, int room, Queue& queue) {
  const int64_t rows = p.pairs * p.M, matrices = p.w.matrices;
  const int64_t most = rows / room + std::min(rows, matrices);
  auto* tiles = static_cast<RowTile*>(queue.scratch(size_t(most) * sizeof(RowTile)));
  auto* ints = static_cast<int*>(queue.scratch(size_t(2 * rows + 1) * sizeof(int)));
  GroupArgs a{};
  a.lhs = p.lhs, a.rhs = p.rhs, a.x_matrices = p.x_matrices;
  a.y = p.y, a.N = p.N, a.y_size = p.dtype == Dtype::f32 ? 4 : 2;
  a.M = int(p.M), a.rows = int(rows), a.matrices = int(matrices), a.room = room;
  a.tiles = tiles, a.tile_count = ints, a.x_rows = ints + 1, a.y_rows = ints + 1 + rows;
  queue.run(group_kernel, dim3(1), dim3(kThreads), size_t(matrices) * sizeof(int), 1, a);
  return {tiles, a.tile_count, a.x_rows, a.y_rows, int(most)};
}

const void* sorted_x(const Product& p, const Grouping& g, Queue& queue) {
  const int64_t rows = p.pairs * p.M, bytes = p.K * 2;
  void* to = queue.scratch(size_t(rows * bytes));
  const dim3 blocks(unsigned(std::min<int64_t>((rows + 7) / 8, 8 * queue.device().processors)));
  if (bytes % 16 == 0 && reinterpret_cast<uintptr_t>(p.x) % 16 == 0)
    queue.run(copy_rows_kernel<uint4>, blocks, dim3(256), 0, 1, static_cast<const uint4*>(p.x),
              static_cast<uint4*>(to), g.x_rows, int(rows), int(bytes / 16));
  else
    queue.run(copy_rows_kernel<uint16_t>, blocks, dim3(256), 0, 1,
              static_cast<const uint16_t*>(p.x), static_cast<uint16_t*>(to), g.x_rows,
              int(rows), int(p.K));
  return to;
}

}  // namespace lowbit::cuda
