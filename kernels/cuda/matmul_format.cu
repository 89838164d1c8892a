// The matmul kernels of one format: compiled once for each row of formats.def, with its name in
// LOWBIT_FORMAT.
#include <algorithm>
#include <atomic>
#include <random>

#include "clusters.h"
#include "formats.h"
#include "lane_order.h"
#include "matmul_kernel.cuh"
#include "matmul_rules.h"

namespace lowbit::cuda {

namespace {

// What no word of memory is by accident: another one each time, and even.
unsigned long long meeting() {
  static const uint64_t first = [] {
    std::random_device random;
    return uint64_t(random()) << 32 | random();
  }();
  static std::atomic<uint64_t> count{0};
  return (first + count++ * 0x9e3779b97f4a7c15u) & ~uint64_t(1);
}

// Gathered: all rows that pairs bring, sorted by matrix, and all matrices' rows of w.
template <class F, class T, int kTokens, bool kGather, bool kLanes>
void launch(const Product& p, const Plan& plan, Queue& queue) {
  using Shape = MatmulShape<F, T, kTokens>;
  const auto up = [](int64_t n, int64_t by) { return int((n + by - 1) / by); };
  MatmulArgs a{};
  int64_t rows = p.M, w_rows = p.N, token_tiles = up(p.M, kTokens);
  const void* x = p.x;
  if constexpr (kGather) {
    const Grouping g = group_rows(p, kTokens, queue);
    rows = p.pairs * p.M, w_rows = p.w.matrices * p.N, token_tiles = g.most_tiles;
    x = sorted_x(p, g, queue);
    a.gather = {g.tiles,    g.tile_count,          g.y_rows,
                g.in_order, int(p.global_w_count), aligned(p.y, 2 * p.N, 16)};
  }
  a.M = int(rows), a.N = int(p.N), a.K = int(p.K);
  a.lane_order = kLanes, a.x_columns = int(kLanes ? lane_order_columns(p.K) : p.K);
  a.share = plan.rows / Shape::kRows;
  a.units = up(p.K, 128);
  const int halves = clusters_of_tile(plan.split_k);
  a.split = plan.split_k / halves;
  a.part = int(units_of_part(a.units, plan.split_k));
  a.token_tiles = int(token_tiles);
  a.row_groups = up(p.N, plan.rows);
  // 2048 tokens: 16 MB of x at K = 4096.
  a.panel = 2048 / kTokens;
  a.out_tokens = a.split > 1 ? 16 : Shape::kOutTokens;

  // Rows that fill no tile are copied as they are, by a map of their own; where two blocks
  // share them, in pieces of 8. To have the copy engine fill up the rest is slow: 4-bit
  // 4096x4096 M = 70, 140, 320 19.4, 28.1, 47.9 us, so 14.0, 17.6, 30.1; 14336x4096 M = 300 125
  // and 80 (H200, 2026-11-29). What the tile then holds beyond them reaches no y.
  const int most = kTokens / (a.share == 1 ? Shape::kXCopies : a.share), rest = a.M % kTokens;
  a.x_rows[0] = a.x_rows[1] = most;
  if (kGather && a.share == 1)
    a.x_rows[0] = a.x_rows[1] = std::min(a.M, most);
  else if (!kGather && rest > 0)
    a.x_rows[1] = a.share == 1 ? rest : up(rest, 8 * a.share) * 8;
  const auto x_map = [&](const void* from, int64_t count, int way) {
    return tensor_map(from, 2, count, a.x_columns, 2 * int64_t(a.x_columns), a.x_rows[way], 64,
                      128);
  };
  a.x[1] = x_map(x, rows, 1);
  a.x[0] = kGather && reads_in_place(p) ? x_map(p.x, p.x_matrices * p.M, 0) : x_map(x, rows, 0);
  a.codes = tensor_map(p.w.codes, 1, w_rows, p.w.row_bytes, p.w.row_bytes, Shape::kRows,
                       Shape::kRowBytes, Shape::kSwizzle);
  a.x_data = p.x, a.sorted_x_data = x, a.code_data = p.w.codes, a.row_bytes = p.w.row_bytes,
  a.y_data = p.y;
  a.y_tiles = !kGather && aligned(p.y, 2 * p.N, 16);
  a.y = a.y_tiles ? tensor_map(p.y, 2, p.M, p.N, 2 * p.N, a.out_tokens, 64, 128) : a.codes;
  a.scales = static_cast<const uint8_t*>(p.w.scales);
  a.biases = static_cast<const uint8_t*>(p.w.biases);
  a.scale_row = int(p.K / F::kGroup) * Shape::kScaleSize;
  a.scale_vectors = p.K % 256 == 0 && aligned(a.scales, a.scale_row, Shape::kBatchBytes) &&
                    aligned(a.biases, a.scale_row, Shape::kBatchBytes);
  a.bias = p.bias, a.bias_is_f32 = p.bias_dtype == Dtype::f32;
  a.global_x = p.global_x, a.global_w = p.global_w;

  const int cluster = a.share * a.split, tiles = a.row_groups * a.token_tiles;
  int clusters = most_clusters(matmul_kernel<F, T, kTokens, kGather, kLanes>, Shape::kThreads,
                               Shape::kBytes, cluster, queue.device().processors);
  if (a.split > 1 || clusters > tiles) clusters = tiles * halves;
  a.clusters = clusters;
  a.second_block = 0xffffffffu;
  if (halves == 2) {
    const size_t blocks = size_t(tiles) * size_t(cluster);
    a.second_block = uint32_t(blocks);
    a.met = static_cast<unsigned long long*>(queue.scratch(blocks * 8));
    a.sums = static_cast<float*>(queue.scratch(2 * blocks * kTokens * Shape::kRows * 4));
    a.meeting = meeting();
  }
  a.cluster_part = cluster == 1 ? 0 : uint32_t((uint64_t(1) << 32) / uint64_t(cluster) + 1);
  queue.run(matmul_kernel<F, T, kTokens, kGather, kLanes>, dim3(clusters * cluster),
            dim3(Shape::kThreads), size_t(Shape::kBytes), cluster, a);
}

template <class F, class T, int kTokens, bool kGather>
void launch(const Product& p, const Plan& plan, Queue& queue) {
  if constexpr (!kGather && matmul_lane_order(Format::LOWBIT_FORMAT) && std::is_same_v<T, bf16>)
    if (p.lane_order) return launch<F, T, kTokens, kGather, true>(p, plan, queue);
  launch<F, T, kTokens, kGather, false>(p, plan, queue);
}

template <class F, class T, bool kGather>
void launch(const Product& p, const Plan& plan, Queue& queue) {
  if (plan.tokens == 16) return launch<F, T, 16, kGather>(p, plan, queue);
  if (plan.tokens == 32) return launch<F, T, 32, kGather>(p, plan, queue);
  if (plan.tokens == 64) return launch<F, T, 64, kGather>(p, plan, queue);
  if (plan.tokens == 128) return launch<F, T, 128, kGather>(p, plan, queue);
  return launch < F, T, kGather ? kGatheredTokens : 256, kGather > (p, plan, queue);
}

template <class F, class T>
void launch(const Product& p, const Plan& plan, Queue& queue) {
  return p.rhs ? launch<F, T, true>(p, plan, queue) : launch<F, T, false>(p, plan, queue);
}

}  // namespace

template <>
void matmul_format<Format::LOWBIT_FORMAT>(const Product& p, const Plan& plan, Queue& queue) {
  using F = TypeOf<Format::LOWBIT_FORMAT>::type;
  if (p.dtype == Dtype::bf16) return launch<F, bf16>(p, plan, queue);
  if constexpr (F::kHasBias || std::is_same_v<F, Nvfp4>) launch<F, f16>(p, plan, queue);
}

}  // namespace lowbit::cuda
