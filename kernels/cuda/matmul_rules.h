// Which products matmul takes, and how it should run them. No CUDA: plan() includes it.
#pragma once

#include "plan.h"

namespace lowbit::cuda {

// wgmma on compute capability 9.0. x and codes are read by tensor copies: their rows, and the
// addresses of x, codes and y's own where it is written so, are multiples of 16 bytes. Two-byte
// floats only; the e8m0 scales of mxfp4 and mxfp8 go beyond float16's range. qqmm: x already
// quantized and decoded by the caller.
inline bool matmul_supports(const Problem& p, const Device& device) {
  if (device.capability != 90 || device.shared_bytes < 227 * 1024) return false;
  if (p.format == Format::dense || !p.transpose || p.quantize_x) return false;
  const FormatInfo& f = kFormats[int(p.format)];
  if (p.dtype == Dtype::f32) return false;
  if (p.dtype == Dtype::f16 && !f.affine() && f.name != "nvfp4") return false;
  if (p.M < 1 || p.N < 1 || p.K < 1) return false;
  if (p.M > 0x7fffffff || p.N > 0x7fffffff - 512 || p.K > 0x7fffffff - 512) return false;
  return p.K % 8 == 0 && p.K * f.bits / 8 % 16 == 0;
}

}  // namespace lowbit::cuda
