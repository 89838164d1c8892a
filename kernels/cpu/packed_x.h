// x as matvec's decoders want it.
#pragma once

#include "activations.h"
#include "arena.h"

LOWBIT_BEGIN

// data: [token][chunk][limb][vector][element], zero beyond K; with it the sums of x's groups
// and, where x is fixed point (several limbs), their steps.
template <class Decoder>
struct PackedX {
  using Element = typename Decoder::Element;
  static constexpr bool kFixed = Decoder::kLimbs > 1;
  static constexpr int64_t kElements = int64_t(Decoder::kChunk) * Decoder::kLimbs;  // a chunk

  const int64_t K;
  const int group_size;  // 0 for dense rows
  const int64_t chunks = up(K, Decoder::kChunk) / Decoder::kChunk;
  const int64_t groups = group_size ? Groups::padded(K / group_size) : 0;
  Element* data = nullptr;
  float* group_sums = nullptr;  // [token][groups]
  float* steps = nullptr;       // [token][groups]

  int64_t row() const { return chunks * kElements; }
  int64_t depth() const { return chunks * Decoder::kChunk; }
  void lay_out(Arena& a, int64_t tokens) {
    data = a.take<Element>(tokens * row());
    group_sums = a.take<float>(tokens * groups);
    steps = a.take<float>(kFixed ? tokens * groups : 0);
  }

  // in: depth() floats, zero beyond K.
  void pack(const float* in, int64_t token) {
    Element* out = data + token * row();
    float* sums = group_sums + token * groups;
    for (int64_t g = 0; g < groups; g++) sums[g] = 0.0f;
    if constexpr (kFixed) {
      float* step = steps + token * groups;
      for (int64_t g = 0; g < groups; g++) step[g] = 0.0f;
      Decoder::pack(in, K, group_size, out, step);
    } else {
      for (int64_t c = 0; c < chunks; c++) {
        const float* from = in + c * Decoder::kChunk;
        for (int v = 0; v < Decoder::kVectors; v++)
          for (int i = 0; i < Decoder::kWidth; i++)
            *out++ = from_float<Element>(from[Decoder::element(v, i)]);
      }
    }
    if (group_size == 0) return;
    for (int64_t g = 0; g < K / group_size; g++) {
      f32 sum = zero();
      const float* from = in + g * group_size;
      for (int k = 0; k < group_size; k += kLanes) sum = add(sum, load(from + k));
      sums[g] = reduce(sum);
    }
  }
};

LOWBIT_END
