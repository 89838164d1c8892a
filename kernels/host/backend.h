// What a backend owes. Arrays stop here: below `launch` there are pointers and plain structs.
#pragma once

#include "product.h"

namespace lowbit::cpu {

// Schedules the work on the stream of `out`'s primitive; returns at once. Inputs are contiguous
// and evaluated, outputs not yet allocated.
void launch(const ProductKind&, const ProductInputs&, mx::array& out, mx::Stream);
void launch_quantize(Format, const mx::array& w, const std::optional<mx::array>& global_scale,
                     std::vector<mx::array>& outputs, mx::Stream);
void launch_dequantize(Format, const mx::array& w, const mx::array& scales,
                       const std::optional<mx::array>& biases,
                       const std::optional<mx::array>& global_scale, mx::array& out,
                       mx::Stream);

}  // namespace lowbit::cpu
