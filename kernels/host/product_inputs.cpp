// A product's inputs and what their shapes say. Compiled into every backend that is an object
// of its own.
#include <stdexcept>

#include "product.h"

namespace lowbit {

std::vector<mx::array> ProductInputs::list() const {
  std::vector<mx::array> all{x, w};
  for (const auto* a : {&scales, &biases, &bias, &global_x, &global_w, &lhs, &rhs})
    if (*a) all.push_back(**a);
  return all;
}

ProductInputs ProductInputs::of(const ProductKind& kind, const std::vector<mx::array>& all) {
  size_t next = 2;
  const auto take = [&](bool present) {
    return present ? std::optional<mx::array>(all[next++]) : std::nullopt;
  };
  ProductInputs in{all[0], all[1], {}, {}, {}, {}, {}, {}, {}};
  in.scales = take(kind.scales);
  in.biases = take(kind.biases);
  in.bias = take(kind.bias);
  in.global_x = take(kind.global_x);
  in.global_w = take(kind.global_w);
  in.lhs = take(kind.gather);
  in.rhs = take(kind.gather);
  return in;
}

Dtype dtype_of(mx::Dtype dtype) {
  if (dtype == mx::float32) return Dtype::f32;
  if (dtype == mx::float16) return Dtype::f16;
  if (dtype == mx::bfloat16) return Dtype::bf16;
  throw std::invalid_argument("[lowbit] internal: not a float dtype");
}

ProductShape ProductShape::of(const ProductKind& kind, const ProductInputs& in) {
  ProductShape s{};
  const mx::Shape& w = in.w.shape();
  const int64_t packed = w.back();
  const int64_t columns =
      kind.format == Format::dense ? packed : packed * 32 / kFormats[int(kind.format)].bits;
  const int64_t rows = w[w.size() - 2];
  s.N = kind.transpose ? rows : columns;
  s.K = kind.transpose ? columns : rows;
  const int64_t x_rows = s.K ? int64_t(in.x.size()) / s.K : 0;
  s.M = kind.gather ? in.x.shape(-2) : x_rows;
  s.x_matrices = s.M ? x_rows / s.M : 0;
  s.w_matrices = rows * packed != 0 ? int64_t(in.w.size()) / (rows * packed) : 0;
  s.pairs = kind.gather ? int64_t(in.lhs->size()) : 1;
  return s;
}

Problem problem_of(const ProductKind& kind, const ProductInputs& in) {
  const ProductShape s = ProductShape::of(kind, in);
  const Dtype dtype = dtype_of(in.x.dtype());
  return {kind.format,    dtype,           dtype,       s.M,     s.N,         s.K,
          kind.transpose, kind.quantize_x, kind.gather, s.pairs, s.w_matrices};
}

}  // namespace lowbit
