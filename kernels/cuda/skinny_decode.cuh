// Packed codes to mma.sync's A operand where a lane's codes lie beside each other: 32 of a row,
// whole words. Pairs are (0, 1), (2, 3), ..., as x has them. What a pair becomes, and what
// scales must be for that, is as in matmul_decode.cuh; to gather the bits of a pair takes fewer
// instructions here. bf16, with the multiply-add: 4 bits 2.5, 3 bits 2.9, 8 bits 2, e2m1 4.3.
#pragma once

#include "matmul_decode.cuh"
#include "tma.h"

namespace lowbit::cuda {

#if LOWBIT_HOPPER

template <class F, class T>
struct LaneRow {
  static constexpr int B = F::kBits;
  static_assert(B == 3 || B == 4 || B == 8);
  using Weights = WeightPairs<F, T>;
  uint32_t w[B];

  // at: of the first code; of 8 bits the second half lies at `at` ^ 16.
  __device__ __forceinline__ void load(uint32_t at) {
    if constexpr (B == 3) {
#pragma unroll
      for (int i = 0; i < 3; i++) load_shared<4>(at + 4 * i, &w[i]);
    } else {
      load_shared<16>(at, w);
      if constexpr (B == 8) load_shared<16>(at ^ 16, w + 4);
    }
  }

  // Eight codes, from code 8 * j on, as four pairs of weights.
  __device__ __forceinline__ void decode(int j, GroupPair g, uint32_t (&out)[4]) const {
    if constexpr (Weights::kByTwo) {
      const uint32_t turned = w[j] ^ 0x88888888u;
      Weights::four(w[j], turned, g, g, out[0], out[1]);
      Weights::four(w[j] >> 16, turned >> 16, g, g, out[2], out[3]);
    } else {
#pragma unroll
      for (int i = 0; i < 4; i++) out[i] = pair(j, i, g);
    }
  }

 private:
  // Pair i of those.
  __device__ __forceinline__ uint32_t pair(int j, int i, GroupPair g) const {
    if constexpr (std::is_same_v<typename F::Code, E2m1>) {
      return Half<T>::multiply(Weights::lifted(permute(w[j], 0, 0x4440u | uint32_t(i))),
                               g.scale);
    } else if constexpr (std::is_same_v<typename F::Code, E4m3>) {
      const uint32_t twice = permute(w[2 * j + i / 2], 0, i % 2 ? 0x3322u : 0x1100u);
      return Half<T>::multiply(Weights::lifted(twice), g.scale);
    } else if constexpr (B == 8) {
      return Weights::clean(permute(w[2 * j + i / 2], 0, i % 2 ? 0x4342u : 0x4140u), g);
    } else if constexpr (B == 4) {
      return Weights::clean(apart(w[j], 0x0f0f0f0fu, 0xf0f0f0f0u, i), g);
    } else {
      // Six bits of a byte, for half of the pairs once the row is shifted by four: from bit 0
      // or from bit 2 on.
      const int byte = 3 * j + i - (i > 0), word = byte / 4;
      const bool shifted = i == 1 || i == 2;
      const uint32_t next = word < 2 ? w[word + 1] : 0;
      const uint32_t row = shifted ? __funnelshift_r(w[word], next, 4) : w[word];
      const uint32_t even = even_codes(word, shifted);
      const uint32_t pair = apart(row, even, even << 3, byte % 4);
      return i % 2 ? Weights::template raised<2>(pair, g) : Weights::clean(pair, g);
    }
  }
  // The even code in byte `byte` of a word, and the odd one, in halves of a word: even codes,
  // odd ones, and then a byte of each. Even codes' bytes have a clear top bit, which repeats in
  // the zeros between.
  static __device__ __forceinline__ uint32_t apart(uint32_t word, uint32_t even, uint32_t odd,
                                                   int byte) {
    const uint32_t at = uint32_t(byte), zero = 8 | at;
    return permute(word & even, word & odd, at | zero << 4 | (4 + at) << 8 | zero << 12);
  }
  // 3 bits: where the even codes of pairs lie in a word of the row, as it is or shifted.
  static constexpr __device__ uint32_t even_codes(int word, bool shifted) {
    uint32_t mask = 0;
    for (int i = 0; i < 4; i++) {
      const int byte = (4 * word + i) % 3;
      const uint32_t even = byte == (shifted ? 1 : 0)   ? 0x07u
                            : byte == (shifted ? 0 : 2) ? 0x1cu
                                                        : 0u;
      mask |= even << (8 * i);
    }
    return mask;
  }
};

struct NoExtremes {
  __device__ __forceinline__ void add(uint32_t) {}
  __device__ __forceinline__ bool any() const { return false; }
};
// Whether any of many scales is extreme, four bytes as stored at a time: the least and the
// largest of their magnitudes, of e8m0 bytes plus one with 255 as 0; 0 itself is not extreme.
template <class Decode>
struct Extremes {
  uint32_t least = 0xffffffffu, most = 0;  // halves apart; less one; as they are

  __device__ __forceinline__ void add(uint32_t stored) {
    if constexpr (Decode::kScaleBytes == 2) {
      add_pair(stored & 0x7fff7fffu);
    } else {
#pragma unroll
      for (int i = 0; i < 2; i++)
        add_pair(((stored >> 8 * i & 0x00ff00ffu) + 0x00010001u) & 0x00ff00ffu);
    }
  }
  __device__ __forceinline__ bool any() const {
    constexpr uint32_t kOne = 2 - Decode::kScaleBytes;  // what was added
    constexpr uint32_t kLeast = Decode::kLeast + kOne - 1, kMost = Decode::kMost + kOne;
    return (least & 0xffffu) < kLeast || least >> 16 < kLeast || (most & 0xffffu) > kMost ||
           most >> 16 > kMost;
  }

 private:
  __device__ __forceinline__ void add_pair(uint32_t v) {
    least = __viaddmin_u16x2(v, 0xffffffffu, least);
    most = __vmaxu2(v, most);
  }
};

#endif  // LOWBIT_HOPPER

}  // namespace lowbit::cuda
