// A product as its plan says: what goes before the kernel, and which kernel.
#include "kernels.h"

namespace lowbit::cuda {

namespace {

// Q(x), decoded: without the factor of the global scale, which stays with the product.
const void* quantized_x(const Product& p, Queue& queue) {
  const FormatInfo& f = kFormats[int(p.format)];
  const int64_t groups = p.M * (p.K / f.group_size);
  Weights q = p.w;
  q.matrices = 1, q.rows = p.M, q.columns = p.K, q.row_bytes = p.K * f.bits / 8;
  auto* codes = static_cast<uint8_t*>(queue.scratch(size_t(p.M * q.row_bytes)));
  void* scales = queue.scratch(size_t(groups));
  void* x = queue.scratch(size_t(p.M * p.K) * 2);
  quantize(p.format, p.x, p.dtype, groups, p.global_x, codes, scales, nullptr, queue);
  q.codes = codes, q.scales = scales, q.biases = nullptr;
  dequantize(p.format, q, nullptr, x, p.dtype, queue);
  return x;
}

}  // namespace

void run(const Product& asked, Queue& queue) {
  Product p = asked;
  Plan plan = cuda::plan(
      {p.format, p.dtype, p.dtype, p.M, p.N, p.K, p.transpose, p.quantize_x, p.rhs != nullptr},
      queue.device());
  if (p.quantize_x && plan.kernel != Plan::Kernel::simt) {
    p.x = quantized_x(p, queue);
    p.quantize_x = false;
  }
  // Tensor copies need addresses that only a slice of another array can lack.
  const auto addresses = uintptr_t(p.x) | uintptr_t(p.w.codes);
  if (plan.kernel == Plan::Kernel::matmul && addresses % 16 != 0)
    plan = {Plan::Kernel::simt, 0, 0, 0, 0};
  switch (plan.kernel) {
    case Plan::Kernel::matvec:
      return matvec(p, plan, queue);
    case Plan::Kernel::matmul:
      return matmul(p, plan, queue);
    case Plan::Kernel::simt:
      return simt(p, plan, queue);
  }
}

}  // namespace lowbit::cuda
