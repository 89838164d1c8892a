// The matvec kernels of one format: compiled once for each row of formats.def, with its name in
// LOWBIT_FORMAT.
#include <algorithm>

#include "clusters.h"
#include "formats.h"
#include "matvec_gather.h"

namespace lowbit::cuda {

namespace {

template <class F, class T, int TOK>
MatvecArgs arguments(const Product& p) {
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
  return a;
}

template <class F, class T, int TOK, bool split, bool qx>
void launch(const Product& p, const Plan& plan, Queue& queue) {
  using Shape = MatvecShape<F, T, TOK>;
  MatvecArgs a = arguments<F, T, TOK>(p);
  const MatvecSizes& sizes = Shape::kSizes;
  const Device& device = queue.device();
  a.part = int(sizes.part(p.K, plan.split_k));
  const int parts = (a.K + a.part - 1) / a.part;
  const int all = int((p.N + Shape::kRows - 1) / Shape::kRows);
  const int at_once = most_clusters(matvec_kernel<F, T, TOK, split, qx>, Shape::kThreads,
                                    device.shared_bytes, parts, device.processors);
  const int teams = a.teams = at_once < all ? at_once : all;
  a.tiles = all / teams, a.more_tiles = all % teams;
  a.at = sizes.layout(a.part, split ? (all + teams - 1) / teams : 0, device.shared_bytes);
  a.at.teams = sizes.teams(a.at, a.tiles);
  queue.run(matvec_kernel<F, T, TOK, split, qx>, dim3(teams * parts), dim3(Shape::kThreads),
            size_t(a.at.bytes), parts, a);
}

template <class F, class T, int TOK>
void launch_gather(const Product& p, Queue& queue) {
  using Shape = MatvecShape<F, T, TOK>;
  MatvecArgs a = arguments<F, T, TOK>(p);
  const Device& device = queue.device();
  a.gathered = gathered_rows(p);
  a.global_w_count = int(p.global_w_count);
  a.part = a.K;
  a.tiles = int((p.N + Shape::kRows - 1) / Shape::kRows);
  a.at = Shape::kSizes.layout(a.part, 0, device.shared_bytes, true);
  const int blocks = device.processors, rows = a.gathered.count;
  a.at.teams = Shape::kSizes.teams(a.at, int64_t(rows) * a.tiles / blocks);
  if (matvec_pair_by_pair(p.M, p.pairs)) {
    // No list.
  } else if (matvec_sorts(a.at, rows, p.w.matrices)) {
    a.list_stride = rows / TOK + int(std::min<int64_t>(rows, p.w.matrices));
    a.list = static_cast<RowTile*>(
        queue.scratch(size_t(blocks) * size_t(a.list_stride) * sizeof(RowTile)));
    a.x_rows = static_cast<int*>(queue.scratch(size_t(2 * blocks) * size_t(rows) * 4));
    a.y_rows = a.x_rows + blocks * rows;
  } else {
    const Grouping g = group_rows(p, TOK, queue);
    a.list = g.tiles, a.list_count = g.tile_count, a.x_rows = g.x_rows, a.y_rows = g.y_rows;
  }
  queue.run(matvec_gather_kernel<F, T, TOK>, dim3(unsigned(blocks)), dim3(Shape::kThreads),
            size_t(a.at.bytes), 1, a);
}

template <class F, class T, int TOK, bool qx>
void launch(const Product& p, const Plan& plan, Queue& queue) {
  if (plan.split_k > 1)
    launch<F, T, TOK, true, qx>(p, plan, queue);
  else
    launch<F, T, TOK, false, qx>(p, plan, queue);
}

template <class F, class T, int TOK>
void launch(const Product& p, const Plan& plan, Queue& queue) {
  if constexpr (matvec_quantizes(Format::LOWBIT_FORMAT, TOK) && std::is_same_v<T, bf16>)
    if (p.quantize_x) return launch<F, T, TOK, true>(p, plan, queue);
  launch<F, T, TOK, false>(p, plan, queue);
}

template <class F, class T>
void launch(const Product& p, const Plan& plan, Queue& queue) {
  if (p.rhs && plan.tokens <= 1)
    launch_gather<F, T, 1>(p, queue);
  else if (p.rhs && plan.tokens <= 4)
    launch_gather<F, T, 4>(p, queue);
  else if (p.rhs)
    launch_gather<F, T, 8>(p, queue);
  else if (plan.tokens <= 1)
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
