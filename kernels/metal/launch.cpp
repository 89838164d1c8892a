// From MLX arrays to kernel arguments and onto MLX's command encoder. The only file of the
// Metal backend that knows MLX.
//
// Kernels are compiled by the device, an instance at a time, when a product first needs it
// (`prepare`); MLX keeps libraries and pipelines for the life of the process.
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

#include "../host/backend.h"
#include "args.h"
#include "mlx/allocator.h"
#include "mlx/backend/metal/device.h"
#include "source.h"

namespace lowbit::metal {

namespace {

using namespace metal_args;
namespace mm = mx::metal;

mm::Device& device_at(int index) { return mm::device(mx::Device(mx::Device::gpu, index)); }

Device described(int index) {
  const std::string& architecture = device_at(index).get_architecture();
  return {architecture.empty() ? 'g' : architecture.back()};
}

// Values of the function constants, by index.
struct Constants {
  int y_type = 0, scale_type = 0, bias_type = -1;
  bool has_global_x = false, has_global_w = false, gather = false, grouped = false;

  mm::MTLFCList list() const {
    return {{&y_type, MTL::DataTypeInt, kYType},
            {&scale_type, MTL::DataTypeInt, kScaleType},
            {&bias_type, MTL::DataTypeInt, kBiasType},
            {&has_global_x, MTL::DataTypeBool, kHasGlobalX},
            {&has_global_w, MTL::DataTypeBool, kHasGlobalW},
            {&gather, MTL::DataTypeBool, kGather},
            {&grouped, MTL::DataTypeBool, kGrouped}};
  }
  std::string text() const {
    std::string all;
    for (int value : {y_type, scale_type, bias_type, int(has_global_x), int(has_global_w),
                      int(gather), int(grouped)})
      all += "_" + std::to_string(value);
    return all;
  }
};

// The instance with those constants; compiled when it is first asked for.
MTL::ComputePipelineState* pipeline(const Instance& instance, const Constants& constants,
                                    int index) {
  const std::string entry = name(instance);
  mm::Device& device = device_at(index);
  MTL::Library* library =
      device.get_library("lowbit_" + entry, [&] { return text({instance}); });
  return device.get_kernel(entry, library, entry + constants.text(), constants.list());
}

// Tries every instance once: what a compiler refused it refuses again.
void prepare(const Instance& instance, const Constants& constants, int index) {
  static std::mutex mutex;
  static auto& words = *new std::map<std::string, std::string>;  // empty: compiled
  const std::string key = name(instance) + constants.text();
  const std::lock_guard lock(mutex);
  auto found = words.find(key);
  if (found == words.end()) {
    std::string refusal;
    try {
      pipeline(instance, constants, index);
    } catch (const std::exception& error) {
      refusal = name(instance) + ": " + error.what();
    }
    found = words.emplace(key, refusal).first;
  }
  if (!found->second.empty()) throw KernelRefused(found->second);
}

bool poison() {
  static const bool asked = [] {
    const char* text = std::getenv("MLX_LOWBIT_POISON");
    return text && *text && *text != '0';
  }();
  return asked;
}

// Memory that no kernel under way uses: MLX keeps what those use. MLX_LOWBIT_POISON=1 fills it
// with NaN, so that an element nobody writes shows.
void allocate(mx::array& a) {
  a.set_data(mx::allocator::malloc(a.nbytes()));
  if (poison()) std::memset(a.data<void>(), 0xff, a.nbytes());
}

// One kernel on the encoder of a stream.
class Launch {
 public:
  Launch(const Instance& instance, const Constants& constants, mx::Stream stream)
      : encoder_(mm::get_command_encoder(stream)),
        pipeline_(pipeline(instance, constants, stream.device.index)) {
    encoder_.set_compute_pipeline_state(pipeline_);
  }

