#include "product.h"

#include "backend.h"
#include "mlx/ops.h"
#include "ops.h"

namespace lowbit {

std::vector<mx::Shape> Product::output_shapes(const std::vector<mx::array>& inputs) {
  const ProductInputs in = ProductInputs::of(kind_, inputs);
  const int N = int(ProductShape::of(kind_, in).N);
  mx::Shape shape = kind_.gather ? in.rhs->shape() : in.x.shape();
  if (kind_.gather) {
    shape.push_back(in.x.shape(-2));
    shape.push_back(N);
  } else {
    shape.back() = N;
  }
  return {shape};
}

namespace {

// Two-byte results that a GPU has no tensor-core kernel of ours for, but MLX has cuBLAS: its
// matmul over the decoded weights is several times faster than plain float32 arithmetic, and
// rounding weights once to the type of the result is within that type's bound.
bool decode_first(const ProductKind& kind, const ProductInputs& in, mx::Stream stream) {
  if (stream.device != mx::Device::gpu || !cuda_loaded()) return false;
  if (kind.gather || kind.quantize_x) return false;
  const ProductShape s = ProductShape::of(kind, in);
  const Dtype dtype = dtype_of(in.x.dtype());
  return gpu().decodes_first({kind.format, dtype, dtype, s.M, s.N, s.K, kind.transpose},
                             stream.device.index);
}

mx::array decoded_product(const ProductKind& kind, const ProductInputs& in,
                          const mx::Shape& shape, mx::Stream s) {
  const mx::Dtype dtype = in.x.dtype();
  mx::array w = dequantize(in.w, *in.scales, in.biases, kind.format, in.global_w, dtype, s);
  if (kind.transpose) w = transpose(w, s);
  const mx::array rows = reshape(in.x, {-1, in.x.shape(-1)}, s);
  return reshape(
      in.bias ? addmm(astype(*in.bias, dtype, s), rows, w, 1.0f, 1.0f, s) : matmul(rows, w, s),
      shape, s);
}

}  // namespace

mx::array Product::make(const ProductKind& kind, const ProductInputs& in,
                        mx::StreamOrDevice s) {
  const mx::Stream stream = mx::to_stream(s);
  const auto primitive = std::make_shared<Product>(stream, kind);
  auto inputs = in.list();
  auto shape = primitive->output_shapes(inputs)[0];
  if (decode_first(kind, in, stream)) return decoded_product(kind, in, shape, stream);
  return mx::array(std::move(shape), in.x.dtype(), primitive, std::move(inputs));
}

void Product::eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  cpu::launch(kind_, ProductInputs::of(kind_, inputs), outputs[0], stream());
}

void Product::eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  gpu().launch(kind_, ProductInputs::of(kind_, inputs), outputs[0], stream());
}

bool Product::is_equivalent(const mx::Primitive& other) const {
  return kind_ == static_cast<const Product&>(other).kind_;
}

}  // namespace lowbit
