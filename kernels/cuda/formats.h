// From a row of formats.def to its C++ type, and from a format at run time to its constant.
#pragma once

#include <type_traits>

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

// body(std::integral_constant<Format, format>), but for dense, which no row is.
template <class Body>
void with_format(Format format, Body body) {
  switch (format) {
#define FORMAT(name, cpp_type, mode, bits, group, judged) \
  case Format::name:                                      \
    return body(std::integral_constant<Format, Format::name>{});
#include "../formats/formats.def"
#undef FORMAT
    case Format::dense:
      return;
  }
}

}  // namespace lowbit::cuda
