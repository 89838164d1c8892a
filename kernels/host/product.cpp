#include "product.h"

#include "backend.h"
#include "mlx/ops.h"

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

mx::array Product::make(const ProductKind& kind, const ProductInputs& in,
                        mx::StreamOrDevice s) {
  const mx::Stream stream = mx::to_stream(s);
  const auto primitive = std::make_shared<Product>(stream, kind);
  auto shape = primitive->output_shapes(in.list())[0];
  if (const auto y = product_by_mlx(primitive, in, shape)) return *y;
  auto inputs = in.list();
  if (stream.device == mx::Device::gpu && gpu_loaded()) {
    if (!gpu().takes_strides) inputs[0] = mx::contiguous(in.x, false, stream);
    if (gpu().prepare) gpu().prepare(problem_of(kind, in), stream.device.index);
  }
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
