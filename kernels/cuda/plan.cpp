#include "plan.h"

#include <sstream>

#include "matmul_rules.h"
#include "matvec_rules.h"
#include "skinny_rules.h"

namespace lowbit::cuda {

namespace {

// qqmm of bfloat16: Q(x) is exact in bfloat16 and takes x's place, in a pass of its own.
Problem after_quantizing(Problem p) {
  if (p.dtype == Dtype::bf16) p.quantize_x = false;
  return p;
}

// matvec reads a matrix once for 8 rows of x: with some more on average, few have a second
// turn.
Plan gather_plan(const Problem& p, const Device& device) {
  const int64_t rows = p.pairs * p.M;
  const bool few = rows <= 10 * p.matrices;
  const bool matvec = matvec_gather_supports(p, device);
  if (gather_matmul_supports(p, device, rows, p.matrices) && !(matvec && few))
    return gather_matmul_plan(p, device, rows, p.matrices);
  return matvec ? matvec_gather_plan(p, device) : Plan{Plan::Kernel::simt, 0, 0, 0, 0};
}

}  // namespace

Plan plan(const Problem& asked, const Device& device) {
  const Problem p = after_quantizing(asked);
  if (skinny_supports(p, device) && skinny_preferred(asked, device))
    return skinny_plan(p, device);
  return plan_without_skinny(asked, device);
}

Plan plan_without_skinny(const Problem& asked, const Device& device) {
  const Problem p = after_quantizing(asked);
  if (p.gather) return gather_plan(p, device);
  const bool matmul = matmul_supports(p, device);
  if (matvec_supports(p, device) && !(matmul && matmul_preferred(asked)))
    return matvec_plan(p, device);
  if (matmul) return matmul_plan(p, device);
  return {Plan::Kernel::simt, 0, 0, 0, 0};
}

Route route(const Problem& p, const Device& device) {
  if (p.dtype == Dtype::f32 || p.gather || p.format == Format::dense) return Route::kernel;
  if (p.transpose && p.M <= 16) return Route::kernel;
  if (p.quantize_x && p.dtype != Dtype::bf16) return Route::kernel;
  // A global scale moves whole tensors below what float16 holds.
  if (p.dtype == Dtype::f16 && p.format == Format::nvfp4) return Route::kernel;
  if (plan(p, device).kernel != Plan::Kernel::simt) return Route::kernel;
  const bool vectors = p.K % 128 == 0 && p.N % 16 == 0;
  return p.quantize_x && device.capability >= 100 && vectors ? Route::scaled : Route::decoded;
}

std::string describe(const Problem& p, const Plan& plan, const Device& device) {
  std::ostringstream text;
  switch (plan.kernel) {
    case Plan::Kernel::matvec:
    case Plan::Kernel::skinny: {
      const bool skinny = plan.kernel == Plan::Kernel::skinny;
      text << "cuda " << (skinny ? "skinny" : "matvec") << ", mma.sync from the stored layout ("
           << name(p.dtype) << " in, float32 sums), weights read once, " << plan.tokens
           << " tokens x " << plan.rows << " rows of w a " << (skinny ? "block" : "tile")
           << ", ring of " << plan.stages << " stages";
      break;
    }
    case Plan::Kernel::matmul:
      text << "cuda matmul, wgmma with weights decoded in registers (" << name(p.dtype)
           << " in, float32 sums), " << plan.tokens << " tokens x " << plan.rows
           << " rows of w a tile";
      break;
    case Plan::Kernel::simt:
      switch (route(p, device)) {
        case Route::kernel:
          text << "cuda simt, float32 arithmetic";
          break;
        case Route::decoded:
          text << (p.quantize_x ? "x quantized, it and " : "") << "weights decoded to "
               << name(p.dtype) << ", then MLX's matmul";
          break;
        case Route::scaled:
          text << "x quantized, then MLX's product of block-scaled operands (cuBLASLt)";
      }
      break;
  }
  if (p.quantize_x && plan.kernel != Plan::Kernel::simt) text << ", after quantizing x";
  if (p.gather && plan.kernel != Plan::Kernel::simt) {
    const bool one_by_one =
        plan.kernel == Plan::Kernel::matvec && matvec_pair_by_pair(p.M, p.pairs);
    text << (one_by_one ? ", pair by pair" : ", rows of x sorted by matrix first");
  }
  if (plan.kernel == Plan::Kernel::matmul && clusters_of_tile(plan.split_k) == 2)
    text << ", K split over two clusters of " << plan.split_k / 2 << " blocks";
  else if (plan.split_k > 1)
    text << ", K split over clusters of " << plan.split_k << " blocks";
  text << ", compute capability " << device.capability / 10 << "." << device.capability % 10;
  return text.str();
}

}  // namespace lowbit::cuda
