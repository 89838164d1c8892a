// Derivatives and vmap of a product.
//
// x: the same product with the other transpose, summed over the pairs that read a row of x. A
// quantized x (qqmm) is differentiated straight through: rounding counts as the identity.
// scales, biases (affine): with dW = dy^T x, d scale = sum over the group of dW * q, d bias =
// sum of dW. bias: dy summed over its rows. Packed codes and global scales have no derivative.
#include <stdexcept>

#include "mlx/ops.h"
#include "ops.h"
#include "product.h"

namespace lowbit {

using mx::array;

namespace {

// Positions of the inputs in Product's list, -1 where absent.
struct Positions {
  int x = 0, w = 1, scales = -1, biases = -1, bias = -1, global_x = -1, global_w = -1, lhs = -1,
      rhs = -1;
  explicit Positions(const ProductKind& k) {
    int next = 2;
    if (k.scales) scales = next++;
    if (k.biases) biases = next++;
    if (k.bias) bias = next++;
    if (k.global_x) global_x = next++;
    if (k.global_w) global_w = next++;
    if (k.gather) lhs = next++, rhs = next++;
  }
};

mx::Shape flat_pairs(const ProductShape& s, int64_t columns) {
  return {int(s.pairs), int(s.M), int(columns)};
}

// x [x_matrices, M, K] and the pairs' indices, flattened.
array flat_x(const ProductShape& s, const array& x, mx::Stream stream) {
  return reshape(x, {int(s.x_matrices), int(s.M), int(s.K)}, stream);
}

array grad_x(const ProductKind& kind, const ProductInputs& in, const array& dy,
             mx::Stream stream) {
  const ProductShape s = ProductShape::of(kind, in);
  ProductKind back = kind;
  back.transpose = !kind.transpose;
  back.quantize_x = back.global_x = back.bias = false;
  ProductInputs inputs = in;
  inputs.global_x = inputs.bias = std::nullopt;
  if (!kind.gather) {
    inputs.x = dy;
    return Product::make(back, inputs, stream);
  }
  // float32, so that the sum over the pairs of a row is rounded once.
  inputs.x = contiguous(reshape(astype(dy, mx::float32, stream), flat_pairs(s, s.N), stream),
                        false, stream);
  inputs.lhs = mx::arange(0.0, double(s.pairs), 1.0, mx::int64, stream);
  inputs.rhs = reshape(*in.rhs, {int(s.pairs)}, stream);
  const array dx = Product::make(back, inputs, stream);  // [pairs, M, K]
  const array sum = scatter_add(
      zeros({int(s.x_matrices), int(s.M), int(s.K)}, dx.dtype(), stream),
      {reshape(*in.lhs, {int(s.pairs)}, stream)},
      reshape(dx, {int(s.pairs), 1, int(s.M), int(s.K)}, stream), std::vector<int>{0}, stream);
  return reshape(astype(sum, in.x.dtype(), stream), in.x.shape(), stream);
}

// Gradient of the stored matrix, [matrices, rows, columns] float32; matrices is 1 without
// gather.
array grad_w(const ProductKind& kind, const ProductInputs& in, const array& dy,
             mx::Stream stream) {
  const ProductShape s = ProductShape::of(kind, in);
  const auto product = [&](const array& a, const array& b) {  // a^T b over the rows
    return matmul(swapaxes(a, -1, -2, stream), b, stream);
  };
  if (!kind.gather) {
    const array x = astype(reshape(in.x, {1, int(s.M), int(s.K)}, stream), mx::float32, stream);
    const array g = astype(reshape(dy, {1, int(s.M), int(s.N)}, stream), mx::float32, stream);
    return kind.transpose ? product(g, x) : product(x, g);
  }
  const array lhs = reshape(*in.lhs, {int(s.pairs)}, stream);
  const array x = astype(take(flat_x(s, in.x, stream), lhs, 0, stream), mx::float32, stream);
  const array g = astype(reshape(dy, flat_pairs(s, s.N), stream), mx::float32, stream);
  const array each = kind.transpose ? product(g, x) : product(x, g);
  const mx::Shape one = each.shape();
  return scatter_add(zeros({int(s.w_matrices), one[1], one[2]}, mx::float32, stream),
                     {reshape(*in.rhs, {int(s.pairs)}, stream)},
                     reshape(each, {one[0], 1, one[1], one[2]}, stream), std::vector<int>{0},
                     stream);
}

array grad_groups(const ProductKind& kind, const ProductInputs& in, const array& dy,
                  bool of_scales, mx::Stream stream) {
  const FormatInfo& f = kFormats[int(kind.format)];
  if (!f.affine())
    throw std::invalid_argument("[lowbit] no derivative with respect to the scales of " +
                                std::string(f.name) + ": they are 8-bit floats");
  array dw = grad_w(kind, in, dy, stream);
  const mx::Shape groups = in.scales->shape();
  if (of_scales) {
    const array ones_like = ones(groups, mx::float32, stream);
    const array q = dequantize(in.w, ones_like, zeros_like(ones_like, stream), kind.format,
                               std::nullopt, mx::float32, stream);
    dw = multiply(dw, reshape(q, dw.shape(), stream), stream);
  }
  mx::Shape split = groups;
  split.push_back(f.group_size);
  return astype(sum(reshape(dw, split, stream), -1, false, stream), in.scales->dtype(), stream);
}

array grad_bias(const ProductKind& kind, const ProductInputs& in, const array& dy,
                mx::Stream stream) {
  const ProductShape s = ProductShape::of(kind, in);
  const array g = astype(reshape(dy, flat_pairs(s, s.N), stream), mx::float32, stream);
  const array rows = sum(g, 1, false, stream);  // [pairs, N]
  if (!kind.gather) return astype(reshape(rows, {int(s.N)}, stream), in.bias->dtype(), stream);
  const array total = scatter_add(zeros({int(s.w_matrices), int(s.N)}, mx::float32, stream),
                                  {reshape(*in.rhs, {int(s.pairs)}, stream)},
                                  reshape(rows, {int(s.pairs), 1, int(s.N)}, stream),
                                  std::vector<int>{0}, stream);
  return astype(reshape(total, in.bias->shape(), stream), in.bias->dtype(), stream);
}

array grad_dense(const ProductKind& kind, const ProductInputs& in, const array& dy,
                 mx::Stream stream) {
  return astype(reshape(grad_w(kind, in, dy, stream), in.w.shape(), stream), in.w.dtype(),
                stream);
}

}  // namespace

std::vector<array> Product::vjp(const std::vector<array>& primals,
                                const std::vector<array>& cotangents,
                                const std::vector<int>& argnums, const std::vector<array>&) {
  const ProductInputs in = ProductInputs::of(kind_, primals);
  const Positions at(kind_);
  const array& dy = cotangents[0];
  std::vector<array> grads;
  for (int a : argnums) {
    if (a == at.x)
      grads.push_back(grad_x(kind_, in, dy, stream()));
    else if (a == at.w && kind_.format == Format::dense)
      grads.push_back(grad_dense(kind_, in, dy, stream()));
    else if (a == at.scales)
      grads.push_back(grad_groups(kind_, in, dy, true, stream()));
    else if (a == at.biases)
      grads.push_back(grad_groups(kind_, in, dy, false, stream()));
    else if (a == at.bias)
      grads.push_back(grad_bias(kind_, in, dy, stream()));
    else
      throw std::invalid_argument(
          "[lowbit] no derivative with respect to packed weights, indices or global scales");
  }
  return grads;
}

std::vector<array> Product::jvp(const std::vector<array>& primals,
                                const std::vector<array>& tangents,
                                const std::vector<int>& argnums) {
  if (argnums.size() != 1 || argnums[0] != 0)
    throw std::invalid_argument("[lowbit] forward derivatives are with respect to x only");
  ProductInputs in = ProductInputs::of(kind_, primals);
  ProductKind kind = kind_;
  kind.quantize_x = kind.global_x = kind.bias = false;
  in.global_x = in.bias = std::nullopt;
  in.x = kind_.gather ? contiguous(tangents[0], false, stream()) : tangents[0];
  return {make(kind, in, stream())};
}

// With w shared, a batch of x is only more rows. Otherwise every batched array is flattened
// into the gather's leading dimensions and the indices are shifted by batch.
std::pair<std::vector<array>, std::vector<int>> Product::vmap(const std::vector<array>& inputs,
                                                              const std::vector<int>& axes) {
  const Positions at(kind_);
  int batch = 0;
  bool only_x = !kind_.gather;
  for (size_t i = 0; i < inputs.size(); i++) {
    if (axes[i] < 0) continue;
    batch = inputs[i].shape(axes[i]);
    only_x = only_x && int(i) == at.x;
    if (int(i) == at.global_x || int(i) == at.global_w)
      throw std::invalid_argument("[lowbit] vmap over a global scale is not supported");
  }
  const auto front = [&](int i) {
    return contiguous(axes[i] > 0 ? moveaxis(inputs[i], axes[i], 0, stream()) : inputs[i],
                      false, stream());
  };
  ProductInputs in = ProductInputs::of(kind_, inputs);
  in.x = front(at.x);
  if (only_x) return {{make(kind_, in, stream())}, {0}};
  if (kind_.format == Format::dense)
    throw std::invalid_argument("[lowbit] linear: vmap over w is not supported, use mx.matmul");

  // Shapes without the batch axis.
  const auto plain = [&](int i) {
    mx::Shape shape = inputs[i].shape();
    if (axes[i] >= 0) shape.erase(shape.begin() + axes[i]);
    return shape;
  };
  const auto matrices = [](const mx::Shape& s) {
    int n = 1;
    for (size_t i = 0; i + 2 < s.size(); i++) n *= s[i];
    return n;
  };
  const bool x_batched = axes[at.x] >= 0;
  bool w_batched = false;
  for (int i : {at.w, at.scales, at.biases, at.bias}) w_batched |= i >= 0 && axes[i] >= 0;
  const mx::Shape x_shape = plain(at.x), w_shape = plain(at.w);
  int x_rows = x_shape[x_shape.size() - 2];
  if (!kind_.gather) {
    x_rows = 1;
    for (size_t i = 0; i + 1 < x_shape.size(); i++) x_rows *= x_shape[i];
  }
  const int x_count = kind_.gather ? matrices(x_shape) : 1, w_count = matrices(w_shape);

  ProductKind kind = kind_;
  kind.gather = true;
  in.x = reshape(in.x, {-1, x_rows, x_shape.back()}, stream());
  // All of w's companions get the batch axis when one of them has it.
  const auto spread = [&](int i, int kept) -> std::optional<array> {
    if (i < 0) return std::nullopt;
    array v = front(i);
    if (w_batched && axes[i] < 0) {
      mx::Shape wide = v.shape();
      wide.insert(wide.begin(), batch);
      v = broadcast_to(expand_dims(v, 0, stream()), wide, stream());
    }
    mx::Shape shape{-1};
    const mx::Shape tail = plain(i);
    for (size_t k = tail.size() - size_t(kept); k < tail.size(); k++) shape.push_back(tail[k]);
    return contiguous(reshape(v, shape, stream()), false, stream());
  };
  const array w = *spread(at.w, 2);
  in.scales = spread(at.scales, 2);
  in.biases = spread(at.biases, 2);
  in.bias = spread(at.bias, 1);
  in.w = w;

  const mx::Shape pairs = kind_.gather ? plain(at.rhs) : mx::Shape{};
  mx::Shape all{batch};
  all.insert(all.end(), pairs.begin(), pairs.end());
  mx::Shape step(all.size(), 1);
  step[0] = batch;
  const auto shifted = [&](int i, bool batched, int count) {
    array index = i < 0 ? mx::array(int64_t(0), mx::int64) : front(i);
    if (i >= 0 && axes[i] < 0) index = expand_dims(index, 0, stream());
    if (batched) {
      const array base = multiply(mx::arange(0.0, double(batch), 1.0, mx::int64, stream()),
                                  mx::array(int64_t(count), mx::int64), stream());
      index = add(index, reshape(base, step, stream()), stream());
    }
    return contiguous(broadcast_to(index, all, stream()), false, stream());
  };
  in.lhs = shifted(at.lhs, x_batched, x_count);
  in.rhs = shifted(at.rhs, w_batched, w_count);
  array out = make(kind, in, stream());  // [batch, pairs..., rows, N]
  if (!kind_.gather) {
    mx::Shape shape{batch};
    shape.insert(shape.end(), x_shape.begin(), x_shape.end());
    shape.back() = out.shape(-1);
    out = reshape(out, shape, stream());
  }
  return {{out}, {0}};
}

}  // namespace lowbit
