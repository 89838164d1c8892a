// The primitive behind every product: y = alpha * (x @ w) + bias, w packed or dense, x
// optionally quantized first, rows optionally paired with experts.
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "mlx/array.h"
#include "mlx/primitives.h"
#include "mlx/utils.h"
#include "problem.h"

namespace lowbit {

namespace mx = mlx::core;

// Which product: everything but the arrays. Two products with equal kinds and inputs are equal.
struct ProductKind {
  Format format;
  bool transpose = true;
  bool quantize_x = false;  // qqmm: in w's format
  bool gather = false;
  // Which optional inputs follow x and w, in this order.
  bool scales = false, biases = false, bias = false, global_x = false, global_w = false;

  bool operator==(const ProductKind&) const = default;
};

// The inputs of a product, by name.
//
//   x         [..., K], any strides  gather: [..., M, K], in row order as all others
//   w         [N, K packed]         gather: [..., N, K packed]; [K, N packed] without transpose
//   scales    [..., rows of w, groups of a row], biases the same
//   bias      [N]                   gather: [experts, N], by rhs
//   global_x, global_w        float32, one element; gather: global_w may have one a matrix of w
//   lhs, rhs  int64 [I...], into the flattened leading dimensions of x and w
struct ProductInputs {
  mx::array x, w;
  std::optional<mx::array> scales, biases, bias, global_x, global_w, lhs, rhs;

  std::vector<mx::array> list() const;
  static ProductInputs of(const ProductKind&, const std::vector<mx::array>&);
};

class Product : public mx::Primitive {
 public:
  Product(mx::Stream stream, ProductKind kind) : Primitive(stream), kind_(kind) {}

  // Inputs already checked and contiguous; x, bias in the result's dtype or any float dtype.
  static mx::array make(const ProductKind&, const ProductInputs&, mx::StreamOrDevice);

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override;
  void eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override;
  std::vector<mx::array> jvp(const std::vector<mx::array>& primals,
                             const std::vector<mx::array>& tangents,
                             const std::vector<int>& argnums) override;
  std::vector<mx::array> vjp(const std::vector<mx::array>& primals,
                             const std::vector<mx::array>& cotangents,
                             const std::vector<int>& argnums,
                             const std::vector<mx::array>& outputs) override;
  std::pair<std::vector<mx::array>, std::vector<int>> vmap(
      const std::vector<mx::array>& inputs, const std::vector<int>& axes) override;
  const char* name() const override { return "LowbitProduct"; }
  bool is_equivalent(const mx::Primitive& other) const override;
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override;
  const ProductKind& kind() const { return kind_; }

 private:
  ProductKind kind_;
};

// Flattened views of a product's shapes.
struct ProductShape {
  int64_t M, N, K;  // of one x matrix (all rows of x without gather)
  int64_t x_matrices, w_matrices, pairs;
  static ProductShape of(const ProductKind&, const ProductInputs&);
};

Problem problem_of(const ProductKind&, const ProductInputs&);

// The product where the plan of a GPU leaves it to MLX, or nothing.
std::optional<mx::array> product_by_mlx(const std::shared_ptr<Product>&, const ProductInputs&,
                                        const mx::Shape& shape);

Dtype dtype_of(mx::Dtype);  // float32, float16 or bfloat16

}  // namespace lowbit
