// From a row of formats.def to its C++ type.
#pragma once

#include "../formats/affine.h"
#include "../formats/mxfp4.h"
#include "../formats/mxfp8.h"
#include "../formats/nvfp4.h"
#include "../host/problem.h"

namespace lowbit::cuda {

template <Format>
struct TypeOf;
#define FORMAT(name, cpp_type, mode, bits, group, judged) \
  template <>                                             \
  struct TypeOf<Format::name> {                           \
    using type = cpp_type;                                \
  };
#include "../formats/formats.def"
#undef FORMAT

}  // namespace lowbit::cuda