  Launch& in(const std::optional<mx::array>& a, int index) {
    if (a) encoder_.set_input_array(*a, index);
    return *this;
  }
  // A weight, which may belong to the primitive instead of being an input that MLX keeps.
  Launch& weight(const std::optional<mx::array>& a, int index) {
    if (a) encoder_.add_temporary(*a);
    return in(a, index);
  }
  Launch& out(mx::array& a, int index) {
    encoder_.set_output_array(a, index);
    return *this;
  }
  template <class Args>
  Launch& args(const Args& a) {
    encoder_.set_bytes(a, 0);
    return *this;
  }
  // Registers may leave a pipeline fewer threads than a plan asks for.
  int simdgroups(int most) const {
    return std::max(1, std::min(most, int(pipeline_->maxTotalThreadsPerThreadgroup()) / 32));
  }
  void run(int64_t x, int64_t y, int64_t z, int simdgroups) {
    encoder_.dispatch_threadgroups(MTL::Size(x, y, z), MTL::Size(32 * simdgroups, 1, 1));
  }

 private:
  mm::CommandEncoder& encoder_;
  MTL::ComputePipelineState* pipeline_;
};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

mx::array temporary(mx::Shape shape, mx::Dtype dtype, mx::Stream stream) {
  mx::array a(std::move(shape), dtype, nullptr, {});
  allocate(a);
  mm::get_command_encoder(stream).add_temporary(a);
  return a;
}

// quantize, dequantize and round_trip: a thread a chunk of 32 elements.
constexpr int kElementSimdgroups = 2;

QuantizeArgs element_args(Format format, size_t elements) {
  return {int64_t(elements) / kFormats[int(format)].group_size};
}

void run_elements(Launch& launch, size_t elements) {
  const int simdgroups = launch.simdgroups(kElementSimdgroups);
  launch.run(ceil_div(int64_t(elements), 32 * 32 * simdgroups), 1, 1, simdgroups);
}

int scale_number(Format format, const mx::array& scales) {
  return kFormats[int(format)].affine() ? int(dtype_of(scales.dtype())) : 0;
}

mx::array round_trip(Format format, const mx::array& x, const std::optional<mx::array>& global,
                     mx::Stream stream) {
  mx::array rounded = temporary(x.shape(), mx::bfloat16, stream);
  const Constants constants{.has_global_x = global.has_value()};
  Launch launch({Kernel::round_trip, format, dtype_of(x.dtype()), 0}, constants, stream);
  launch.args(element_args(format, x.size())).in(x, kQValues).out(rounded, kQCodes);
  launch.in(global, kQGlobal);
  run_elements(launch, x.size());
  return rounded;
}

mx::array sorted_rows(const mx::array& rhs, int M, int pairs, int matrices, mx::Stream stream) {
  mx::array groups = temporary({pairs * M + matrices + 2}, mx::int32, stream);
  Launch launch({Kernel::group, Format(0), Dtype::f32, 0}, {}, stream);
  launch.args(GroupArgs{M, pairs, matrices}).in(rhs, 1).out(groups, 2);
  launch.run(1, 1, 1, launch.simdgroups(32));
  return groups;
}

Instance instance_of(const Problem& p, const Plan& plan) {
  return {plan.kernel, p.format, p.quantize_x ? Dtype::bf16 : p.dtype, plan.tokens};
}

void launch(const ProductKind& kind, const ProductInputs& in, mx::array& out,
            mx::Stream stream) {
  if (kind.format == Format::dense)
    throw std::runtime_error("[lowbit] internal: dense products on the GPU are MLX's");
  const Problem p = problem_of(kind, in);
  const Plan plan = metal::plan(p, described(stream.device.index));
  const ProductShape s = ProductShape::of(kind, in);
  const int matrices = int(s.w_matrices);
  const Constants constants{
      .y_type = int(p.dtype),
      .scale_type = scale_number(p.format, *in.scales),
      .bias_type = in.bias ? int(dtype_of(in.bias->dtype())) : -1,
      .has_global_x = in.global_x.has_value(),
      .has_global_w = in.global_w.has_value(),
      .gather = kind.gather,
      .grouped = plan.grouped,
  };
  allocate(out);
  const mx::array x =
      kind.quantize_x ? round_trip(kind.format, in.x, in.global_x, stream) : in.x;
  std::optional<mx::array> groups;
  if (plan.grouped) groups = sorted_rows(*in.rhs, int(s.M), int(s.pairs), matrices, stream);

  Launch launch(instance_of(p, plan), constants, stream);
  launch.args(ProductArgs{int(s.M), int(s.N), int(s.K), int(s.pairs), int(s.x_matrices),
                          matrices, in.global_w ? int(in.global_w->size()) : 0});
  launch.in(x, kX).weight(in.w, kW).weight(in.scales, kScales).weight(in.biases, kBiases);
  launch.weight(in.bias, kBias).in(in.global_x, kGlobalX).in(in.global_w, kGlobalW);
  launch.in(in.lhs, kLhs).in(in.rhs, kRhs).in(groups, kGroups).out(out, kY);

  const int simdgroups = launch.simdgroups(plan.simdgroups);
  const int64_t w_tiles = ceil_div(s.N, int64_t(rows_of_simdgroup(plan)) * simdgroups);
  if (plan.grouped)  // each matrix may end in a tile that is not full
    launch.run(w_tiles, s.pairs * s.M / plan.tokens + matrices + 1, 1, simdgroups);
  else
    launch.run(w_tiles, ceil_div(s.M, plan.tokens), s.pairs, simdgroups);
}

void launch_quantize(Format format, const mx::array& w,
                     const std::optional<mx::array>& global_scale,
                     std::vector<mx::array>& outputs, mx::Stream stream) {
  for (mx::array& out : outputs) allocate(out);
  const Dtype dtype = dtype_of(w.dtype());
  const Constants constants{.scale_type = scale_number(format, outputs[1]),
                            .has_global_x = global_scale.has_value()};
  Launch launch({Kernel::quantize, format, dtype, 0}, constants, stream);
  launch.args(element_args(format, w.size())).in(w, kQValues).in(global_scale, kQGlobal);
  for (size_t i = 0; i < outputs.size(); i++) launch.out(outputs[i], kQCodes + int(i));
  run_elements(launch, w.size());
}

void launch_dequantize(Format format, const mx::array& w, const mx::array& scales,
                       const std::optional<mx::array>& biases,
                       const std::optional<mx::array>& global_scale, mx::array& out,
                       mx::Stream stream) {
  allocate(out);
  const Constants constants{.scale_type = scale_number(format, scales),
                            .has_global_x = global_scale.has_value()};
  Launch launch({Kernel::dequantize, format, dtype_of(out.dtype()), 0}, constants, stream);
  launch.args(element_args(format, out.size())).out(out, kQValues).in(w, kQCodes);
  launch.in(scales, kQScales).in(biases, kQBiases).in(global_scale, kQGlobal);
  run_elements(launch, out.size());
}

// Constants make no difference to whether an instance compiles.
void prepare_product(const Problem& p, int index) {
  const Plan plan = metal::plan(p, described(index));
  if (p.quantize_x) prepare({Kernel::round_trip, p.format, p.dtype, 0}, {}, index);
  if (plan.grouped) prepare({Kernel::group, Format(0), Dtype::f32, 0}, {}, index);
  prepare(instance_of(p, plan), {}, index);
}

void prepare_elements(Format format, Dtype dtype, bool encode, int index) {
  prepare({encode ? Kernel::quantize : Kernel::dequantize, format, dtype, 0}, {}, index);
}

size_t main_memory(int) {
  return size_t(sysconf(_SC_PHYS_PAGES)) * size_t(sysconf(_SC_PAGE_SIZE));
}

}  // namespace

}  // namespace lowbit::metal

const lowbit::Backend* lowbit::metal_backend() {
  static const Backend backend{
      .build = LOWBIT_BUILD,
      .refusal = [](int) { return std::string(); },
      .total_memory = metal::main_memory,
      .memory_use = [](int) { return MemoryUse{}; },
      .reset_peak = [](int) {},
      .launch = metal::launch,
      .launch_quantize = metal::launch_quantize,
      .launch_dequantize = metal::launch_dequantize,
      .takes_cache_step = nullptr,
      .cache_step = nullptr,
      .prepare = metal::prepare_product,
      .prepare_elements = metal::prepare_elements,
      .takes_strides = false,
      .on_tensor_cores = [](const Problem&, int) { return false; },
      .route = [](const Problem& p, int) { return metal::route(p); },
      .explain =
          [](const Problem& p, int index) {
            const metal::Device device = metal::described(index);
            return metal::describe(p, metal::plan(p, device), device);
          },
  };
  return &backend;
}
