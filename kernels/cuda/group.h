// Rows of x by the matrix of w that they meet: what a gathered product computes on the device
// before matvec or matmul, so that each matrix is read once for all of its rows.
#pragma once

#include "kernels.h"

namespace lowbit::cuda {

// Sorted rows [first, first + count) meet `matrix`.
struct RowTile {
  int matrix, first, count, unused;
};

// Row s of the sorted ones is row x_rows[s] of x [x_matrices * M, K] and row y_rows[s] of y
// [pairs * M, N]. All pointers are to the device.
struct Grouping {
  RowTile* tiles;
  const int* tile_count;
  int *x_rows, *y_rows;
  const int*
      in_order;    // not zero: all rows exist, x_rows[s] = y_rows[s] = s, and reads_in_place
  int most_tiles;  // at most so many, as the host knows it
};

// Whether kernels that read x in tiles could read it where it is.
inline bool reads_in_place(const Product& p) {
  return (reinterpret_cast<uintptr_t>(p.x) | uint64_t(2 * p.K)) % 16 == 0;
}

// The rows of all pairs whose indices exist, in tiles of at most `room`. Rows of other pairs
// become NaN in y.
Grouping group_rows(const Product&, int room, Queue&);

// [rows, K] of two bytes each in sorted order: a copy of x, for kernels that read x in tiles.
// Where rows are in order already nothing is copied: they read x itself.
const void* sorted_x(const Product&, const Grouping&, Queue&);

}  // namespace lowbit::cuda
