// Products that are MLX's own matmul, over operands of ours: routes that a GPU's plan may take.
#include "../formats/nvfp4.h"
#include "backend.h"
#include "mlx/ops.h"
#include "mlx/transforms.h"
#include "ops.h"
#include "product.h"

namespace lowbit {

using mx::array;

namespace {

// What the global scales of both operands multiply a product by that was made without them, or
// nothing.
OptionalArray alpha(const ProductInputs& in, mx::Stream s) {
  const array most(Nvfp4::kGlobalMax, mx::float32);
  OptionalArray product;
  for (const OptionalArray* global : {&in.global_x, &in.global_w}) {
    if (!*global) continue;
    const array one = divide(reshape(**global, {}, s), most, s);
    product = product ? multiply(*product, one, s) : one;
  }
  return product;
}

// (x @ w) * alpha + bias, of rows of x.
array product_of(const array& rows, const array& w, const OptionalArray& bias,
                 const OptionalArray& alpha, mx::Stream s) {
  const mx::Dtype dtype = rows.dtype();
  if (!alpha)
    return bias ? addmm(astype(*bias, dtype, s), rows, w, 1.0f, 1.0f, s) : matmul(rows, w, s);
  array y = multiply(astype(matmul(rows, w, s), mx::float32, s), *alpha, s);
  if (bias) y = add(y, astype(*bias, mx::float32, s), s);
  return astype(y, dtype, s);
}

array flat_rows(const array& x, mx::Stream s) { return reshape(x, {-1, x.shape(-1)}, s); }

array decoded_product(const ProductKind& kind, const ProductInputs& in, mx::Stream s) {
  const mx::Dtype dtype = in.x.dtype();
  array rows = flat_rows(in.x, s);
  OptionalArray scale, global_w = in.global_w;
  if (kind.quantize_x) {
    const auto [codes, scales, none] = quantize(rows, kind.format, in.global_x, s);
    rows = dequantize(codes, scales, none, kind.format, std::nullopt, dtype, s);
    scale = alpha(in, s), global_w = std::nullopt;
  }
  array w = dequantize(in.w, *in.scales, in.biases, kind.format, global_w, dtype, s);
  if (kind.transpose) w = transpose(w, s);
  return product_of(rows, w, in.bias, scale, s);
}

// MLX's product of operands that it quantizes itself: cuBLASLt with block scales.
array scaled_product(const ProductKind& kind, const ProductInputs& in, mx::Stream s) {
  const FormatInfo& f = kFormats[int(kind.format)];
  const array y = mx::qqmm(flat_rows(in.x, s), in.w, in.scales, f.group_size, f.bits,
                           std::string(f.mode), in.global_x, in.global_w, s);
  return in.bias ? add(y, astype(*in.bias, y.dtype(), s), s) : y;
}

// With the derivatives of `primitive`, which go straight through the rounding of x.
array straight_through(const std::shared_ptr<Product>& primitive, std::vector<array> inputs,
                       const std::function<array(const ProductInputs&)>& product) {
  using Arrays = std::vector<array>;
  const ProductKind kind = primitive->kind();
  const auto value = [=](const Arrays& all) {
    return Arrays{product(ProductInputs::of(kind, all))};
  };
  const auto gradients = [=](const Arrays& primals, const Arrays& cotangents,
                             const Arrays& outputs) {
    std::vector<int> of{0};
    if (kind.bias) of.push_back(kind.scales + kind.biases + 2);
    const Arrays some = primitive->vjp(primals, cotangents, of, outputs);
    Arrays all;
    for (const array& primal : primals) all.push_back(zeros_like(primal, primitive->stream()));
    for (size_t i = 0; i < of.size(); i++) all[of[i]] = some[i];
    return all;
  };
  const auto derivative = [=](const Arrays& primals, const Arrays& tangents,
                              const std::vector<int>& argnums) {
    return primitive->jvp(primals, tangents, argnums);
  };
  return mx::custom_function(value, gradients, derivative)(inputs)[0];
}

}  // namespace

std::optional<array> product_by_mlx(const std::shared_ptr<Product>& primitive,
                                    const ProductInputs& in, const mx::Shape& shape) {
  const mx::Stream s = primitive->stream();
  if (s.device != mx::Device::gpu || !gpu_loaded()) return {};
  const ProductKind& kind = primitive->kind();
  const Route route = gpu().route(problem_of(kind, in), s.device.index);
  if (route == Route::kernel) return {};
  // MLX takes both global scales or none.
  const bool scaled =
      route == Route::scaled && in.global_x.has_value() == in.global_w.has_value();
  const auto product = [=](const ProductInputs& of) {
    const array y = scaled ? scaled_product(kind, of, s) : decoded_product(kind, of, s);
    return reshape(y, shape, s);
  };
  return kind.quantize_x ? straight_through(primitive, in.list(), product) : product(in);
}

}  // namespace lowbit
