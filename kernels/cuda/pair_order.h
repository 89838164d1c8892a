// In which order codes that lie beside each other become pairs of elements where the order of k
// is free.
#pragma once

#include <cuda_runtime.h>

namespace lowbit::cuda {

// Which of 8 codes element i of the four pairs is: pairs are (p, p + 4), or of 8-bit codes
// (0, 2), (1, 3), (4, 6), (5, 7), 16 bits apart, as whole words give them up.
__host__ __device__ constexpr int order_of_halves(int i) { return i / 2 + i % 2 * 4; }
__host__ __device__ constexpr int order_of_bytes(int i) {
  return i / 4 * 4 + i % 4 / 2 + i % 2 * 2;
}
// Which element code i is.
__host__ __device__ constexpr int place_of_halves(int i) { return i % 4 * 2 + i / 4; }
__host__ __device__ constexpr int place_of_bytes(int i) { return order_of_bytes(i); }

}  // namespace lowbit::cuda
