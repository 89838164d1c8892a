// Packed codes to mma.sync's A operand where a lane's codes lie beside each other: 32 of a row,
// whole words. Pairs are (0, 1), (2, 3), ..., as x has them. What a pair becomes, and what
// scales must be for that, is as in matmul_decode.cuh; to gather the bits of a pair takes fewer
// instructions here. bf16, with the multiply-add: 4 bits 2.5, 3 bits 2.9, 8 bits 2, e2m1 4.3.
//
// With up to 16 tokens pairs of e2m1 are (0, 4), (1, 5), (2, 6), (3, 7), which takes 4.1, of
// which logic is 2 and not 3.4, and four permutes for 8 elements of x, which serve two tiles:
// nvfp4 4096x14336 M = 16 16.6 and 15.6 us, 14336x4096 M = 4 15.2 and 14.0; M = 32 19.6
// and 21.0 (H200, 2026-11-29).
#pragma once

#include "load.h"
#include "matmul_decode.cuh"
#include "tma.h"

namespace lowbit::cuda {

#if LOWBIT_HOPPER

// Pair i of a lane's codes 8 * j to 8 * j + 7, in `w` from code 0 on.
template <class Code, class T>
struct LanePairs;

// A byte a code.
template <class Code, class T>
struct BytePairs {
  static __device__ __forceinline__ uint32_t pair(const uint32_t (&w)[8], int j, int i,
                                                  GroupPair g) {
    return Pairs<Code, T>::own_pair(w[2 * j + i / 2], i % 2 * 2, g);
  }
};
template <class T>
struct LanePairs<Unsigned<8>, T> : BytePairs<Unsigned<8>, T> {};
template <class T>
struct LanePairs<E4m3, T> : BytePairs<E4m3, T> {};

template <class T>
struct LanePairs<E2m1, T> {
  static __device__ __forceinline__ uint32_t pair(const uint32_t (&w)[4], int j, int i,
                                                  GroupPair g) {
    const uint32_t byte = permute(w[j], 0, 0x4440u | uint32_t(i));
    return Half<T>::multiply(Pairs<E2m1, T>::lifted(byte), g.scale);
  }
};

// The even code in byte `byte` of a word, and the odd one, in halves of a word: even codes, odd
// ones, and then a byte of each. Even codes' bytes have a clear top bit, which repeats in the
// zeros between.
__device__ __forceinline__ uint32_t codes_apart(uint32_t word, uint32_t even, uint32_t odd,
                                                int byte) {
  const uint32_t at = uint32_t(byte), zero = 8 | at;
  return permute(word & even, word & odd, at | zero << 4 | (4 + at) << 8 | zero << 12);
}

template <class T>
struct LanePairs<Unsigned<4>, T> {
  static __device__ __forceinline__ uint32_t pair(const uint32_t (&w)[4], int j, int i,
                                                  GroupPair g) {
    return Pairs<Unsigned<4>, T>::clean(codes_apart(w[j], 0x0f0f0f0fu, 0xf0f0f0f0u, i), g);
  }
};

// A pair is six bits of a byte, of half of them once the row is shifted by four: from bit 0 or
// from bit 2 on.
template <class T>
struct LanePairs<Unsigned<3>, T> {
  using P = Pairs<Unsigned<3>, T>;
  static __device__ __forceinline__ uint32_t pair(const uint32_t (&w)[3], int j, int i,
                                                  GroupPair g) {
    const int byte = 3 * j + i - (i > 0), word = byte / 4;
    const bool shifted = i == 1 || i == 2;
    const uint32_t next = word < 2 ? w[word + 1] : 0;
    const uint32_t row = shifted ? __funnelshift_r(w[word], next, 4) : w[word];
    const uint32_t even = even_codes(word, shifted);
    const uint32_t u = codes_apart(row, even, even << 3, byte % 4);
    return i % 2 ? P::template raised<2>(u, g) : P::clean(u, g);
  }
  // Where the even codes of pairs lie in a word of the row, as it is or shifted.
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

template <class F, class T, int kTokens>
struct LaneRow {
  static constexpr int B = F::kBits;
  using Weights = WeightPairs<F, T>;
  // Pairs are (i, i + 4).
  static constexpr bool kHalves = std::is_same_v<typename F::Code, E2m1> && kTokens <= 16;
  static constexpr bool kBias = Weights::kBias && !kHalves;
  static constexpr int kAlphaExponent = [] {
    if constexpr (kHalves)
      return MovedPairs<typename F::Code, T>::kLift - Weights::kUp;
    else
      return Weights::kAlphaExponent;
  }();
  uint32_t w[B];  // 32 codes

  // Eight elements of x, to the pairs that codes come in.
  static __device__ __forceinline__ void pair_up(uint32_t (&x)[4]) {
    if constexpr (kHalves) {
      const uint32_t first[2] = {x[0], x[1]}, second[2] = {x[2], x[3]};
#pragma unroll
      for (int i = 0; i < 4; i++)
        x[i] = permute(first[i / 2], second[i / 2], i % 2 ? 0x7632 : 0x5410);
    }
  }

  // at: of the first code; of 8 bits the second half lies at `at` ^ 16.
  __device__ __forceinline__ void load(uint32_t at) {
    if constexpr (B % 4 == 0) {
      load_shared<16>(at, w);
      if constexpr (B == 8) load_shared<16>(at ^ 16, w + 4);
    } else {
#pragma unroll
      for (int i = 0; i < B; i++) load_shared<4>(at + 4 * i, &w[i]);
    }
  }

  // Eight codes, from code 8 * j on, as four pairs of weights.
  __device__ __forceinline__ void decode(int j, GroupPair g, uint32_t (&out)[4]) const {
    if constexpr (kHalves) {
      using Moved = MovedPairs<typename F::Code, T>;
#pragma unroll
      for (int i = 0; i < 4; i++) out[i] = Half<T>::multiply(Moved::pair(w[j], i), g.scale);
    } else if constexpr (Weights::kByTwo) {
      const uint32_t turned = w[j] ^ 0x88888888u;
      Weights::four(w[j], turned, g, g, out[0], out[1]);
      Weights::four(w[j] >> 16, turned >> 16, g, g, out[2], out[3]);
    } else {
#pragma unroll
      for (int i = 0; i < 4; i++) out[i] = LanePairs<typename F::Code, T>::pair(w, j, i, g);
    }
  }
};

#endif  // LOWBIT_HOPPER

}  // namespace lowbit::cuda
