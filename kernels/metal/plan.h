// From a problem to how it runs on an Apple GPU: pure, printable, tested without a device.
#pragma once

#include <string>
#include <vector>

#include "../host/problem.h"

namespace lowbit::metal {

enum class Kernel : int {
  matvec,      // weights read once, codes meet x in float32
  matmul,      // simdgroup_matrix, weights decoded in registers
  vecmat,      // w is [K, N]: rows of w added up
  quantize,    // the rest go over elements and have no plan
  dequantize,  //
  round_trip,  // of x, for quantized activations
  group,       // rows of pairs sorted by matrix
};
inline constexpr int kKernels = int(Kernel::group) + 1;

// What a plan may know of a device.
struct Device {
  // Ends the name of its architecture, "applegpu_g16s": p phones, g the plain chip, s and c two
  // to four times its cores, d eight times.
  char size;
};

struct Plan {
  Kernel kernel;   // matvec, matmul or vecmat
  int tokens;      // rows of x in a tile
  int simdgroups;  // of a threadgroup, at most: a compiled kernel may take fewer
  bool grouped;    // rows of pairs are sorted by matrix first
};

// Rows of w (vecmat: columns) that one simdgroup takes.
constexpr int rows_of_simdgroup(const Plan& plan) {
  if (plan.kernel == Kernel::matmul) return plan.tokens > 64 ? 16 : 32;
  return plan.kernel == Kernel::matvec ? 4 : 32 * 32;
}

// Rows of all pairs can be sorted by at most so many matrices (group.h).
inline constexpr int kMostMatrices = 1023;

// The sizes of tiles that a plan may choose, as kernels are instantiated; {0} for those that
// have none.
std::vector<int> tiles(Kernel);

Plan plan(const Problem&, const Device&);
// Matrices as [K, N] without pairs are decoded for MLX's matmul.
Route route(const Problem&);
std::string describe(const Problem&, const Plan&, const Device&);

}  // namespace lowbit::metal
