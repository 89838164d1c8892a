// x as matmul's warpgroups may read it (matmul_operand.cuh): units of 128 k, in chunks of 8
// that hold two k of each quarter of the unit, and zeros up to whole units.
//
//   chunk 4q + i of a unit   pair i of k = 32c + 8q to 32c + 8q + 7, for c = 0 to 3
#pragma once

#include <cstdint>

#include "pair_order.h"

namespace lowbit::cuda {

constexpr int64_t lane_order_columns(int64_t K) { return (K + 127) / 128 * 128; }

// Which of 8 k that meet codes of `bits` element i of their pairs is.
__host__ __device__ constexpr int lane_pair(int i, int bits) {
  return bits == 8 ? order_of_bytes(i) : order_of_halves(i);
}

// Where k of a row is.
__host__ __device__ constexpr int lane_order_place(int k, int bits) {
  const int element = bits == 8 ? place_of_bytes(k % 8) : place_of_halves(k % 8);
  const int chunk = k % 32 / 8 * 4 + element / 2, quarter = k % 128 / 32;
  return k / 128 * 128 + chunk * 8 + quarter * 2 + element % 2;
}

}  // namespace lowbit::cuda
