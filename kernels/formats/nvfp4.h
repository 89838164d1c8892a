// nvfp4: value = s * e2m1, one e4m3 scale byte for 16 elements.
//
// An optional float32 `global_scale` holds the tensor's largest magnitude; stored scales are
// then relative to global_scale / (448 * 6), a factor that products apply once, in their
// epilogue.
#pragma once

#include "elements.h"

LOWBIT_BEGIN

struct Nvfp4 {
  using Code = E2m1;
  using Scale = E4m3;
  static constexpr int kBits = 4, kGroup = 16;
  static constexpr bool kHasBias = false;
  // A group that holds a NaN or an infinity is stored so that every element decodes to NaN.
  static constexpr uint32 kNanScale = 0x7fu, kNanCode = 0u;
  static constexpr float kGlobalMax = 2688.0f;  // 448 * 6

  // q: the group's largest magnitude over 6, rounded to the dtype of w. enlarge: kGlobalMax
  // over the global scale, or 1.
  static LOWBIT_FN uint32 fit(float q, float enlarge) { return E4m3::encode(q * enlarge); }

  // What an element's code is chosen for: w over the scale. The quotient is rounded to the
  // dtype of w before it is enlarged: MLX's order, which other orders differ from near ties.
  static LOWBIT_FN float step(uint32 scale) { return E4m3::decode(scale); }
  template <class Round>
  static LOWBIT_FN float normalize(float w, float step, float enlarge, Round round) {
    const float quotient = round(w / step) * enlarge;
    return step == 0.0f ? 0.0f : quotient;
  }
};

LOWBIT_END
