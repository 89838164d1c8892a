// Packed codes, in their natural order along K, to the A operand of wgmma.
//
// A fragment of wgmma wants k = 8j+2c and 8j+2c+1 from lane c of a quad (c = lane % 4), for
// each chunk j of 8 codes: `pair(words, j)`, words the row's from chunk 0 on. A chunk of B-bit
// codes is B bytes and lane c's pair is 2B bits of it, from bit 2Bc on. So all four lanes read
// the same words of a row, and each takes its own part; of 8 bits each reads its pairs alone
// (`own_pair`), which takes half as long of what shared memory delivers. Codes become elements
// of T exactly; what is rounded is scale * code + bias, once.
//
// Instructions per pair and lane, bf16: 8 bits 2, 4 bits 3, 3 bits 3.75, e2m1 4.5, e4m3 5; fp16
// one more.
#pragma once

#include <type_traits>

#include "../formats/affine.h"
#include "../formats/mxfp4.h"
#include "../formats/mxfp8.h"
#include "../formats/nvfp4.h"
#include "half.h"

namespace lowbit::cuda {

// Two elements at a time.
template <class T>
__device__ __forceinline__ uint32_t fma2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t r;
  if constexpr (std::is_same_v<T, bf16>)
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  else
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
}

// Bytes of a (0 to 3) and b (4 to 7), chosen by the nibbles of `select`; a nibble's top bit
// asks for the byte's top bit, eight times.
__device__ __forceinline__ uint32_t permute(uint32_t a, uint32_t b, uint32_t select) {
  uint32_t r;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(select));
  return r;
}

// Bits of a value that T has exactly: no mantissa beyond T's.
template <class T>
__host__ __device__ constexpr uint32_t bits_of(float value) {
  const uint32_t b = __builtin_bit_cast(uint32_t, value);
  if (std::is_same_v<T, bf16> || b << 1 == 0) return b >> 16;
  return (b >> 16 & 0x8000u) | (((b >> 23 & 0xffu) - 112u) << 10) | (b >> 13 & 0x3ffu);
}
__host__ __device__ constexpr float power_of_2(int e) {
  return __builtin_bit_cast(float, uint32_t(e + 127) << 23);
}
template <class T>
__host__ __device__ constexpr uint32_t pair_of(float low, float high) {
  return bits_of<T>(low) | bits_of<T>(high) << 16;
}

template <uint32_t mask>
__device__ __forceinline__ uint32_t mask_or(uint32_t a, uint32_t b) {
  uint32_t r;  // (a & mask) | b
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(r) : "r"(a), "n"(mask), "r"(b));
  return r;
}

// Scale, and for some formats bias, of a group, for the two codes of a pair.
struct GroupPair {
  uint32_t scale, bias;
};

template <class Code, class T>
struct Pairs;

// Unsigned codes. bf16: a code in the low 8 bits is the value code * 2^-133, since subnormal
// numbers and the first normal ones are equally spaced; group_pair makes up for that factor,
// less kAlphaExponent, for scales from kLeast to kMost. fp16 has no such range: there the code
// becomes the mantissa of 1024 + code, from which 1024 is subtracted.
template <int B, class T>
struct Pairs<Unsigned<B>, T> {
  static constexpr uint32_t kMask = (1u << B) - 1;
  static constexpr bool kTiny = std::is_same_v<T, bf16>;
  static constexpr float kOffset = Half<T>::kOffset;
  // Both codes of a pair fit where they are: the second begins at bit B.
  static constexpr bool kInPlace = 2 * B <= (kTiny ? 8 : Half<T>::kMantissaBits);
  static constexpr int kSecondAt = kInPlace ? B : 0;
  static constexpr int kLift = kTiny ? 133 : 0, kAlphaExponent = kTiny ? 32 : 0;
  static constexpr bool kExtreme = kTiny;

  uint32_t select;  // bytes for permute, or by how many bits to shift
  int c;
  __device__ explicit Pairs(int c)
      : select(B == 4 ? uint32_t(c) * 0x0101u | 0x4040u : uint32_t(2 * B * c) % 32), c(c) {}

