// x as matmul's warpgroups may read it (matmul_operand.cuh): units of 128 k, in chunks of 8
// that hold two k of each quarter of the unit, and zeros up to whole units.
//
//   chunk 4q + i of a unit   pair i (pair_order.h) of k = 32c + 8q to 32c + 8q + 7, c = 0 to 3
#pragma once

#include <cstdint>

#include "pair_order.h"

namespace lowbit::cuda {

constexpr int64_t lane_order_columns(int64_t K) { return (K + 127) / 128 * 128; }

// Where k of a row that meets codes of `bits` is.
__host__ __device__ constexpr int lane_order_place(int k, int bits) {
  const int element = pair_place(k % 8, bits);
  const int chunk = k % 32 / 8 * 4 + element / 2, quarter = k % 128 / 32;
  return k / 128 * 128 + chunk * 8 + quarter * 2 + element % 2;
}

}  // namespace lowbit::cuda
