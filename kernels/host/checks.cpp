#include "checks.h"

#include <unistd.h>

#include <cstdlib>
#include <limits>

#include "backend.h"
#include "mlx/ops.h"
#include "mlx/transforms.h"

namespace lowbit {

namespace {

bool is_activation(mx::Dtype d) {
  return d == mx::float32 || d == mx::float16 || d == mx::bfloat16;
}

constexpr double kUnknown = 1e18;  // bytes

double main_memory() {
  static const double available = [] {
    const long pages = sysconf(_SC_PHYS_PAGES), size = sysconf(_SC_PAGE_SIZE);
    return pages > 0 && size > 0 ? double(pages) * double(size) : kUnknown;
  }();
  return available;
}

double gpu_memory(int device) {
  return gpu_loaded() ? double(gpu().total_memory(device)) : kUnknown;
}

}  // namespace

void Checks::activations(const char* argument, const mx::array& x) const {
  if (!is_activation(x.dtype()))
    refuse(argument, " must be float32, float16 or bfloat16, got ", x.dtype());
  if (x.ndim() < 1) refuse(argument, " must have at least 1 dimension, got a scalar");
  memory(argument, x.shape(), x.dtype());
}

std::pair<int, int> Checks::weights(const mx::array& w, const mx::array& scales,
                                    const OptionalArray& biases) const {
  const FormatInfo& f = info();
  const auto what = [&] {
    std::ostringstream s;
    s << f.mode << " (" << f.bits << " bits, group size " << f.group_size << ")";
    return s.str();
  };
  if (w.dtype() != mx::uint32) refuse("w must be uint32 (packed codes), got ", w.dtype());
  if (w.ndim() < 2) refuse("w must have at least 2 dimensions, got shape ", w.shape());
  memory("w", w.shape(), w.dtype());
  const int64_t bits = int64_t(w.shape(-1)) * 32, columns = bits / f.bits;
  if (bits % f.bits != 0 || columns % f.group_size != 0)
    refuse("w of shape ", w.shape(), " does not hold whole groups of ", what(), ": ",
           w.shape(-1), " words a row are ", bits, " bits, expected a multiple of ",
           f.bits * f.group_size);
  if (columns > std::numeric_limits<int>::max())
    refuse("w of shape ", w.shape(), " has rows of ", columns,
           " elements, more than an array holds");
  mx::Shape expected = w.shape();
  expected.back() = int(columns / f.group_size);
  if (scales.shape() != expected)
    refuse("scales must have shape ", expected, " for w of shape ", w.shape(), " in ", what(),
           ", got ", scales.shape());
  if (f.affine()) {
    if (!is_activation(scales.dtype()))
      refuse("scales must be float32, float16 or bfloat16 in mode affine, got ",
             scales.dtype());
    if (!biases) refuse("biases are required in mode affine, got None");
    if (biases->shape() != expected)
      refuse("biases must have shape ", expected, " like scales, got ", biases->shape());
    if (!is_activation(biases->dtype()))
      refuse("biases must be float32, float16 or bfloat16, got ", biases->dtype());
  } else {
    if (scales.dtype() != mx::uint8)
      refuse("scales must be uint8 in mode ", f.mode, ", got ", scales.dtype());
    if (biases) refuse("biases must be None in mode ", f.mode, ", got shape ", biases->shape());
  }
  return {w.shape(-2), int(columns)};
}

void Checks::reduction(const mx::array& x, int expected) const {
  if (x.shape(-1) != expected)
    refuse("the last dimension of x must be ", expected, " to match w, got x of shape ",
           x.shape());
}

void Checks::bias(const OptionalArray& bias, const mx::Shape& expected) const {
  if (!bias) return;
  if (!is_activation(bias->dtype()))
    refuse("bias must be float32, float16 or bfloat16, got ", bias->dtype());
  if (bias->shape() != expected)
    refuse("bias must have shape ", expected, ", got ", bias->shape());
}

void Checks::global_scale(const char* argument, const OptionalArray& scale,
                          int64_t matrices) const {
  if (!scale) return;
  if (info().mode != "nvfp4")
    refuse(argument, " is only meaningful in mode nvfp4, got mode ", info().mode);
  const int64_t size = int64_t(scale->size());
  if (scale->dtype() != mx::float32 || (size != 1 && size != matrices)) {
    std::ostringstream expected;
    expected << "one float32 value";
    if (matrices > 1) expected << " or " << matrices << ", one for each matrix";
    refuse(argument, " must be ", expected.str(), ", got ", scale->dtype(), " of shape ",
           scale->shape());
  }
}

void Checks::memory(const char* what, const mx::Shape& shape, mx::Dtype dtype) const {
  const bool on_gpu = device_ == mx::Device::gpu;
  const double available = on_gpu ? gpu_memory(device_.index) : main_memory();
  double bytes = double(size_of(dtype));
  for (int n : shape) bytes *= n;
  if (bytes > available)
    refuse(what, " of shape ", shape, " and dtype ", dtype, " would take ", bytes / 1e9,
           " GB, more than the memory of this ", on_gpu ? "GPU" : "machine");
}

void Checks::range(const char* argument, mx::array indices, int64_t end) const {
  static const bool enabled = [] {
    const char* text = std::getenv("MLX_LOWBIT_CHECK");
    return text && *text && *text != '0';
  }();
  if (!enabled || indices.size() == 0 || indices.is_tracer()) return;
  const int64_t low = astype(min(indices), mx::int64).item<int64_t>();
  const int64_t high = astype(max(indices), mx::int64).item<int64_t>();
  if (low < 0 || high >= end)
    refuse(argument, " must lie in [0, ", end, "), got values from ", low, " to ", high);
}

}  // namespace lowbit
