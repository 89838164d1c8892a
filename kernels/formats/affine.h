// affine: value = scale * q + bias, q unsigned of B bits, one scale and bias a group of G.
//
// Scales and biases are stored in the dtype of the quantized tensor. The scale may be negative:
// its sign is chosen so that the end of the range with the larger magnitude (the edge) is the
// bias and is reproduced exactly, and then it is adjusted so that zero lies on the grid.
//
// Halves go to the even code in mx.quantize on the CPU, away from zero on a GPU, where the
// range also ends at zero if all of a group is below it: callers pass the rounding and the
// range.
#pragma once

#include "elements.h"

LOWBIT_BEGIN

struct ToEven {
  LOWBIT_FN float operator()(float x) const { return round_even(x); }
};

template <int B, int G>
struct Affine {
  using Code = Unsigned<B>;
  static constexpr int kBits = B, kGroup = G;
  static constexpr bool kHasBias = true;

  struct Group {
    float scale, bias;
  };

  template <class Round = ToEven>
  static LOWBIT_FN Group fit(float lowest, float highest, Round round = {}) {
    constexpr float kSteps = float((1 << B) - 1);
    const bool low_edge = magnitude(lowest) > magnitude(highest);
    float scale = larger((highest - lowest) / kSteps, 1e-7f);
    scale = low_edge ? scale : -scale;
    const float edge = low_edge ? lowest : highest;
    const float steps_to_zero = round(edge / scale);
    if (steps_to_zero == 0.0f) return {scale, 0.0f};
    return {edge / steps_to_zero, edge};
  }

  template <class Round = ToEven>
  static LOWBIT_FN uint32 encode(float w, Group g, Round round = {}) {
    constexpr float kSteps = float((1 << B) - 1);
    const float q = round((w - g.bias) / g.scale);
    return uint32(int(smaller(larger(q, 0.0f), kSteps)));
  }
};

template <int G>
using Affine2 = Affine<2, G>;
template <int G>
using Affine3 = Affine<3, G>;
template <int G>
using Affine4 = Affine<4, G>;
template <int G>
using Affine5 = Affine<5, G>;
template <int G>
using Affine6 = Affine<6, G>;
template <int G>
using Affine8 = Affine<8, G>;

LOWBIT_END