  // The pair in bytes `at` and at + 1 of a word.
  static constexpr bool kOwnPairs = B == 8;
  static __device__ __forceinline__ uint32_t own_pair(uint32_t codes, int at, GroupPair g) {
    static_assert(B == 8);
    return clean(permute(codes, 0, 0x4140u + 0x0101u * at), g);
  }

  // Four bytes of a row, from byte 4 * i on, once the row is shifted so that this lane's pair
  // of chunk j begins at byte B * j.
  template <int n>
  __device__ __forceinline__ uint32_t word_at(const uint32_t (&w)[n], int i) const {
    const auto stored = [&](int at) {
      const uint32_t v = at < n ? w[at] : 0u;
      if constexpr (B == 6)  // 36 bits for the last lane
        return c == 3 ? (at + 1 < n ? w[at + 1] : 0u) : v;
      return v;
    };
    return __funnelshift_r(stored(i), stored(i + 1), select);
  }

  template <int n>
  __device__ __forceinline__ uint32_t pair(const uint32_t (&w)[n], int j, GroupPair g) const {
    const int at = B * j % 4;
    const uint32_t two_bytes = uint32_t(at) * 0x0101u | uint32_t(at + 1) * 0x1010u;
    uint32_t u;
    if constexpr (B == 4)
      u = permute(w[j], 0, select);
    else if constexpr (B < 4)
      u = permute(word_at(w, B * j / 4), 0, uint32_t(at) * 0x0101u | 0x4040u);
    else
      u = permute(word_at(w, B * j / 4), word_at(w, B * j / 4 + 1), two_bytes);
    if constexpr (B < 8 && !kInPlace) u = (u & 0xffffu) | (u >> B & 0xffff0000u);
    return masked(u, g);
  }

  static constexpr uint32_t kBoth = kMask | kMask << (16 + kSecondAt);
  // From a word with the codes of a pair where `kBoth` has them.
  static __device__ __forceinline__ uint32_t masked(uint32_t u, GroupPair g) {
    if constexpr (kTiny) return fma2<T>(u & kBoth, g.scale, g.bias);
    constexpr float kPart = 1.0f / float(1 << kSecondAt);
    const uint32_t q = fma2<T>(mask_or<kBoth>(u, Half<T>::kMagic), pair_of<T>(1.0f, kPart),
                               pair_of<T>(-kOffset, -kOffset * kPart));
    return fma2<T>(q, g.scale, g.bias);
  }
  // And with nothing else.
  static __device__ __forceinline__ uint32_t clean(uint32_t u, GroupPair g) {
    return kTiny ? fma2<T>(u, g.scale, g.bias) : masked(u, g);
  }
  // The same `up` bits higher.
  template <int up>
  static __device__ __forceinline__ uint32_t raised(uint32_t u, GroupPair g) {
    if constexpr (!kTiny) return masked(u >> up, g);
    constexpr float kDown = power_of_2(-up);
    return fma2<T>(u, Half<T>::multiply(g.scale, pair_of<T>(kDown, kDown)), g.bias);
  }

  // Scales (their magnitudes' bits) that group_pair can carry, beside zero: from 2^-90 to 2^26.
  static constexpr uint32_t kLeast = 37u << 7, kMost = (153u << 7) - 1;
  // scale, bias: twice each.
  static __device__ __forceinline__ GroupPair group_pair(uint32_t scale, uint32_t bias) {
    if constexpr (!kTiny) return {scale, bias};
    constexpr int kUp = kLift - kAlphaExponent;
    return {Half<T>::multiply(scale, pair_of<T>(power_of_2(kUp), power_of_2(kUp - kSecondAt))),
            Half<T>::multiply(
                bias, pair_of<T>(power_of_2(-kAlphaExponent), power_of_2(-kAlphaExponent)))};
  }
};

// e2m1: the code's bits moved to T's sign, lowest exponent and highest mantissa bits are the
// value times 2^-kLift, subnormal codes included.
template <class T>
struct Pairs<E2m1, T> {
  static constexpr int kLift = Half<T>::kLiftE2m1;
  static constexpr bool kOwnPairs = false;
  uint32_t select;
  __device__ explicit Pairs(int c) : select(0x4440u | uint32_t(c)) {}
  template <int n>
  __device__ __forceinline__ uint32_t lifted(const uint32_t (&w)[n], int j) const {
    return lifted(permute(w[j], 0, select));
  }
  static __device__ __forceinline__ uint32_t lifted(uint32_t u) {
    constexpr int kUp = Half<T>::kMantissaBits - 1;
    const uint32_t magnitude = u * (1u << kUp | 1u << (kUp + 12)), sign = u * 0x01001000u;
    return mask_or<0x80008000u>(sign, magnitude & (0x00070007u << kUp));
  }
};

