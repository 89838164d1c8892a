#include "fixed_product.h"

#include "backend.h"
#include "checks.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/ops.h"

namespace lowbit {

namespace {

int64_t elements(const mx::Shape& shape) {
  int64_t n = 1;
  for (int d : shape) n *= d;
  return n;
}

// How many leading dimensions of a part make its rows; -1 where none do.
int row_dimensions(const mx::Shape& shape, int64_t rows) {
  int64_t product = 1;
  int d = 0;
  while (product < rows && d < int(shape.size())) product *= shape[d++];
  return product == rows ? d : -1;
}

// In row order, and dense.
mx::Strides packed(const mx::Shape& shape) {
  mx::Strides strides(shape.size(), 1);
  for (int d = int(shape.size()) - 2; d >= 0; d--) strides[d] = strides[d + 1] * shape[d + 1];
  return strides;
}

}  // namespace

// The whole product is one array [rows, columns]; outputs are views of it.
template <class Launch>
void FixedProduct::eval(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs,
                        const Launch& launch) {
  std::vector<mx::array> all{inputs[0]};
  all.insert(all.end(), weights_.begin(), weights_.end());
  const ProductInputs in = ProductInputs::of(kind_, all);
  if (outputs.size() == 1) return launch(in, outputs[0]);
  const int64_t rows = inputs[0].size() / size_t(inputs[0].shape(-1));
  mx::array whole(mx::Shape{int(rows), columns_}, outputs[0].dtype(), nullptr, {});
  launch(in, whole);
  int64_t at = 0;
  for (mx::array& out : outputs) {
    mx::Strides strides = packed(out.shape());
    mx::array::Flags flags{true, true, false};
    size_t size = out.size();
    const int64_t own = int64_t(out.size()) / rows;
    if (rows > 1) {
      for (int d = 0; d < row_dimensions(out.shape(), rows); d++)
        strides[d] = strides[d] / own * columns_;
      flags = {false, false, false};
      size = size_t(rows - 1) * columns_ + own;
    }
    flags.col_contiguous = flags.row_contiguous && out.size() == size_t(out.shape(-1));
    out.copy_shared_buffer(whole, strides, flags, size, at);
    at += own;
  }
}

void FixedProduct::eval_cpu(const std::vector<mx::array>& inputs,
                            std::vector<mx::array>& outputs) {
  auto& encoder = mx::cpu::get_command_encoder(stream());
  for (const mx::array& each : weights_) encoder.add_temporary(each);
  eval(inputs, outputs,
       [&](const ProductInputs& in, mx::array& out) { cpu::launch(kind_, in, out, stream()); });
}

void FixedProduct::eval_gpu(const std::vector<mx::array>& inputs,
                            std::vector<mx::array>& outputs) {
  eval(inputs, outputs, [&](const ProductInputs& in, mx::array& out) {
    gpu().launch(kind_, in, out, stream());
  });
}

bool FixedProduct::is_equivalent(const mx::Primitive& other) const {
  const auto& o = static_cast<const FixedProduct&>(other);
  if (kind_ != o.kind_ || weights_.size() != o.weights_.size()) return false;
  for (size_t i = 0; i < weights_.size(); i++)
    if (weights_[i].id() != o.weights_[i].id()) return false;
  return true;
}

std::vector<mx::array> fixed_product(const mx::array& x, const mx::array& w,
                                     const mx::array& scales, const OptionalArray& biases,
                                     const OptionalArray& bias, Format format,
                                     const std::vector<std::vector<int>>& shapes,
                                     mx::StreamOrDevice s) {
  const Checks check("fixed_product", format, s);
  check.activations("x", x);
  const auto [N, K] = check.weights(w, scales, biases);
  check.reduction(x, K);
  check.bias(bias, {N});
  ProductKind kind{.format = format};
  kind.scales = true;
  kind.biases = biases.has_value();
  kind.bias = bias.has_value();
  const mx::Dtype dtype = x.dtype();
  if (w.ndim() != 2 || x.size() == 0) return {};
  if (biases &&
      (scales.dtype() != biases->dtype() || promote_types(dtype, scales.dtype()) != dtype))
    return {};
  if (bias && bias->dtype() != dtype && bias->dtype() != mx::float32) return {};
  std::vector<mx::array> weights{w, scales};
  for (const OptionalArray* each : {&biases, &bias})
    if (*each) weights.push_back(**each);
  for (const mx::array& each : weights)
    if (each.is_tracer() || !each.is_available() || !each.flags().row_contiguous) return {};
  const mx::Stream stream = mx::to_stream(s);
  const int64_t rows = int64_t(x.size()) / K;
  if (stream.device == mx::Device::gpu) {
    const Problem problem{format, dtype_of(dtype), dtype_of(dtype), rows, N, K, true};
    if (!gpu().on_tensor_cores(problem, stream.device.index)) return {};
  }
  std::vector<mx::Shape> parts;
  int64_t columns = 0;
  for (const auto& each : shapes) {
    parts.emplace_back(each.begin(), each.end());
    const int64_t n = elements(parts.back());
    if (n % rows != 0 || (shapes.size() > 1 && row_dimensions(parts.back(), rows) < 0))
      check.refuse("a part of shape ", parts.back(), " is no columns of ", rows, " rows");
    columns += n / rows;
  }
  if (columns != N) check.refuse("shapes must hold ", N, " columns together, got ", columns);
  return mx::array::make_arrays(
      std::move(parts), std::vector<mx::Dtype>(shapes.size(), dtype),
      std::make_shared<FixedProduct>(stream, kind, std::move(weights), N), {x});
}

}  // namespace lowbit
