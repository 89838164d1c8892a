// The text that a device's Metal compiler is given: these sources, and an entry point for each
// instance that plans may choose.
#pragma once

#include <string>
#include <vector>

#include "plan.h"

namespace lowbit::metal {

// One entry point. `dtype` is that of x (quantize: of values), `tokens` one of tiles(); neither
// means anything to `group`, nor a format.
struct Instance {
  Kernel kernel;
  Format format;
  Dtype dtype;
  int tokens;

  bool operator==(const Instance&) const = default;
};

// All of a kernel in a format.
std::vector<Instance> instances(Kernel, Format);

// "matvec_affine4_g64_bfloat16_2": the entry point's name.
std::string name(const Instance&);

// A library that has `instances`: of one kernel, or of those over elements. Its sources are
// whole: nothing is included but what belongs to Metal.
std::string text(const std::vector<Instance>& instances);

}  // namespace lowbit::metal
