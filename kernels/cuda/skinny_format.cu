// The skinny kernels of one format: compiled once for each row of formats.def, with its name in
// LOWBIT_FORMAT.
#include "clusters.h"
#include "formats.h"
#include "skinny_kernel.cuh"

namespace lowbit::cuda {

namespace {

template <class F, class T, int TOK>
void launch(const Product& p, const Plan& plan, Queue& queue) {
  constexpr SkinnySizes sizes{F::kBits, F::kGroup, F::kHasBias, TOK};
  const Device& device = queue.device();
  SkinnyArgs a{};
  a.at = sizes.layout(plan.rows / SkinnySizes::kRows, p.K, device.shared_bytes);
  a.N = int(p.N), a.K = int(p.K), a.M = int(p.M);
  const auto up = [](int64_t n, int64_t by) { return int((n + by - 1) / by); };
  const int stage_k = a.at.parts * SkinnySizes::kChunk, rows = a.at.tiles * SkinnySizes::kRows;
  a.padded = up(p.K, stage_k) * stage_k;
  a.spans_k = up(a.padded, a.at.span_k) * a.at.span_k;
  a.stage_bytes = uint32_t(sizes.code_bytes(rows, a.at.parts) + p.M * stage_k * 2);
  a.groups = up(p.N, rows);
  if constexpr (sizes.whole_rows())
    a.code_map = tensor_map(p.w.codes, 2, p.N, p.w.row_bytes / 2, p.w.row_bytes, rows,
                            a.at.code_row / 2, 0);
  else
    a.code_map = block_map(p.w.codes, 1, p.N, p.w.row_bytes, p.w.row_bytes, rows,
                           sizes.box_row(), stage_k / sizes.box_codes(), 1, 128);
  const auto scale_map = [&](const void* from) {
    const int64_t groups = p.K / F::kGroup;
    return tensor_map(from, sizes.scale_size(), p.N, groups, groups * sizes.scale_size(), rows,
                      a.at.span_k / F::kGroup, a.at.scale_row);
  };
  a.scale_map = scale_map(p.w.scales);
  a.bias_map = F::kHasBias ? scale_map(p.w.biases) : a.scale_map;
  a.x_map = block_map(p.x, 2, p.M, p.K, 2 * p.K, a.M, 64, a.at.parts, 2, 128);
  a.codes = p.w.codes, a.row_bytes = p.w.row_bytes;
  a.scales = static_cast<const uint8_t*>(p.w.scales);
  a.biases = static_cast<const uint8_t*>(p.w.biases);
  a.x = p.x, a.y = p.y;
  a.bias = p.bias, a.bias_is_f32 = p.bias_dtype == Dtype::f32;
  a.global_x = p.global_x, a.global_w = p.global_w;
  a.y_quads = aligned(p.y, 2 * p.N, 8);
  const int blocks = a.groups < device.processors ? a.groups : device.processors;
  queue.run(skinny_kernel<F, T, TOK>, dim3(unsigned(blocks)),
            dim3(unsigned(SkinnySizes::threads(a.at))), size_t(a.at.bytes), 1, a);
}

template <class F, class T>
void launch(const Product& p, const Plan& plan, Queue& queue) {
  if (plan.tokens == 8) return launch<F, T, 8>(p, plan, queue);
  if (plan.tokens == 16) return launch<F, T, 16>(p, plan, queue);
  launch<F, T, 32>(p, plan, queue);
}

}  // namespace

template <>
void skinny_format<Format::LOWBIT_FORMAT>(const Product& p, const Plan& plan, Queue& queue) {
  using F = TypeOf<Format::LOWBIT_FORMAT>::type;
  if constexpr (skinny_takes_bits(F::kBits)) {
    if (p.dtype == Dtype::bf16) return launch<F, bf16>(p, plan, queue);
    if constexpr (F::kHasBias || std::is_same_v<F, Nvfp4>) launch<F, f16>(p, plan, queue);
  }
}

}  // namespace lowbit::cuda
