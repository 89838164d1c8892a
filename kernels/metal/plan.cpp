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

// Weights are rounded to x's type, or to float32 where float16 would not hold the powers of two
// of e8m0; x staged in float32 leaves room for 32 tokens.
bool staged_in_float32(Format format, Dtype dtype) {
  const FormatInfo& f = kFormats[int(format)];
  return dtype == Dtype::f32 || (dtype == Dtype::f16 && !f.affine() && f.group_size == 32);
}

int tile_for(int64_t rows, const std::vector<int>& tiles) {
  for (int tokens : tiles)
    if (rows <= tokens) return tokens;
  return tiles.back();
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// As many as share a staged x, unless that leaves cores without work.
int simdgroups_for(int64_t N, int64_t token_tiles, char size) {
  int simdgroups = kMatmulSimdgroups;
  while (simdgroups > 1 && ceil_div(N, 32 * simdgroups) * token_tiles < cores(size))
    simdgroups /= 2;
  return simdgroups;
}

}  // namespace

std::vector<int> tiles(Kernel kernel, Format format, Dtype dtype) {
  switch (kernel) {
    case Kernel::matvec:
      return {1, 2, 4, 8};
    case Kernel::matmul:
      if (staged_in_float32(format, dtype)) return {8, 16, 32};
      return {8, 16, 32, 64};
    case Kernel::vecmat:
      return {2};
    default:
      return {0};
  }
}

Plan plan(const Problem& p, const Device& device) {
  // Q(x) is exact in bfloat16 and takes x's place.
  const Dtype dtype = p.quantize_x ? Dtype::bf16 : p.dtype;
  if (!p.transpose)
    return {Kernel::vecmat, tiles(Kernel::vecmat, p.format, dtype)[0], kVecmatSimdgroups,
            false};
  const auto of_matvec = tiles(Kernel::matvec, p.format, dtype);
  const auto of_matmul = tiles(Kernel::matmul, p.format, dtype);
  const int most = dtype == Dtype::f32 ? kMatvecRowsFloat32 : kMatvecRows;
  if (p.gather) {
    const int64_t rows = p.pairs * p.M;
    if (p.matrices > kMostMatrices || rows <= kFewRows * p.matrices)
      return {Kernel::matvec, tile_for(p.M, of_matvec), kMatvecSimdgroups, false};
    const int64_t average = ceil_div(rows, p.matrices);
    const int tokens = tile_for(average, of_matmul);
    return {Kernel::matmul, tokens, simdgroups_for(p.N, ceil_div(rows, tokens), device.size),
            true};
  }
  if (p.M <= most) return {Kernel::matvec, tile_for(p.M, of_matvec), kMatvecSimdgroups, false};
  const int tokens = tile_for(p.M, of_matmul);
  return {Kernel::matmul, tokens, simdgroups_for(p.N, ceil_div(p.M, tokens), device.size),
          false};
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
  text << ", " << plan.tokens << " tokens x "
       << plan.simdgroups * rows_of_simdgroup(plan.kernel) << " rows of w a threadgroup";
  if (p.quantize_x) text << ", after quantizing x";
  if (p.gather)
    text << (plan.grouped ? ", rows of x sorted by matrix first" : ", pair by pair");
  text << ", architecture " << device.size << " (never measured)";
  return text.str();
}

}  // namespace lowbit::metal
