// The kernels of the target being compiled.
#pragma once

#include "../formats/affine.h"
#include "../formats/mxfp4.h"
#include "../formats/mxfp8.h"
#include "../formats/nvfp4.h"
#include "kernels.h"
#include "simd.h"

LOWBIT_BEGIN

void matvec(const cpu::Product&, const cpu::Plan&, const cpu::Pool&);
void matmul(const cpu::Product&, const cpu::Plan&, const cpu::Pool&);
void quantize(Format, const void* w, Dtype, int64_t groups, float global_scale, uint8_t* codes,
              void* scales, void* biases);
void dequantize(Format, const cpu::Matrix&, int64_t begin, int64_t end, float alpha, void* out,
                Dtype);
// Row <- decode(encode(row)), as a tensor of `dtype` would be quantized, without the factor
// that the global scale stands for.
void round_trip(Format, Dtype, float* row, int64_t columns, float global_scale);
const cpu::Kernels& kernels();

// Calls f(tag) with tag.type the format's type.
template <class T>
struct Tag {
  using type = T;
};

template <class F>
inline void visit(Format format, F&& f) {
  switch (format) {
#define FORMAT(name, cpp_type, mode, bits, group, judged) \
  case Format::name:                                      \
    return f(Tag<cpp_type>{});
#include "../formats/formats.def"
#undef FORMAT
    case Format::dense:
      return;
  }
}

LOWBIT_END
