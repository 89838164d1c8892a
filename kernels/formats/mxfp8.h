// mxfp8: value = 2^(s-127) * e4m3, one e8m0 scale byte for 32 elements.
#pragma once

#include "elements.h"

LOWBIT_BEGIN

struct Mxfp8 {
  using Code = E4m3;
  using Scale = E8m0;
  static constexpr int kBits = 8, kGroup = 32;
  static constexpr bool kHasBias = false;
  // A group that holds a NaN or an infinity is stored so that every element decodes to NaN.
  static constexpr uint32 kNanScale = 255u, kNanCode = 0x7fu;

  // q: the group's largest magnitude over 448, rounded to the dtype of w.
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