// e4m3: in the same way. NaN codes come out as 480: `quantize` gives a group with a NaN a scale
// that is one (below), and no other group has such codes.
template <class T>
struct Pairs<E4m3, T> {
  static constexpr int kLift = Half<T>::kLiftE4m3;
  __device__ explicit Pairs(int) {}
  // The codes of a pair, twice each.
  static __device__ __forceinline__ uint32_t lifted(uint32_t u) {
    constexpr int kUp = Half<T>::kMantissaBits - 3;
    return mask_or<0x80008000u>(u, (u << kUp) & (0x007f007fu << kUp));
  }
  static constexpr bool kOwnPairs = true;
  static __device__ __forceinline__ uint32_t own_pair(uint32_t codes, int at, GroupPair g) {
    return Half<T>::multiply(lifted(permute(codes, 0, 0x1100u + 0x1111u * at)), g.scale);
  }
};

// Per format: pairs of codes to pairs of weights, `pair`; what a group's scale (and bias)
// become in shared memory, `group_pair` or `entry`; weights come out times 2^-kAlphaExponent.
// kBias: with a bias; kByTwo: decoded two chunks at a time, `two_pairs`; kOwnPairs: from words
// that hold a lane's pairs alone, `own_pair`; kExtreme: some scales are beyond kLeast and kMost
// (Extremes), and their tiles are computed again, code by code.
template <class F, class T>
struct WeightPairs;

template <int B, int G, class T>
struct WeightPairs<Affine<B, G>, T> : Pairs<Unsigned<B>, T> {
  using Pairs<Unsigned<B>, T>::Pairs;
  static constexpr bool kBias = true, kByTwo = false;
};

// bf16: e4m3 times a power of two. Byte 255 is infinity, and stands for groups that hold a NaN:
// they decode to NaN.
template <>
struct WeightPairs<Mxfp8, bf16> : Pairs<E4m3, bf16> {
  using Pairs<E4m3, bf16>::Pairs;
  static constexpr bool kBias = false, kByTwo = false, kExtreme = true;
  static constexpr int kAlphaExponent = 32, kUp = kLift - kAlphaExponent;
  // Beyond these bytes the scale, or the weights' last bits, leave bf16's range.
  static constexpr uint32_t kLeast = 35, kMost = 166;
  static __device__ __forceinline__ bool extreme(uint32_t byte) {
    return byte - kLeast > kMost - kLeast && byte != 255u;
  }
  static __device__ __forceinline__ uint32_t entry(uint32_t byte) {
    const uint32_t s = byte == 255u    ? 0x7fc0u
                       : extreme(byte) ? 0u
                                       : (byte + uint32_t(kUp)) << 7;
    return s | s << 16;
  }
};

// fp16: an e4m3 scale leaves room for the lift, so one multiply. Every product is exact, down
// to 2^-9 * 2^-10.
template <>
struct WeightPairs<Nvfp4, f16> : Pairs<E2m1, f16> {
  using Pairs<E2m1, f16>::Pairs;
  static constexpr bool kBias = false, kByTwo = false, kExtreme = false;
  static constexpr int kAlphaExponent = 9, kUp = kLift - kAlphaExponent;
  template <int n>
  __device__ __forceinline__ uint32_t pair(const uint32_t (&w)[n], int j, GroupPair g) const {
    return Half<f16>::multiply(lifted(w, j), g.scale);
  }
  static __device__ __forceinline__ uint32_t entry(uint32_t byte) {
    const uint32_t s = Half<f16>::bits(E4m3::decode(byte) * power_of_2(kUp));
    return s | s << 16;
  }
};

