// The primitives behind quantize and dequantize.
#pragma once

#include <optional>
#include <vector>

#include "mlx/array.h"
#include "mlx/primitives.h"
#include "mlx/utils.h"
#include "problem.h"

namespace lowbit {

namespace mx = mlx::core;

// w [..., K] -> codes [..., K * bits / 32], scales [..., K / group], affine: biases as scales.
// Inputs: w, optionally global_scale.
class Quantize : public mx::Primitive {
 public:
  Quantize(mx::Stream stream, Format format) : Primitive(stream), format_(format) {}
  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override;
  void eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override;
  std::pair<std::vector<mx::array>, std::vector<int>> vmap(
      const std::vector<mx::array>& inputs, const std::vector<int>& axes) override;
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override;
  std::vector<mx::Dtype> output_dtypes(const mx::array& w) const;
  const char* name() const override { return "LowbitQuantize"; }
  bool is_equivalent(const mx::Primitive& other) const override {
    return format_ == static_cast<const Quantize&>(other).format_;
  }

 private:
  Format format_;
};

// The reverse. Inputs: codes, scales, affine: biases, optionally global_scale.
class Dequantize : public mx::Primitive {
 public:
  Dequantize(mx::Stream stream, Format format, mx::Dtype dtype)
      : Primitive(stream), format_(format), dtype_(dtype) {}
  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override;
  void eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override;
  std::vector<mx::array> vjp(const std::vector<mx::array>& primals,
                             const std::vector<mx::array>& cotangents,
                             const std::vector<int>& argnums,
                             const std::vector<mx::array>& outputs) override;
  std::pair<std::vector<mx::array>, std::vector<int>> vmap(
      const std::vector<mx::array>& inputs, const std::vector<int>& axes) override;
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override;
  const char* name() const override { return "LowbitDequantize"; }
  bool is_equivalent(const mx::Primitive& other) const override {
    const auto& o = static_cast<const Dequantize&>(other);
    return format_ == o.format_ && dtype_ == o.dtype_;
  }

 private:
  Format format_;
  mx::Dtype dtype_;
};

}  // namespace lowbit
