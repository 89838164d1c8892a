#include "plan.h"

#include <algorithm>
#include <sstream>

namespace lowbit::metal {

namespace {

// None of these figures is a measurement: no Apple GPU has run the kernels yet. They come from
// counted bytes (python -m benchmarks --metal-counts) and from what MLX's own kernels choose;
// `doctor --tune` is there to correct them.

// Rows of x up to which matvec is taken: beyond, 8x8 products do more a cycle than its float32
// multiply-adds. float32 has no faster products, and keeps to matvec as far as its tiles go.
constexpr int kMatvecRows = 4, kMatvecRowsFloat32 = 8;
// Rows of x a matrix of w on average up to which sorting pairs is not worth it.
constexpr int kFewRows = 2;
constexpr int kMatvecSimdgroups = 2, kVecmatSimdgroups = 2;
// 512 rows of w a threadgroup: the 16 rows of x of a 4096 x 4096 product are then read 8 times,
// which is 1.09 times the bytes of weights, x and y at 4 bits. With 256 rows it is 1.20.
constexpr int kMatmulSimdgroups = 16;

int cores(char size) { return size == 'd' ? 64 : size == 'p' || size == 'g' ? 8 : 32; }

// The smallest that holds all rows. More are cut into 64 or 128, which reads weights half as
// often, unless it would leave half a tile empty.
int tile_for(int64_t rows, const std::vector<int>& tiles) {
  for (int tokens : tiles)
    if (rows <= tokens && tokens <= 64) return tokens;
  const bool half_empty = rows < 512 && (rows - 1) % 128 < 64;
  return half_empty ? std::min(64, tiles.back()) : tiles.back();
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A plan of matmul: as many simdgroups as share a staged x, unless cores were left without
// work.
Plan matmul(int64_t rows_a_matrix, int64_t rows, const Problem& p, const Device& device) {
  Plan plan{Kernel::matmul, tile_for(rows_a_matrix, tiles(Kernel::matmul)), kMatmulSimdgroups,
            p.gather};
  const auto threadgroups = [&] {
    return ceil_div(p.N, rows_of_simdgroup(plan) * plan.simdgroups) *
           ceil_div(rows, plan.tokens);
  };
  while (plan.simdgroups > 1 && threadgroups() < cores(device.size)) plan.simdgroups /= 2;
  return plan;
}

}  // namespace

std::vector<int> tiles(Kernel kernel) {
  switch (kernel) {
    case Kernel::matvec:
      return {1, 2, 4, 8};
    case Kernel::matmul:
      return {8, 16, 32, 64, 128};
    case Kernel::vecmat:
      return {2};
    default:
      return {0};
  }
}

Plan plan(const Problem& p, const Device& device) {
  if (!p.transpose) return {Kernel::vecmat, tiles(Kernel::vecmat)[0], kVecmatSimdgroups, false};
  const Plan matvec{Kernel::matvec, tile_for(p.M, tiles(Kernel::matvec)), kMatvecSimdgroups,
                    false};
  if (p.gather) {
    const int64_t rows = p.pairs * p.M;
    const bool few = rows <= kFewRows * p.matrices;
    if (p.matrices > kMostMatrices || few) return matvec;
    return matmul(ceil_div(rows, p.matrices), rows, p, device);
  }
  const bool float32 = p.dtype == Dtype::f32 && !p.quantize_x;  // Q(x) is bfloat16
  const int most = float32 ? kMatvecRowsFloat32 : kMatvecRows;
  return p.M <= most ? matvec : matmul(p.M, p.M, p, device);
}

Route route(const Problem& p) {
  return p.transpose || p.gather ? Route::kernel : Route::decoded;
}

std::string describe(const Problem& p, const Plan& plan, const Device& device) {
  std::ostringstream text;
  if (route(p) == Route::decoded) {
    text << "metal: weights decoded to " << name(p.dtype) << ", then MLX's matmul";
    return text.str();
  }
  switch (plan.kernel) {
    case Kernel::matvec:
      text << "metal matvec, float32 sums, weights read once a tile";
      break;
    case Kernel::matmul:
      text << "metal matmul, simdgroup_matrix with weights decoded in registers (float32 sums)";
      break;
    default:
      text << "metal vecmat, float32 sums";
  }
  text << ", " << plan.tokens << " tokens x " << plan.simdgroups * rows_of_simdgroup(plan)
       << " rows of w a threadgroup";
  if (p.quantize_x) text << ", after quantizing x";
  if (p.gather)
    text << (plan.grouped ? ", rows of x sorted by matrix first" : ", pair by pair");
  text << ", architecture " << device.size << " (never measured)";
  return text.str();
}

}  // namespace lowbit::metal