// bf16, e2m1: codes become the integers 2v + 12, 0 to 24, which are linear as unsigned codes
// are; the bias takes the 12 back. Two byte permutes look up four codes each: one those without
// a sign bit and zero for the others (it then repeats the clear top bit of a table's byte), the
// other the reverse.
struct TwelvePairs {
  static constexpr bool kBias = true, kByTwo = true, kOwnPairs = false;
  static constexpr int kAlphaExponent = 32;
  static constexpr int kUp = 132 - kAlphaExponent;  // of the scale: unit 2^-132
  uint32_t select;
  __device__ explicit TwelvePairs(int c) : select(uint32_t(c) | uint32_t(4 + c) << 4) {}

  // Chunks j and j + 1, j even, of two groups or one.
  template <int n>
  __device__ __forceinline__ void two_pairs(const uint32_t (&w)[n], int j, GroupPair g,
                                            GroupPair h, uint32_t& first,
                                            uint32_t& second) const {
    const uint32_t codes = permute(w[j], w[j + 1], select);
    four(codes, codes ^ 0x8888u, g, h, first, second);
  }
  // The four codes in the low half of a word, and the same with their signs turned.
  static __device__ __forceinline__ void four(uint32_t codes, uint32_t turned, GroupPair g,
                                              GroupPair h, uint32_t& first, uint32_t& second) {
    const uint32_t plus = permute(0x0f0e0d0cu, 0x18141210u, codes);
    const uint32_t minus = permute(0x090a0b0cu, 0x00040608u, turned);
    const uint32_t q = plus | minus;
    first = fma2<bf16>(permute(q, 0, 0x4140), g.scale, g.bias);
    second = fma2<bf16>(permute(q, 0, 0x4342), h.scale, h.bias);
  }
  // -12 times the codes' unit.
  static __device__ __forceinline__ uint32_t bias_of(uint32_t scale) {
    return Half<bf16>::multiply(scale, 0x800c800cu);
  }
};
template <>
struct WeightPairs<Nvfp4, bf16> : TwelvePairs {
  static constexpr bool kExtreme = false;
  using TwelvePairs::TwelvePairs;
  static __device__ __forceinline__ uint32_t entry(uint32_t byte) {
    const uint32_t s = Half<bf16>::bits(E4m3::decode(byte) * power_of_2(kUp));
    return s | s << 16;
  }
};
template <>
struct WeightPairs<Mxfp4, bf16> : TwelvePairs {
  static constexpr bool kExtreme = true;
  using TwelvePairs::TwelvePairs;
  static constexpr uint32_t kLeast = 27, kMost = 154;
  static __device__ __forceinline__ bool extreme(uint32_t byte) {
    return byte - kLeast > kMost - kLeast && byte != 255u;
  }
  static __device__ __forceinline__ uint32_t entry(uint32_t byte) {
    const uint32_t s = byte == 255u    ? 0x7fc0u
                       : extreme(byte) ? 0u
                                       : (byte + uint32_t(kUp)) << 7;
    return s | s << 16;
  }
};

// Whether any of many scales is one that WeightPairs cannot carry, four bytes as stored at a
// time: the least and the largest of their magnitudes, of e8m0 bytes plus one with 255 as 0; 0
// itself is none.
template <class F, class T>
class Extremes {
  using Weights = WeightPairs<F, T>;

 public:
  __device__ __forceinline__ void add(uint32_t stored) {
    if constexpr (F::kHasBias) {
      add_pair(stored & 0x7fff7fffu);
    } else {
#pragma unroll
      for (int i = 0; i < 2; i++)
        add_pair(((stored >> 8 * i & 0x00ff00ffu) + 0x00010001u) & 0x00ff00ffu);
    }
  }
  __device__ __forceinline__ bool any() const {
    if constexpr (!Weights::kExtreme)
      return false;
    else {
      constexpr uint32_t kOne = F::kHasBias ? 0 : 1;  // what was added
      constexpr uint32_t kLeast = Weights::kLeast + kOne - 1, kMost = Weights::kMost + kOne;
      return (least_ & 0xffffu) < kLeast || least_ >> 16 < kLeast ||
             (most_ & 0xffffu) > kMost || most_ >> 16 > kMost;
    }
  }

 private:
  __device__ __forceinline__ void add_pair(uint32_t v) {
    least_ = __viaddmin_u16x2(v, 0xffffffffu, least_);
    most_ = __vmaxu2(v, most_);
  }

  uint32_t least_ = 0xffffffffu, most_ = 0;  // halves apart; less one; as they are
};

}  // namespace lowbit::cuda
