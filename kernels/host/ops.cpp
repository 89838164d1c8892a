#include "ops.h"

#include "backend.h"
#include "checks.h"
#include "mlx/ops.h"
#include "plan.h"
#include "product.h"

namespace lowbit {

using mx::array;

namespace {

// A copy in row order, unless `a` is known to be in it: weights are, and a node for each would
// cost more than launching their product.
array dense_copy(const array& a, mx::StreamOrDevice s) {
  return a.is_available() && a.flags().row_contiguous ? a : contiguous(a, false, s);
}

OptionalArray dense_copy(const OptionalArray& a, mx::StreamOrDevice s) {
  return a ? OptionalArray(dense_copy(*a, s)) : std::nullopt;
}

// Kernels take a bias in the dtype of the result or in float32, which holds every other one.
OptionalArray prepare_bias(const OptionalArray& bias, mx::Dtype result, mx::StreamOrDevice s) {
  if (!bias || bias->dtype() == result) return dense_copy(bias, s);
  return dense_copy(astype(*bias, mx::float32, s), s);
}

// A product without elements, or over nothing: zeros, plus the bias.
array empty_product(const mx::Shape& shape, mx::Dtype dtype, const OptionalArray& bias,
                    mx::StreamOrDevice s) {
  array y = zeros(shape, dtype, s);
  return bias ? astype(add(y, *bias, s), dtype, s) : y;
}

bool empty(const mx::Shape& shape) {
  for (int n : shape)
    if (n == 0) return true;
  return false;
}

mx::Shape leading(const array& a) { return {a.shape().begin(), a.shape().end() - 2}; }

int64_t count(const mx::Shape& shape) {
  int64_t n = 1;
  for (int d : shape) n *= d;
  return n;
}

// MLX's promotion: affine products have the common dtype of x, scales and biases; the block
// formats that of x. Scales and biases are only converted when they differ from each other.
struct Weights {
  array w, scales;
  OptionalArray biases;
  mx::Dtype dtype;  // of the result
};

Weights prepare(const array& x, const array& w, const array& scales,
                const OptionalArray& biases, mx::StreamOrDevice s) {
  Weights p{dense_copy(w, s), scales, biases, x.dtype()};
  if (biases) {
    const mx::Dtype common = promote_types(scales.dtype(), biases->dtype());
    p.dtype = promote_types(x.dtype(), common);
    p.scales = astype(scales, common, s);
    p.biases = dense_copy(astype(*biases, common, s), s);
  }
  p.scales = dense_copy(p.scales, s);
  return p;
}

// Whole index space of leading dimensions `shape`, broadcast to `to`.
array all_indices(const mx::Shape& shape, const mx::Shape& to, mx::StreamOrDevice s) {
  const array each = mx::arange(0.0, double(count(shape)), 1.0, mx::int64, s);
  return broadcast_to(reshape(each, shape, s), to, s);
}

// Pairs of x's and w's matrices multiplied one by one.
array paired(ProductKind kind, const Checks& check, const array& x, const Weights& p,
             const array& lhs, const array& rhs, const OptionalArray& bias,
             const OptionalArray& global_x, const OptionalArray& global_w,
             mx::StreamOrDevice s) {
  kind.gather = true;
  ProductInputs in{dense_copy(astype(x, p.dtype, s), s),
                   p.w,
                   p.scales,
                   p.biases,
                   prepare_bias(bias, p.dtype, s),
                   global_x,
                   global_w,
                   dense_copy(lhs, s),
                   dense_copy(rhs, s)};
  const ProductShape shape = ProductShape::of(kind, in);
  mx::Shape out = lhs.shape();
  out.push_back(x.shape(-2));
  out.push_back(int(shape.N));
  check.memory("the result", out, p.dtype);
  if (empty(out) || shape.K == 0) {
    if (bias) {
      // [pairs, N] rows of bias against [pairs, M, N].
      return empty_product(out, p.dtype, expand_dims(take(*bias, rhs, 0, s), -2, s), s);
    }
    return empty_product(out, p.dtype, std::nullopt, s);
  }
  if (x.size() == 0 || p.w.size() == 0)
    check.refuse("x of shape ", x.shape(), " and w of shape ", p.w.shape(),
                 " have no matrices to take, but the indices ask for ", shape.pairs);
  return Product::make(kind, in, s);
}

array multiply(const Checks& check, ProductKind kind, const array& x, const array& w,
               const array& scales, const OptionalArray& biases, const OptionalArray& bias,
               const OptionalArray& global_x, const OptionalArray& global_w,
               mx::StreamOrDevice s) {
  check.activations("x", x);
  const auto [rows, columns] = check.weights(w, scales, biases);
  const int K = kind.transpose ? columns : rows, N = kind.transpose ? rows : columns;
  check.reduction(x, K);
  check.bias(bias, {N});
  check.global_scale(kind.quantize_x ? "global_scale_x" : "global_scale", global_x);
  check.global_scale(kind.quantize_x ? "global_scale_w" : "global_scale", global_w);
  kind.scales = true;
  kind.biases = biases.has_value();
  kind.bias = bias.has_value();
  kind.global_x = global_x.has_value();
  kind.global_w = global_w.has_value();
  const Weights p = prepare(x, w, scales, biases, s);

  if (w.ndim() > 2) {
    if (x.ndim() < 2)
      check.refuse("x must have at least 2 dimensions when w has shape ", w.shape(),
                   ", got x of shape ", x.shape());
    const mx::Shape xs = leading(x), ws = leading(w);
    mx::Shape all;
    try {
      all = broadcast_shapes(xs, ws);
    } catch (const std::exception&) {
      check.refuse("the leading dimensions of x ", x.shape(), " and w ", w.shape(),
                   " do not broadcast");
    }
    // The fused bias of a gather is per matrix: here every matrix has the same one.
    const OptionalArray each =
        bias ? OptionalArray(broadcast_to(*bias, {int(count(ws)), N}, s)) : std::nullopt;
    return paired(kind, check, x, p, all_indices(xs, all, s), all_indices(ws, all, s), each,
                  global_x, global_w, s);
  }

  mx::Shape out = x.shape();
  out.back() = N;
  check.memory("the result", out, p.dtype);
  if (empty(out) || K == 0) return empty_product(out, p.dtype, bias, s);
  return Product::make(kind,
                       {astype(x, p.dtype, s),
                        p.w,
                        p.scales,
                        p.biases,
                        prepare_bias(bias, p.dtype, s),
                        global_x,
                        global_w,
                        {},
                        {}},
                       s);
}

// On the GPU MLX's own product of dense matrices is the fast one.
array mlx_linear(const array& x, const array& w, const OptionalArray& bias,
                 const mx::Shape& shape, mx::Dtype dtype, mx::StreamOrDevice s) {
  const array rows = reshape(astype(x, dtype, s), {-1, x.shape(-1)}, s);
  const array columns = transpose(astype(w, dtype, s), s);
  const array y = bias ? addmm(astype(*bias, dtype, s), rows, columns, 1.0f, 1.0f, s)
                       : matmul(rows, columns, s);
  return reshape(y, shape, s);
}

}  // namespace

array quantized_matmul(const array& x, const array& w, const array& scales,
                       const OptionalArray& biases, const OptionalArray& bias, bool transpose,
                       Format format, const OptionalArray& global_scale, mx::StreamOrDevice s) {
  const Checks check("quantized_matmul", format, s);
  return multiply(check, {.format = format, .transpose = transpose}, x, w, scales, biases, bias,
                  std::nullopt, global_scale, s);
}

array qqmm(const array& x, const array& w, const array& scales, const OptionalArray& bias,
           Format format, const OptionalArray& global_scale_x,
           const OptionalArray& global_scale_w, mx::StreamOrDevice s) {
  const Checks check("qqmm", format, s);
  return multiply(check, {.format = format, .quantize_x = true}, x, w, scales, std::nullopt,
                  bias, global_scale_x, global_scale_w, s);
}

array gather_qmm(const array& x, const array& w, const array& scales,
                 const OptionalArray& biases, const OptionalArray& lhs_indices,
                 const OptionalArray& rhs_indices, const OptionalArray& bias, bool transpose,
                 bool quantize_x, Format format, const OptionalArray& global_scale_x,
                 const OptionalArray& global_scale_w, mx::StreamOrDevice s) {
  const Checks check(quantize_x ? "gather_qqmm" : "gather_qmm", format, s);
  check.activations("x", x);
  if (x.ndim() < 2) check.refuse("x must have at least 2 dimensions, got shape ", x.shape());
  const auto [rows, columns] = check.weights(w, scales, biases);
  const int K = transpose ? columns : rows, N = transpose ? rows : columns;
  check.reduction(x, K);
  const mx::Shape xs = leading(x), ws = leading(w);
  if (bias) {
    mx::Shape expected = ws;
    expected.push_back(N);
    check.bias(bias, expected);
  }
  check.global_scale(quantize_x ? "global_scale_x" : "global_scale", global_scale_x);
  check.global_scale(quantize_x ? "global_scale_w" : "global_scale", global_scale_w, count(ws));

  const auto indices = [&](const char* argument, const OptionalArray& given,
                           const mx::Shape& of) {
    if (!given) return all_indices(of, of, s);
    if (!issubdtype(given->dtype(), mx::integer))
      check.refuse(argument, " must be integers, got ", given->dtype());
    check.range(argument, *given, count(of));
    return astype(*given, mx::int64, s);
  };
  array lhs = indices("lhs_indices", lhs_indices, xs),
        rhs = indices("rhs_indices", rhs_indices, ws);
  try {
    const mx::Shape pairs = broadcast_shapes(lhs.shape(), rhs.shape());
    lhs = broadcast_to(lhs, pairs, s);
    rhs = broadcast_to(rhs, pairs, s);
  } catch (const std::exception&) {
    check.refuse("lhs_indices of shape ", lhs.shape(), " and rhs_indices of shape ",
                 rhs.shape(), " do not broadcast");
  }
  ProductKind kind{.format = format, .transpose = transpose, .quantize_x = quantize_x};
  kind.scales = true;
  kind.biases = biases.has_value();
  kind.bias = bias.has_value();
  kind.global_x = global_scale_x.has_value();
  kind.global_w = global_scale_w.has_value();
  const OptionalArray flat_bias =
      bias ? OptionalArray(reshape(*bias, {int(count(ws)), N}, s)) : std::nullopt;
  return paired(kind, check, x, prepare(x, w, scales, biases, s), lhs, rhs, flat_bias,
                global_scale_x, dense_copy(global_scale_w, s), s);
}

array linear(const array& x, const array& w, const OptionalArray& bias, mx::StreamOrDevice s) {
  const Checks check("linear", Format::dense, s);
  check.activations("x", x);
  check.activations("w", w);
  if (w.ndim() != 2) check.refuse("w must have 2 dimensions, got shape ", w.shape());
  check.reduction(x, w.shape(-1));
  check.bias(bias, {w.shape(0)});
  const mx::Dtype dtype = promote_types(x.dtype(), w.dtype());
  mx::Shape out = x.shape();
  out.back() = w.shape(0);
  check.memory("the result", out, dtype);
  if (empty(out) || w.shape(1) == 0) return empty_product(out, dtype, bias, s);
  if (check.device() == mx::Device::gpu) return mlx_linear(x, w, bias, out, dtype, s);
  ProductKind kind{.format = Format::dense};
  kind.bias = bias.has_value();
  return Product::make(
      kind,
      {astype(x, dtype, s), dense_copy(w, s), {}, {}, dense_copy(bias, s), {}, {}, {}, {}}, s);
}

std::string explain(const array& x, const array& w, const OptionalArray& scales,
                    const OptionalArray& biases, bool transpose, bool quantize_x, Format format,
                    mx::StreamOrDevice s) {
  const Checks check("explain", format, s);
  check.activations("x", x);
  Problem p{.format = format,
            .dtype = dtype_of(x.dtype()),
            .transpose = transpose,
            .quantize_x = quantize_x};
  int rows = 0, columns = 0;
  if (format == Format::dense) {
    check.activations("w", w);
    p.dense_dtype = dtype_of(w.dtype());
    rows = w.shape(-2), columns = w.shape(-1);
  } else {
    if (!scales) check.refuse("scales are required in mode ", check.info().mode);
    std::tie(rows, columns) = check.weights(w, *scales, biases);
    if (biases) p.dtype = dtype_of(promote_types(x.dtype(), scales->dtype()));
  }
  check.reduction(x, transpose ? columns : rows);
  p.K = transpose ? columns : rows;
  p.N = transpose ? rows : columns;
  p.M = p.K ? int64_t(x.size()) / p.K : 0;
  if (check.device() == mx::Device::cpu) return cpu::explain(p);
  if (format == Format::dense) return "MLX's op: dense products on the GPU are its own matmul";
  return gpu().explain(p, check.device().index);
}

}  // namespace lowbit
