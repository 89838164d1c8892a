// A product as its plan says: what goes before the kernel, and which kernel.
#include "kernels.h"
#include "lane_order.h"
#include "matmul_rules.h"
#include "matvec_rules.h"

namespace lowbit::cuda {

namespace {

// Q(x) of bfloat16 x takes x's place, decoded: without the factor of the global scale, which
// stays with the product.
void quantize_x(Product& p, bool to_lanes, Queue& queue) {
  const int64_t rows = p.x_matrices * p.M;
  const int64_t columns = to_lanes ? lane_order_columns(p.K) : p.K;
  void* x = queue.scratch(size_t(rows * columns) * 2);
  if (to_lanes)
    round_trip_to_lanes(p.format, p.x, rows, p.K, p.global_x, x, queue);
  else
    round_trip(p.format, p.x, rows * p.K / kFormats[int(p.format)].group_size, p.global_x, x,
               queue);
  p.x = x, p.lane_order = to_lanes, p.quantize_x = false;
}

// What plan() says, but for what only addresses tell.
Plan plan_of(const Product& p, const Queue& queue) {
  const Problem problem{p.format,
                        p.dtype,
                        p.dtype,
                        p.M,
                        p.N,
                        p.K,
                        p.transpose,
                        p.quantize_x,
                        p.rhs != nullptr,
                        p.rhs ? p.pairs : 0,
                        p.rhs ? p.w.matrices : 0};
  Plan plan = cuda::plan(problem, queue.device());
  // Tensor copies need addresses that only a slice of another array can lack; x of pairs is
  // copied, and so is x that is quantized before.
  const auto addresses = (p.rhs || p.quantize_x ? 0 : uintptr_t(p.x)) | uintptr_t(p.w.codes);
  const auto scales = uintptr_t(p.w.scales) | uintptr_t(p.w.biases);
  if (plan.kernel == Plan::Kernel::skinny && (addresses | scales) % 16 != 0)
    plan = plan_without_skinny(problem, queue.device());
  if (plan.kernel == Plan::Kernel::matmul && addresses % 16 != 0)
    plan = {Plan::Kernel::simt, 0, 0, 0, 0};
  return plan;
}

}  // namespace

void run(const Product& p, Queue& queue) { run(p, plan_of(p, queue), queue); }

void run(const Product& asked, const Plan& plan, Queue& queue) {
  Product p = asked;
  // matvec may quantize x as it stages it; simt does, as it reads x.
  const bool staged =
      plan.kernel == Plan::Kernel::matvec && !p.rhs && matvec_quantizes(p.format, p.M);
  if (p.quantize_x && plan.kernel != Plan::Kernel::simt && !staged)
    quantize_x(p, plan.kernel == Plan::Kernel::matmul && !p.rhs && matmul_lane_order(p.format),
               queue);
  switch (plan.kernel) {
    case Plan::Kernel::matvec:
      return matvec(p, plan, queue);
    case Plan::Kernel::skinny:
      return skinny(p, plan, queue);
    case Plan::Kernel::matmul:
      return matmul(p, plan, queue);
    case Plan::Kernel::simt:
      return simt(p, plan, queue);
  }
}

}  // namespace lowbit::cuda
