// Calls the Metal backend as the primitives do, with arrays from Python.
#include <cstring>

#include "host/backend.h"
#include "mlx/allocator.h"
#include "mock_device.h"

using namespace lowbit;

namespace {

// dtype: 0 float32, 1 float16, 2 bfloat16, 3 uint32, 4 uint8, 5 int64. No data: absent.
struct HostArray {
  void* data;
  int dtype, ndim;
  int shape[4];
};

mx::Dtype dtype_of(const HostArray& a) {
  const mx::Dtype all[] = {mx::float32, mx::float16, mx::bfloat16,
                           mx::uint32,  mx::uint8,   mx::int64};
  return all[a.dtype];
}

mx::array empty(const HostArray& a) {
  return mx::array(mx::Shape(a.shape, a.shape + a.ndim), dtype_of(a), nullptr, {});
}

std::optional<mx::array> value(const HostArray& a) {
  if (!a.data) return {};
  mx::array out = empty(a);
  out.set_data(mx::allocator::malloc(out.nbytes()));
  std::memcpy(out.data<void>(), a.data, out.nbytes());
  out.set_status(mx::array::Status::available);
  return out;
}

template <class F>
int guarded(char* message, size_t length, const F& run) {
  try {
    run();
    return 0;
  } catch (const std::exception& error) {
    std::strncpy(message, error.what(), length - 1);
    return dynamic_cast<const KernelRefused*>(&error) ? 1 : 2;
  }
}

const mx::Stream stream(0, mx::Device::gpu);

}  // namespace

extern "C" {

void set_callbacks(const MockCallbacks* callbacks) { mock_device(*callbacks); }

// Inputs: x, w, scales, biases, bias, global_x, global_w, lhs, rhs. 0: done, 1: the compiler
// refused, 2: another error; `message` says which.
int product(int format, int transpose, int quantize_x, const HostArray* in, HostArray* y,
            char* message, size_t length) {
  return guarded(message, length, [&] {
    ProductInputs inputs{*value(in[0]), *value(in[1]), value(in[2]), value(in[3]), value(in[4]),
                         value(in[5]),  value(in[6]),  value(in[7]), value(in[8])};
    ProductKind kind{Format(format), transpose != 0, quantize_x != 0, inputs.rhs.has_value()};
    kind.scales = inputs.scales.has_value(), kind.biases = inputs.biases.has_value();
    kind.bias = inputs.bias.has_value();
    kind.global_x = inputs.global_x.has_value(), kind.global_w = inputs.global_w.has_value();
    metal_backend()->prepare(problem_of(kind, inputs), 0);
    mx::array out = empty(*y);
    metal_backend()->launch(kind, inputs, out, stream);
    std::memcpy(y->data, out.data<void>(), out.nbytes());
  });
}

// encode: in = w, global; out = codes, scales, biases. Otherwise in = codes, scales, biases,
// global; out = values.
int elements(int format, int encode, const HostArray* in, HostArray* out, int outputs,
             char* message, size_t length) {
  return guarded(message, length, [&] {
    const mx::Dtype dtype = dtype_of(encode ? in[0] : out[0]);
    metal_backend()->prepare_elements(Format(format), lowbit::dtype_of(dtype), encode != 0, 0);
    std::vector<mx::array> results;
    for (int i = 0; i < outputs; i++) results.push_back(empty(out[i]));
    if (encode)
      metal_backend()->launch_quantize(Format(format), *value(in[0]), value(in[1]), results,
                                       stream);
    else
      metal_backend()->launch_dequantize(Format(format), *value(in[0]), *value(in[1]),
                                         value(in[2]), value(in[3]), results[0], stream);
    for (int i = 0; i < outputs; i++)
      std::memcpy(out[i].data, results[i].data<void>(), results[i].nbytes());
  });
}

const char* explain(int format, int dtype, int64_t M, int64_t N, int64_t K) {
  static std::string words;
  const Dtype type{dtype};
  words = metal_backend()->explain({Format(format), type, type, M, N, K, true, false}, 0);
  return words.c_str();
}
}
