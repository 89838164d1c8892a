// The operations: arguments checked, defaults and dtypes settled, then one primitive.
// Every refusal is std::invalid_argument, when the op is called and before any kernel runs.
#pragma once

#include <optional>
#include <string>
#include <tuple>

#include "mlx/array.h"
#include "mlx/utils.h"
#include "problem.h"

namespace lowbit {

namespace mx = mlx::core;
using OptionalArray = std::optional<mx::array>;

// (codes, scales, biases or nothing)
std::tuple<mx::array, mx::array, OptionalArray> quantize(const mx::array& w, Format,
                                                         const OptionalArray& global_scale,
                                                         mx::StreamOrDevice s);

mx::array dequantize(const mx::array& w, const mx::array& scales, const OptionalArray& biases,
                     Format, const OptionalArray& global_scale, std::optional<mx::Dtype> dtype,
                     mx::StreamOrDevice s);

mx::array quantized_matmul(const mx::array& x, const mx::array& w, const mx::array& scales,
                           const OptionalArray& biases, const OptionalArray& bias,
                           bool transpose, Format, const OptionalArray& global_scale,
                           mx::StreamOrDevice s);

mx::array qqmm(const mx::array& x, const mx::array& w, const mx::array& scales,
               const OptionalArray& bias, Format, const OptionalArray& global_scale_x,
               const OptionalArray& global_scale_w, mx::StreamOrDevice s);

// quantize_x: gather_qqmm.
mx::array gather_qmm(const mx::array& x, const mx::array& w, const mx::array& scales,
                     const OptionalArray& biases, const OptionalArray& lhs_indices,
                     const OptionalArray& rhs_indices, const OptionalArray& bias,
                     bool transpose, bool quantize_x, Format,
                     const OptionalArray& global_scale_x, const OptionalArray& global_scale_w,
                     mx::StreamOrDevice s);

// y = x @ w^T + bias for dense w, accumulated in float32; on the GPU MLX's matmul (cuBLAS).
mx::array linear(const mx::array& x, const mx::array& w, const OptionalArray& bias,
                 mx::StreamOrDevice s);

// The plan that the same call would run, in words.
std::string explain(const mx::array& x, const mx::array& w, const OptionalArray& scales,
                    const OptionalArray& biases, bool transpose, bool quantize_x, Format,
                    mx::StreamOrDevice s);

}  // namespace lowbit
