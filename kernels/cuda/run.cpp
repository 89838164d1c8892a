// A product as its plan says: what goes before the kernel, and which kernel.
#include "kernels.h"
#include "matvec_rules.h"

namespace lowbit::cuda {

namespace {

// Q(x) of bfloat16 x, decoded: without the factor of the global scale, which stays with the
// product.
const void* quantized_x(const Product& p, Queue& queue) {
  const int64_t elements = p.x_matrices * p.M * p.K;
  void* x = queue.scratch(size_t(elements) * 2);
  round_trip(p.format, p.x, elements / kFormats[int(p.format)].group_size, p.global_x, x,
             queue);
  return x;
}

}  // namespace

void run(const Product& asked, Queue& queue) {
  Product p = asked;
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
  // matvec may do it as it stages x; simt does, as it reads x.
  const bool staged =
      plan.kernel == Plan::Kernel::matvec && !p.rhs && matvec_quantizes(p.format);
  if (p.quantize_x && plan.kernel != Plan::Kernel::simt && !staged) {
    p.x = quantized_x(p, queue);
    p.quantize_x = false;
  }
  // Tensor copies need addresses that only a slice of another array can lack; x of pairs is
  // copied.
  const auto addresses = (p.rhs ? 0 : uintptr_t(p.x)) | uintptr_t(p.w.codes);
  const auto scales = uintptr_t(p.w.scales) | uintptr_t(p.w.biases);
  if (plan.kernel == Plan::Kernel::skinny && (addresses | scales) % 16 != 0)
    plan = plan_without_skinny(problem, queue.device());
  if (plan.kernel == Plan::Kernel::matmul && addresses % 16 != 0)
    plan = {Plan::Kernel::simt, 0, 0, 0, 0};
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
