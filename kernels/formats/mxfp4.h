// mxfp4: value = 2^(s-127) * e2m1, one e8m0 scale byte for 32 elements.
#pragma once

#include "elements.h"

LOWBIT_BEGIN

struct Mxfp4 {
  using Code = E2m1;
  using Scale = E8m0;
  static constexpr int kBits = 4, kGroup = 32;
  static constexpr bool kHasBias = false;
  // A group that holds a NaN or an infinity is stored so that every element decodes to NaN.
  static constexpr uint32 kNanScale = 255u, kNanCode = 0u;

  // q: the group's largest magnitude over 6, rounded to the dtype of w.
  static LOWBIT_FN uint32 fit(float q, float) { return E8m0::encode_up(q); }

  // What an element's code is chosen for: w over the scale, exactly, as a product with its
  // inverse.
  static LOWBIT_FN float step(uint32 scale) { return from_bits((254u - scale) << 23); }
  template <class Round>
  static LOWBIT_FN float normalize(float w, float step, float, Round) {
    return w * step;
  }
};

LOWBIT_END
