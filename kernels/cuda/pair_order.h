// In which order codes that lie beside each other become pairs of elements where the order of k
// is free: pairs are (p, p + 4), or of 8-bit codes (0, 2), (1, 3), (4, 6), (5, 7), as whole
// words give them up.
#pragma once

#include <cuda_runtime.h>

namespace lowbit::cuda {

// How far the codes of a pair are apart.
__host__ __device__ constexpr int pair_apart(int bits) { return bits == 8 ? 2 : 4; }

// Which of 8 codes element i of the four pairs is.
__host__ __device__ constexpr int pair_order(int i, int bits) {
  const int apart = pair_apart(bits);
  return i / 2 / apart * 2 * apart + i / 2 % apart + i % 2 * apart;
}
// Which element code i is.
__host__ __device__ constexpr int pair_place(int i, int bits) {
  const int apart = pair_apart(bits);
  return i / (2 * apart) * 2 * apart + i % apart * 2 + i / apart % 2;
}

}  // namespace lowbit::cuda
