#include "quantize.h"

#include "backend.h"
#include "checks.h"
#include "mlx/ops.h"
#include "ops.h"

namespace lowbit {

using mx::array;

namespace {

const FormatInfo& info(Format format) { return kFormats[int(format)]; }

// The optional input at position `i`.
OptionalArray input(const std::vector<array>& inputs, size_t i) {
  return i < inputs.size() ? OptionalArray(inputs[i]) : std::nullopt;
}

// Compiles the kernel where that has to be done here.
void prepare(Format format, mx::Dtype dtype, bool encode, mx::Stream stream) {
  if (stream.device == mx::Device::gpu && gpu_loaded() && gpu().prepare_elements)
    gpu().prepare_elements(format, dtype_of(dtype), encode, stream.device.index);
}

// Moves every batch axis to the front; arrays without one are repeated.
std::vector<array> batched(const std::vector<array>& inputs, const std::vector<int>& axes,
                           size_t count, mx::Stream stream) {
  int batch = 1;
  for (size_t i = 0; i < inputs.size(); i++)
    if (axes[i] >= 0) batch = inputs[i].shape(axes[i]);
  std::vector<array> out;
  for (size_t i = 0; i < inputs.size(); i++) {
    array a = inputs[i];
    if (i >= count) {
      if (axes[i] >= 0)
        throw std::invalid_argument("[lowbit] vmap over global_scale is not supported");
    } else if (axes[i] >= 0) {
      a = contiguous(moveaxis(a, axes[i], 0, stream), false, stream);
    } else {
      mx::Shape wide = a.shape();
      wide.insert(wide.begin(), batch);
      a = contiguous(broadcast_to(expand_dims(a, 0, stream), wide, stream), false, stream);
    }
    out.push_back(a);
  }
  return out;
}

mx::Shape unpacked(const mx::Shape& codes, const FormatInfo& f) {
  mx::Shape shape = codes;
  shape.back() = int(int64_t(shape.back()) * 32 / f.bits);
  return shape;
}

}  // namespace

std::vector<mx::Shape> Quantize::output_shapes(const std::vector<array>& inputs) {
  const FormatInfo& f = info(format_);
  mx::Shape codes = inputs[0].shape(), groups = codes;
  codes.back() = int(int64_t(codes.back()) * f.bits / 32);
  groups.back() /= f.group_size;
  if (f.affine()) return {codes, groups, groups};
  return {codes, groups};
}

std::vector<mx::Dtype> Quantize::output_dtypes(const array& w) const {
  if (info(format_).affine()) return {mx::uint32, w.dtype(), w.dtype()};
  return {mx::uint32, mx::uint8};
}

void Quantize::eval_cpu(const std::vector<array>& inputs, std::vector<array>& outputs) {
  cpu::launch_quantize(format_, inputs[0], input(inputs, 1), outputs, stream());
}

void Quantize::eval_gpu(const std::vector<array>& inputs, std::vector<array>& outputs) {
  gpu().launch_quantize(format_, inputs[0], input(inputs, 1), outputs, stream());
}

std::pair<std::vector<array>, std::vector<int>> Quantize::vmap(const std::vector<array>& inputs,
                                                               const std::vector<int>& axes) {
  const auto in = batched(inputs, axes, 1, stream());
  auto out = array::make_arrays(output_shapes(in), output_dtypes(in[0]),
                                std::make_shared<Quantize>(stream(), format_), in);
  std::vector<int> fronts(out.size(), 0);
  return {std::move(out), std::move(fronts)};
}

std::vector<mx::Shape> Dequantize::output_shapes(const std::vector<array>& inputs) {
  return {unpacked(inputs[0].shape(), info(format_))};
}

void Dequantize::eval_cpu(const std::vector<array>& inputs, std::vector<array>& outputs) {
  const bool affine = info(format_).affine();
  cpu::launch_dequantize(format_, inputs[0], inputs[1],
                         affine ? OptionalArray(inputs[2]) : std::nullopt,
                         input(inputs, affine ? 3 : 2), outputs[0], stream());
}

void Dequantize::eval_gpu(const std::vector<array>& inputs, std::vector<array>& outputs) {
  const bool affine = info(format_).affine();
  gpu().launch_dequantize(format_, inputs[0], inputs[1],
                          affine ? OptionalArray(inputs[2]) : std::nullopt,
                          input(inputs, affine ? 3 : 2), outputs[0], stream());
}

// d scale = sum over the group of dy * q, d bias = sum of dy.
std::vector<array> Dequantize::vjp(const std::vector<array>& primals,
                                   const std::vector<array>& cotangents,
                                   const std::vector<int>& argnums, const std::vector<array>&) {
  const FormatInfo& f = info(format_);
  std::vector<array> grads;
  for (int a : argnums) {
    if (!f.affine() || a == 0)
      throw std::invalid_argument(
          "[lowbit] dequantize has derivatives with respect to affine "
          "scales and biases only");
    array dy = astype(cotangents[0], mx::float32, stream());
    if (a == 1) {
      const array one = ones(primals[1].shape(), mx::float32, stream());
      dy = multiply(dy,
                    dequantize(primals[0], one, zeros_like(one, stream()), format_,
                               std::nullopt, mx::float32, stream()),
                    stream());
    }
    mx::Shape split = primals[size_t(a)].shape();
    split.push_back(f.group_size);
    grads.push_back(astype(sum(reshape(dy, split, stream()), -1, false, stream()),
                           primals[size_t(a)].dtype(), stream()));
  }
  return grads;
}

std::pair<std::vector<array>, std::vector<int>> Dequantize::vmap(
    const std::vector<array>& inputs, const std::vector<int>& axes) {
  const auto in = batched(inputs, axes, info(format_).affine() ? 3 : 2, stream());
  return {{array(output_shapes(in)[0], dtype_,
                 std::make_shared<Dequantize>(stream(), format_, dtype_), in)},
          {0}};
}

std::tuple<array, array, OptionalArray> quantize(const array& w, Format format,
                                                 const OptionalArray& global_scale,
                                                 mx::StreamOrDevice s) {
  const Checks check("quantize", format, s);
  const FormatInfo& f = info(format);
  check.activations("w", w);
  if (w.ndim() < 2) check.refuse("w must have at least 2 dimensions, got shape ", w.shape());
  if (w.shape(-1) % f.group_size != 0) {
    std::ostringstream fitting;
    for (const FormatInfo& other : kFormats)
      if (other.mode == f.mode && other.bits == f.bits && w.shape(-1) % other.group_size == 0)
        fitting << (fitting.tellp() ? ", " : "") << other.group_size;
    check.refuse("the last dimension of w must be a multiple of group_size ", f.group_size,
                 ", got shape ", w.shape(),
                 "; group sizes that fit: ", fitting.tellp() ? fitting.str() : "none");
  }
  check.global_scale("global_scale", global_scale);
  const mx::Stream stream = mx::to_stream(s);
  prepare(format, w.dtype(), true, stream);
  const auto primitive = std::make_shared<Quantize>(stream, format);
  std::vector<array> inputs{contiguous(w, false, s)};
  if (global_scale) inputs.push_back(*global_scale);
  const auto shapes = primitive->output_shapes(inputs);
  const auto dtypes = primitive->output_dtypes(inputs[0]);
  std::vector<array> out;
  if (w.size() == 0) {
    for (size_t i = 0; i < shapes.size(); i++) out.push_back(zeros(shapes[i], dtypes[i], s));
  } else {
    out = array::make_arrays(shapes, dtypes, primitive, inputs);
  }
  return {out[0], out[1], out.size() > 2 ? OptionalArray(out[2]) : std::nullopt};
}

array dequantize(const array& w, const array& scales, const OptionalArray& biases,
                 Format format, const OptionalArray& global_scale,
                 std::optional<mx::Dtype> dtype, mx::StreamOrDevice s) {
  const Checks check("dequantize", format, s);
  check.weights(w, scales, biases);
  check.global_scale("global_scale", global_scale);
  const bool affine = info(format).affine();
  const mx::Dtype natural =
      affine ? promote_types(scales.dtype(), biases->dtype()) : mx::bfloat16;
  const mx::Dtype out = dtype.value_or(natural);
  if (out != mx::float32 && out != mx::float16 && out != mx::bfloat16)
    check.refuse("dtype must be float32, float16 or bfloat16, got ", out);
  const mx::Shape shape = unpacked(w.shape(), info(format));
  if (w.size() == 0) return zeros(shape, out, s);
  std::vector<array> inputs{contiguous(w, false, s), contiguous(scales, false, s)};
  if (affine) {
    inputs[1] = contiguous(astype(scales, natural, s), false, s);
    inputs.push_back(contiguous(astype(*biases, natural, s), false, s));
  }
  if (global_scale) inputs.push_back(*global_scale);
  const mx::Stream stream = mx::to_stream(s);
  prepare(format, out, false, stream);
  return array(shape, out, std::make_shared<Dequantize>(stream, format, out), inputs);
}

}  // namespace lowbit
