// Python bindings of kernels/host: names, arguments, docstrings. No logic.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include "cpu/kernels.h"
#include "cpu/pool.h"
#include "host/ops.h"
#include "host/plan.h"

namespace nb = nanobind;
using namespace nb::literals;
using lowbit::Format;
using lowbit::OptionalArray;
using mlx::core::array;
using mlx::core::StreamOrDevice;

namespace {

// (name, mode, bits, group_size, judged), in the order of the enum.
auto formats() {
  std::vector<std::tuple<std::string, std::string, int, int, bool>> rows;
  for (const auto& f : lowbit::kFormats)
    rows.emplace_back(std::string(f.name), std::string(f.mode), f.bits, f.group_size, f.judged);
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
        "Rows of kernels/formats/formats.def: (name, mode, bits, group_size, judged).");
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
         const OptionalArray& biases, bool transpose, bool quantize_x, int format) {
        return lowbit::explain(x, w, scales, biases, transpose, quantize_x, Format(format));
      },
      "x"_a, "w"_a, "scales"_a.none(), "biases"_a.none(), "transpose"_a, "quantize_x"_a,
      "format"_a, "The plan that would run, in words.");
}
