// What is asked about a gathered product's rows by whoever sorts them.
#pragma once

#include "group.h"

namespace lowbit::cuda {

struct GatheredRows {
  const int64_t *lhs, *rhs;
  int64_t x_matrices, matrices;
  int M, count;

  // The matrix that row i meets, or -1.
  __device__ __forceinline__ int matrix_of(int i) const {
    const int64_t x = lhs[i / M], w = rhs[i / M];
    return x >= 0 && x < x_matrices && w >= 0 && w < matrices ? int(w) : -1;
  }
  __device__ __forceinline__ int x_row_of(int i) const { return int(lhs[i / M]) * M + i % M; }
};

inline GatheredRows gathered_rows(const Product& p) {
  return {p.lhs, p.rhs, p.x_matrices, p.w.matrices, int(p.M), int(p.pairs * p.M)};
}

// Row i of y, of `bytes`, for indices that do not exist.
__device__ inline void fill_with_nan(void* y, int i, int64_t bytes) {
  auto* row = static_cast<uint8_t*>(y) + i * bytes;  // all bits set are NaN in every type
  for (int64_t n = 0; n < bytes; n++) row[n] = 0xff;
}

// Sum of the values of the threads before this one; total: of all. `room`: a value a warp.
template <int kThreads>
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
  for (int w = 0; w < kThreads / 32; w++) {
    if (w < warp) before += room[w];
    total += room[w];
  }
  return before + sum - value;
}

}  // namespace lowbit::cuda
