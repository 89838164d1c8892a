// A product whose weights are part of the primitive: x is its only input, and it may cut its
// result into several arrays. For traces that are kept (mx.compile) of a model whose weights
// stay what they are: MLX then walks, counts and keeps alive one array instead of four, and no
// operation is needed to cut a merged product. It has no derivatives; whoever makes one sees to
// it that weights are no tracers.
#pragma once

#include <vector>

#include "ops.h"
#include "product.h"

namespace lowbit {

class FixedProduct : public mx::Primitive {
 public:
  // weights: what follows x in ProductInputs::list(). columns: N of all outputs together.
  FixedProduct(mx::Stream stream, ProductKind kind, std::vector<mx::array> weights, int columns)
      : Primitive(stream), kind_(kind), weights_(std::move(weights)), columns_(columns) {}

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override;
  void eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override;
  const char* name() const override { return "LowbitFixedProduct"; }
  bool is_equivalent(const mx::Primitive& other) const override;

 private:
  template <class Launch>
  void eval(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs,
            const Launch& launch);

  ProductKind kind_;
  std::vector<mx::array> weights_;
  int columns_;
};

// quantized_matmul(x [..., K], w [N, K], ...) cut along N into one array for each of `shapes`,
// in their order: shapes with as many elements for each row of x as the part has columns. A
// single shape may be any; of several, the first dimensions of each are the rows. Nothing when
// this is no product for FixedProduct: another result dtype than x's, weights that are no
// evaluated arrays, no kernel of ours that multiplies without decoding the weights first.
// Refuses what quantized_matmul refuses.
std::vector<mx::array> fixed_product(const mx::array& x, const mx::array& w,
                                     const mx::array& scales, const OptionalArray& biases,
                                     const OptionalArray& bias, Format,
                                     const std::vector<std::vector<int>>& shapes,
                                     mx::StreamOrDevice s);

}  // namespace lowbit
