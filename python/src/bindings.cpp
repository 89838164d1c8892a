// Python bindings of kernels/host: names, arguments, docstrings. No logic.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include "cpu/kernels.h"
#include "cpu/pool.h"
#include "cuda/plan.h"
#include "formats/affine.h"
#include "formats/mxfp4.h"
#include "formats/mxfp8.h"
#include "formats/nvfp4.h"
#include "host/backend.h"
#include "host/cache_step.h"
#include "host/fixed_product.h"
#include "host/ops.h"
#include "host/plan.h"
#include "metal/source.h"

namespace nb = nanobind;
using namespace nb::literals;
using lowbit::Format;
using lowbit::OptionalArray;
using mlx::core::array;
using mlx::core::StreamOrDevice;

namespace {

// The scale byte that marks a group which is not finite; affine scales are NaN themselves.
template <class F>
constexpr std::optional<int> nan_scale() {
  if constexpr (F::kHasBias)
    return std::nullopt;
  else
    return int(F::kNanScale);
}

// (name, mode, bits, group_size, judged, nan_scale), in the order of the enum.
auto formats() {
  using namespace lowbit;
  std::vector<std::tuple<std::string, std::string, int, int, bool, std::optional<int>>> rows;
#define FORMAT(name, type, mode, bits, group, judged) \
  rows.emplace_back(#name, #mode, bits, group, judged, nan_scale<type>());
#include "formats/formats.def"
#undef FORMAT
  return rows;
}

std::vector<std::string> targets() {
  std::vector<std::string> names;
  for (int i = 0; i < lowbit::cpu::kTargetCount; i++)
    if (lowbit::cpu::kTargets[i].supported()) names.emplace_back(lowbit::cpu::kTargets[i].name);
  return names;
}

}  // namespace

NB_MODULE(_ext, m) {
  m.doc() = "Kernels and MLX primitives of mlx_lowbit; use mlx_lowbit's functions instead.";
  nb::module_::import_("mlx.core");

  m.def("formats", &formats,
        "Rows of formats.def: (name, mode, bits, group_size, judged, nan_scale).");
  m.def("targets", &targets,
        "Instruction sets that this build has and this processor supports, best first.");
  m.def(
      "target", [] { return std::string(lowbit::cpu::target().name); },
      "The instruction set in use.");
  m.def("threads", &lowbit::cpu::thread_count, "Threads of the CPU backend.");
  m.def(
      "same_array", [](const array& a) { return a; }, "a"_a,
      "Its argument: fails when this build and mlx.core do not share the array type.");

  m.def(
      "same_arrays",
      [](nb::args pairs) {
        if (pairs.size() % 2) return false;
        for (size_t i = 0; i < pairs.size(); i += 2) {
          const array *a = nullptr, *b = nullptr;  // null for None
          if (!nb::try_cast(pairs[i], a) || !nb::try_cast(pairs[i + 1], b)) return false;
          if (a == nullptr || b == nullptr ? a != b : a->id() != b->id()) return false;
        }
        return true;
      },
      "Whether (a, b, c, d, ...) are pairs of one array each, or of None. Python objects "
      "cannot "
      "tell: `x += 1` makes the same object another array, and a transformation may leave the "
      "same array in another object.");

  m.def(
      "unchanged",
      [](nb::tuple dicts, nb::list values, nb::list copies) {
        size_t i = 0;
        const size_t count = values.size();
        for (nb::handle each : dicts) {
          PyObject *key = nullptr, *value = nullptr;
          Py_ssize_t at = 0;
          while (PyDict_Next(each.ptr(), &at, &key, &value)) {
            if (i == count || value != PyList_GetItem(values.ptr(), Py_ssize_t(i)))
              return false;
            const nb::handle copy = PyList_GetItem(copies.ptr(), Py_ssize_t(i++));
            if (!copy.is_none() &&
                nb::inst_ptr<array>(nb::handle(value))->id() != nb::inst_ptr<array>(copy)->id())
              return false;
          }
        }
        return i == count;
      },
      "dicts"_a, "values"_a, "copies"_a,
      "Whether the dicts hold these objects, in order, and those that are arrays, with another "
      "object of the same array in copies and None elsewhere, are still the same arrays.");

  m.def(
      "is_tracer", [](const array& a) { return a.is_tracer(); }, "a"_a,
      "Whether an array stands for a value in a function that MLX is transforming.");

  m.def(
      "quantize",
      [](const array& w, int format, const OptionalArray& global_scale, StreamOrDevice s) {
        return lowbit::quantize(w, Format(format), global_scale, s);
      },
      "w"_a, "format"_a, "global_scale"_a = nb::none(), "stream"_a = nb::none(),
      "(codes, scales, biases or None) of w [..., K].");
  m.def(
      "dequantize",
      [](const array& w, const array& scales, const OptionalArray& biases, int format,
         const OptionalArray& global_scale, std::optional<mlx::core::Dtype> dtype,
         StreamOrDevice s) {
        return lowbit::dequantize(w, scales, biases, Format(format), global_scale, dtype, s);
      },
      "w"_a, "scales"_a, "biases"_a.none(), "format"_a, "global_scale"_a = nb::none(),
      "dtype"_a = nb::none(), "stream"_a = nb::none(), "The values that codes stand for.");
  m.def(
      "quantized_matmul",
      [](const array& x, const array& w, const array& scales, const OptionalArray& biases,
         const OptionalArray& bias, bool transpose, int format,
         const OptionalArray& global_scale, StreamOrDevice s) {
        return lowbit::quantized_matmul(x, w, scales, biases, bias, transpose, Format(format),
                                        global_scale, s);
      },
      "x"_a, "w"_a, "scales"_a, "biases"_a.none(), "bias"_a.none(), "transpose"_a, "format"_a,
      "global_scale"_a = nb::none(), "stream"_a = nb::none(), "x @ w^T + bias, w packed.");
  m.def(
      "fixed_product",
      [](const array& x, const array& w, const array& scales, const OptionalArray& biases,
         const OptionalArray& bias, int format, const std::vector<std::vector<int>>& shapes) {
        return lowbit::fixed_product(x, w, scales, biases, bias, Format(format), shapes, {});
      },
      "x"_a, "w"_a, "scales"_a, "biases"_a.none(), "bias"_a.none(), "format"_a, "shapes"_a,
      "x @ w^T + bias cut along N into arrays of these shapes, with weights that belong to the "
      "operation and have no derivatives; an empty list where it cannot be made.");
  m.def(
      "takes_cache_step",
      [](const array& keys, int heads) { return lowbit::takes_cache_step(keys, heads, {}); },
      "keys"_a, "heads"_a, "Whether cache_step takes so many heads of queries for these keys.");
  m.def(
      "cache_step",
      [](const array& keys, const array& values, const array& q, const array& k, const array& v,
         const OptionalArray& periods, int offset, float scale) {
        return lowbit::cache_step(keys, values, q, k, v, periods, offset, scale, {});
      },
      "keys"_a, "values"_a, "q"_a, "k"_a, "v"_a, "periods"_a.none(), "offset"_a, "scale"_a,
      "Attention of one more token of each sequence, and a cache's arrays with that token in "
      "the memory that they have; an empty list where it cannot be made.");
  m.def(
      "qqmm",
      [](const array& x, const array& w, const array& scales, const OptionalArray& bias,
         int format, const OptionalArray& global_scale_x, const OptionalArray& global_scale_w,
         StreamOrDevice s) {
        return lowbit::qqmm(x, w, scales, bias, Format(format), global_scale_x, global_scale_w,
                            s);
      },
      "x"_a, "w"_a, "scales"_a, "bias"_a.none(), "format"_a, "global_scale_x"_a = nb::none(),
      "global_scale_w"_a = nb::none(), "stream"_a = nb::none(),
      "Q(x) @ w^T + bias, w packed, x quantized in the same format.");
  m.def(
      "gather_qmm",
      [](const array& x, const array& w, const array& scales, const OptionalArray& biases,
         const OptionalArray& lhs_indices, const OptionalArray& rhs_indices,
         const OptionalArray& bias, bool transpose, bool quantize_x, int format,
         const OptionalArray& global_scale_x, const OptionalArray& global_scale_w,
         StreamOrDevice s) {
        return lowbit::gather_qmm(x, w, scales, biases, lhs_indices, rhs_indices, bias,
                                  transpose, quantize_x, Format(format), global_scale_x,
                                  global_scale_w, s);
      },
      "x"_a, "w"_a, "scales"_a, "biases"_a.none(), "lhs_indices"_a.none(),
      "rhs_indices"_a.none(), "bias"_a.none(), "transpose"_a, "quantize_x"_a, "format"_a,
      "global_scale_x"_a = nb::none(), "global_scale_w"_a = nb::none(), "stream"_a = nb::none(),
      "Products of chosen matrices of x and w.");
  m.def("linear", &lowbit::linear, "x"_a, "w"_a, "bias"_a = nb::none(), "stream"_a = nb::none(),
        "x @ w^T + bias, w dense.");
  m.def(
      "explain",
      [](const array& x, const array& w, const OptionalArray& scales,
         const OptionalArray& biases, bool transpose, bool quantize_x, int format,
         StreamOrDevice s) {
        return lowbit::explain(x, w, scales, biases, transpose, quantize_x, Format(format), s);
      },
      "x"_a, "w"_a, "scales"_a.none(), "biases"_a.none(), "transpose"_a, "quantize_x"_a,
      "format"_a, "stream"_a = nb::none(), "The plan that would run, in words.");

  m.def(
      "cuda_plan",
      [](int format, int dtype, int64_t M, int64_t N, int64_t K, bool transpose,
         bool quantize_x, int64_t pairs, int64_t matrices, int capability, int processors,
         int shared_bytes) {
        const lowbit::Dtype type{dtype};
        const lowbit::Problem problem{Format(format), type,       type,      M,     N,       K,
                                      transpose,      quantize_x, pairs > 0, pairs, matrices};
        const lowbit::cuda::Device device{capability, processors, shared_bytes};
        const auto plan = lowbit::cuda::plan(problem, device);
        return std::make_tuple(lowbit::cuda::describe(problem, plan, device), int(plan.kernel),
                               plan.tokens, plan.rows, plan.stages, plan.split_k);
      },
      "format"_a, "dtype"_a, "M"_a, "N"_a, "K"_a, "transpose"_a = true, "quantize_x"_a = false,
      "pairs"_a = 0, "matrices"_a = 0, "capability"_a = 90, "processors"_a = 132,
      "shared_bytes"_a = 232448,
      "(words, kernel, tokens, rows, stages, split_k) of a product on a CUDA device that need "
      "not be here, or of `pairs` of M rows with some of `matrices` matrices of w; dtype 0, 1, "
      "2: float32, float16, bfloat16; kernel 0, 1, 2: matvec, matmul, simt.");

  m.def(
      "metal_plan",
      [](int format, int dtype, int64_t M, int64_t N, int64_t K, bool transpose,
         bool quantize_x, int64_t pairs, int64_t matrices, char size) {
        const lowbit::Dtype type{dtype};
        const lowbit::Problem problem{Format(format), type,       type,      M,     N,       K,
                                      transpose,      quantize_x, pairs > 0, pairs, matrices};
        const lowbit::metal::Device device{size};
        const auto plan = lowbit::metal::plan(problem, device);
        return std::make_tuple(lowbit::metal::describe(problem, plan, device), int(plan.kernel),
                               plan.tokens, plan.simdgroups, plan.grouped);
      },
      "format"_a, "dtype"_a, "M"_a, "N"_a, "K"_a, "transpose"_a = true, "quantize_x"_a = false,
      "pairs"_a = 0, "matrices"_a = 0, "size"_a = 'g',
      "(words, kernel, tokens, simdgroups, grouped) of a product on an Apple GPU that need not "
      "be here; arguments as cuda_plan's; size is the letter that ends its architecture's "
      "name; "
      "kernel 0, 1, 2: matvec, matmul, vecmat.");
  m.def(
      "metal_source",
      [](const std::vector<int>& kernels, int format) {
        std::vector<lowbit::metal::Instance> all;
        for (int kernel : kernels)
          for (const auto& i :
               lowbit::metal::instances(lowbit::metal::Kernel(kernel), Format(format)))
            all.push_back(i);
        std::vector<std::tuple<std::string, int, int, int>> entries;
        for (const auto& i : all)
          entries.emplace_back(lowbit::metal::name(i), int(i.kernel), int(i.dtype), i.tokens);
        return std::make_tuple(lowbit::metal::text(all), entries);
      },
      "kernels"_a, "format"_a,
      "(Metal source, [(entry point, kernel, dtype, tokens)]) of every instance of kernels of "
      "one "
      "source file in a format; kernels 0 to 6: matvec, matmul, vecmat, quantize, dequantize, "
      "round_trip, group.");

  m.attr("has_metal") = lowbit::kHasMetal;
  nb::exception<lowbit::KernelRefused>(m, "KernelRefused", PyExc_RuntimeError);

  m.attr("cuda_build") = LOWBIT_CUDA_BUILD;
  m.attr("build") = LOWBIT_BUILD;
  m.def(
      "load_cuda", &lowbit::load_cuda, "path"_a,
      "Loads the CUDA kernels from a shared object; RuntimeError says what is wrong with it.");
  m.def(
      "cuda_refusal", [](int device) { return lowbit::gpu().refusal(device); }, "device"_a = 0,
      "Why the loaded CUDA kernels cannot run on a device, or an empty string.");
  m.def(
      "cuda_memory",
      [](int device) {
        const lowbit::MemoryUse use = lowbit::gpu().memory_use(device);
        return std::make_tuple(use.active, use.peak, use.cached);
      },
      "device"_a = 0,
      "Bytes of results and scratch on a CUDA device: (active, peak with MLX's own, cached).");
  m.def(
      "reset_cuda_peak", [](int device) { lowbit::gpu().reset_peak(device); }, "device"_a = 0,
      "Forgets the peak of cuda_memory.");
}
