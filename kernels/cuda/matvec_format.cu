// The matvec kernels of one format: compiled once for each row of formats.def, with its name in
// LOWBIT_FORMAT.
#include <algorithm>

#include "clusters.h"
#include "formats.h"
#include "matvec.h"

namespace lowbit::cuda {

namespace {

template <class F, class T, int TOK, bool split>
void launch(const Product& p, const Plan& plan, Queue& queue) {
  using Shape = MatvecShape<F, T, TOK>;
  MatvecArgs a{};
  a.codes = p.w.codes;
  a.scales = static_cast<const uint8_t*>(p.w.scales);
  a.biases = static_cast<const uint8_t*>(p.w.biases);
  a.x = p.x;
  a.y = p.y;
  a.bias = p.bias;
  a.bias_is_f32 = p.bias_dtype == Dtype::f32;
  a.global_x = p.global_x;
  a.global_w = p.global_w;
  a.row_bytes = p.w.row_bytes;
  a.N = int(p.N), a.K = int(p.K), a.M = int(p.M);
  a.x_aligned = reinterpret_cast<uintptr_t>(p.x) % 16 == 0;
  const int64_t scale_row = p.K / Shape::kGroup * Shape::kScaleSize;
  const auto piece = [](const void* p, int64_t row) {
    return aligned(p, row, 16) ? 16 : aligned(p, row, 4) ? 4 : 1;
  };
  a.codes_piece = piece(p.w.codes, p.w.row_bytes);
  a.scales_piece = std::min(piece(p.w.scales, scale_row), piece(p.w.biases, scale_row));
  const MatvecSizes& sizes = Shape::kSizes;
  const Device& device = queue.device();
  a.part = int(sizes.part(p.K, plan.split_k));
  const int parts = (a.K + a.part - 1) / a.part;
  const int all = int((p.N + Shape::kRows - 1) / Shape::kRows);
  const int at_once = most_clusters(matvec_kernel<F, T, TOK, split>, Shape::kThreads,
                                    device.shared_bytes, parts, device.processors);
  const int teams = a.teams = at_once < all ? at_once : all;
  a.tiles = all / teams, a.more_tiles = all % teams;
  a.at = sizes.layout(a.part, split ? (all + teams - 1) / teams : 0, device.shared_bytes);
  queue.run(matvec_kernel<F, T, TOK, split>, dim3(teams * parts), dim3(Shape::kThreads),
            size_t(a.at.bytes), parts, a);
}

template <class F, class T, int TOK>
void launch(const Product& p, const Plan& plan, Queue& queue) {
  if (plan.split_k > 1)
    launch<F, T, TOK, true>(p, plan, queue);
  else
    launch<F, T, TOK, false>(p, plan, queue);
}

template <class F, class T>
void launch(const Product& p, const Plan& plan, Queue& queue) {
  if (plan.tokens <= 1)
    launch<F, T, 1>(p, plan, queue);
  else if (plan.tokens <= 4)
    launch<F, T, 4>(p, plan, queue);
  else if (plan.tokens <= 8)
    launch<F, T, 8>(p, plan, queue);
  else
    launch<F, T, 16>(p, plan, queue);
}

}  // namespace

template <>
void matvec_format<Format::LOWBIT_FORMAT>(const Product& p, const Plan& plan, Queue& queue) {
  using F = TypeOf<Format::LOWBIT_FORMAT>::type;
  if (p.dtype == Dtype::bf16)
    launch<F, bf16>(p, plan, queue);
  else
    launch<F, f16>(p, plan, queue);
}

}  // namespace lowbit::cuda
