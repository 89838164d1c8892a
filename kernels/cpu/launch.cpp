// From MLX arrays to kernel arguments. The only file of the CPU backend that knows MLX.
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <vector>

#include "../formats/nvfp4.h"
#include "../host/backend.h"
#include "kernels.h"
#include "mlx/allocator.h"
#include "mlx/backend/cpu/encoder.h"
#include "pool.h"
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace lowbit::cpu {

namespace {

// MLX_LOWBIT_POISON=1 fills results with NaN first, so that an element nobody writes shows.
void allocate(mx::array& out) {
  static const bool poison = [] {
    const char* text = std::getenv("MLX_LOWBIT_POISON");
    return text && *text && *text != '0';
  }();
  out.set_data(mx::allocator::malloc(out.nbytes()));
#if defined(__linux__)
  // A large result is fresh memory in every call: huge pages spare one fault per 4 KiB, which
  // would cost more than writing it (dequantize of 4096x4096: 14 ms, of them 9 in faults).
  constexpr size_t kHuge = size_t(2) << 20;
  if (out.nbytes() >= 2 * kHuge) {
    const uintptr_t begin =
        (reinterpret_cast<uintptr_t>(out.data<char>()) + kHuge - 1) & ~(kHuge - 1);
    const uintptr_t end = reinterpret_cast<uintptr_t>(out.data<char>()) + out.nbytes();
    if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  }
#endif
  if (poison) std::memset(out.data<char>(), 0xff, out.nbytes());
}

ScaleType scale_type(const FormatInfo& f, const mx::array& scales) {
  if (f.affine()) return ScaleType(int(dtype_of(scales.dtype())));
  return f.group_size == 16 ? ScaleType::e4m3 : ScaleType::e8m0;
}
static_assert(int(ScaleType::bf16) == int(Dtype::bf16));

// Element i of an optional array that may hold a single value for all.
float value_or(const std::optional<mx::array>& values, float otherwise, int64_t i = 0) {
  if (!values) return otherwise;
  return values->data<float>()[values->size() > 1 ? i : 0];
}

// `matrix` i of w and its scales.
Matrix matrix_of(const ProductKind& kind, const ProductInputs& in, int64_t i) {
  const mx::array& w = in.w;
  Matrix m{};
  m.rows = w.shape(-2);
  m.row_bytes = w.shape(-1) * int64_t(w.itemsize());
  m.codes = w.data<uint8_t>() + i * m.rows * m.row_bytes;
  m.end = w.data<uint8_t>() + w.nbytes();
  m.columns = w.shape(-1);
  if (kind.format == Format::dense) return m;
  const FormatInfo& f = kFormats[int(kind.format)];
  m.columns = w.shape(-1) * int64_t(32) / f.bits;
  m.group_size = f.group_size;
  m.scale_type = scale_type(f, *in.scales);
  const int64_t bytes =
      i * m.rows * (m.columns / f.group_size) * int64_t(in.scales->itemsize());
  m.scales = in.scales->data<char>() + bytes;
  if (in.biases) m.biases = in.biases->data<char>() + bytes;
  return m;
}

// What products with matrix i of w are multiplied by.
float alpha_of(const ProductInputs& in, int64_t i) {
  float alpha = 1.0f;
  if (in.global_x) alpha *= value_or(in.global_x, 1.0f) / Nvfp4::kGlobalMax;
  if (in.global_w) alpha *= value_or(in.global_w, 1.0f, i) / Nvfp4::kGlobalMax;
  return alpha;
}

// One matrix and the rows of x that meet it.
void run(const ProductKind& kind, Product p, const Pool& pool) {
  const Problem problem{p.format,
                        p.x.dtype,
                        p.dense_dtype,
                        p.x.count,
                        p.transpose ? p.w.rows : p.w.columns,
                        p.transpose ? p.w.columns : p.w.rows,
                        p.transpose,
                        kind.quantize_x};
  const Target& t = target();
  const Plan plan = cpu::plan(problem, t);
  const auto kernel =
      plan.kernel == Plan::Kernel::matvec ? t.kernels().matvec : t.kernels().matmul;
  kernel(p, plan, pool);
}

void fill_nan(const Result& y, int64_t row, int64_t n) {
  for (int64_t i = 0; i < n; i++) {
    const int64_t at = row * y.stride + i;
    if (y.dtype == Dtype::f32)
      static_cast<float*>(y.y)[at] = __builtin_nanf("");
    else
      static_cast<uint16_t*>(y.y)[at] = y.dtype == Dtype::bf16 ? 0x7fc0 : 0x7e00;
  }
}

// Pairs are grouped by expert; each expert's matrix then meets all its rows at once. A pair
// whose index is out of range reads nothing and gives NaN.
void run_gather(const ProductKind& kind, const ProductInputs& in, Product p, const Pool& pool) {
  const ProductShape s = ProductShape::of(kind, in);
  const int64_t* lhs = in.lhs->data<int64_t>();
  const int64_t* rhs = in.rhs->data<int64_t>();
  std::vector<int64_t> begin(size_t(s.w_matrices) + 1, 0);
  const auto valid = [&](int64_t i) {
    return lhs[i] >= 0 && lhs[i] < s.x_matrices && rhs[i] >= 0 && rhs[i] < s.w_matrices;
  };
  for (int64_t i = 0; i < s.pairs; i++)
    if (valid(i)) begin[size_t(rhs[i]) + 1] += s.M;
  std::partial_sum(begin.begin(), begin.end(), begin.begin());
  std::vector<int64_t> x_rows(size_t(begin.back())), y_rows(size_t(begin.back()));
  std::vector<int64_t> next(begin.begin(), begin.end() - 1);
  for (int64_t i = 0; i < s.pairs; i++) {
    for (int64_t m = 0; m < s.M; m++) {
      if (!valid(i)) {
        fill_nan(p.y, i * s.M + m, s.N);
        continue;
      }
      const size_t at = size_t(next[size_t(rhs[i])]++);
      x_rows[at] = lhs[i] * s.M + m;
      y_rows[at] = i * s.M + m;
    }
  }
  for (int64_t e = 0; e < s.w_matrices; e++) {
    const int64_t first = begin[size_t(e)];
    p.x.count = begin[size_t(e) + 1] - first;
    if (p.x.count == 0) continue;
    p.w = matrix_of(kind, in, e);
    p.y.alpha = alpha_of(in, e);
    p.x.index = x_rows.data() + first;
    p.y.index = y_rows.data() + first;
    if (in.bias) p.y.bias = in.bias->data<char>() + e * s.N * int64_t(in.bias->itemsize());
    run(kind, p, pool);
  }
}

std::optional<mx::array> weak(const std::optional<mx::array>& a) {
  if (!a) return std::nullopt;
  return mx::array::unsafe_weak_copy(*a);
}

ProductInputs weak(const ProductInputs& in) {
  return {mx::array::unsafe_weak_copy(in.x),
          mx::array::unsafe_weak_copy(in.w),
          weak(in.scales),
          weak(in.biases),
          weak(in.bias),
          weak(in.global_x),
          weak(in.global_w),
          weak(in.lhs),
          weak(in.rhs)};
}

// Elements of `a`, from `from` on along dimensions `axis` and later, in row order.
void copy_rows(const mx::array& a, const char* from, int axis, char*& to) {
  const auto size = int64_t(a.itemsize());
  if (axis == int(a.ndim())) {
    std::memcpy(to, from, size_t(size));
    to += size;
    return;
  }
  if (axis == int(a.ndim()) - 1 && a.strides(axis) == 1) {
    std::memcpy(to, from, size_t(a.shape(axis) * size));
    to += a.shape(axis) * size;
    return;
  }
  for (int64_t i = 0; i < a.shape(axis); i++)
    copy_rows(a, from + i * a.strides(axis) * size, axis + 1, to);
}

void execute(const ProductKind& kind, const ProductInputs& in, mx::array& out) {
  const ProductShape s = ProductShape::of(kind, in);
  Product p{};
  p.format = kind.format;
  if (kind.format == Format::dense) p.dense_dtype = dtype_of(in.w.dtype());
  p.transpose = kind.transpose;
  std::vector<char> rows;
  if (!in.x.flags().row_contiguous) {
    rows.resize(in.x.nbytes());
    char* to = rows.data();
    copy_rows(in.x, in.x.data<char>(), 0, to);
  }
  p.x = {rows.empty() ? in.x.data<void>() : rows.data(),
         dtype_of(in.x.dtype()),
         s.K,
         nullptr,
         s.M,
         kind.quantize_x ? kind.format : Format::dense,
         value_or(in.global_x, 0.0f)};
  p.y = {out.data<void>(),
         dtype_of(out.dtype()),
         s.N,
         nullptr,
         in.bias ? in.bias->data<void>() : nullptr,
         in.bias ? dtype_of(in.bias->dtype()) : Dtype::f32,
         alpha_of(in, 0)};
  const Lease lease;
  if (kind.gather) return run_gather(kind, in, p, lease.pool());
  p.w = matrix_of(kind, in, 0);
  run(kind, p, lease.pool());
}

}  // namespace

void launch(const ProductKind& kind, const ProductInputs& in, mx::array& out,
            mx::Stream stream) {
  allocate(out);
  mx::cpu::get_command_encoder(stream).dispatch(
      [kind, in = weak(in), out = mx::array::unsafe_weak_copy(out)]() mutable {
        execute(kind, in, out);
      });
}

void launch_quantize(Format format, const mx::array& w,
                     const std::optional<mx::array>& global_scale,
                     std::vector<mx::array>& outputs, mx::Stream stream) {
  std::vector<mx::array> outs;
  for (mx::array& o : outputs) {
    allocate(o);
    outs.push_back(mx::array::unsafe_weak_copy(o));
  }
  mx::cpu::get_command_encoder(stream).dispatch([format, w = mx::array::unsafe_weak_copy(w),
                                                 global = weak(global_scale),
                                                 outs = std::move(outs)]() mutable {
    const FormatInfo& f = kFormats[int(format)];
    const int64_t groups = int64_t(w.size()) / f.group_size, block = 4096 / f.group_size;
    const size_t out_size = outs[1].itemsize();
    const Lease lease;
    parallel_for(lease.pool(), (groups + block - 1) / block, [&](int64_t i, int) {
      const int64_t first = i * block, count = std::min(block, groups - first);
      target().kernels().quantize(
          format, w.data<char>() + first * f.group_size * int64_t(w.itemsize()),
          dtype_of(w.dtype()), count, value_or(global, 0.0f),
          outs[0].data<uint8_t>() + first * f.group_size * f.bits / 8,
          outs[1].data<char>() + first * int64_t(out_size),
          f.affine() ? outs[2].data<char>() + first * int64_t(out_size) : nullptr);
    });
  });
}

void launch_dequantize(Format format, const mx::array& w, const mx::array& scales,
                       const std::optional<mx::array>& biases,
                       const std::optional<mx::array>& global_scale, mx::array& out,
                       mx::Stream stream) {
  allocate(out);
  const ProductKind kind{.format = format};
  ProductInputs in{out, w, scales, biases, {}, {}, global_scale, {}, {}};
  mx::cpu::get_command_encoder(stream).dispatch([kind, in = weak(in)]() mutable {
    Matrix m = matrix_of(kind, in, 0);
    m.rows = int64_t(in.w.size()) / in.w.shape(-1);
    const int64_t block = std::max<int64_t>(1, 16384 / m.columns);
    const float alpha = alpha_of(in, 0);
    const int64_t row_bytes = m.columns * int64_t(in.x.itemsize());
    const Lease lease;
    parallel_for(lease.pool(), (m.rows + block - 1) / block, [&](int64_t i, int) {
      const int64_t first = i * block;
      target().kernels().dequantize(kind.format, m, first, std::min(first + block, m.rows),
                                    alpha, in.x.data<char>() + first * row_bytes,
                                    dtype_of(in.x.dtype()));
    });
  });
}

}  // namespace lowbit::cpu
