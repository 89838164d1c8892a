// x as fixed point: integer products of unsigned codes with x, four to a 32-bit lane (AVX-512
// VNNI and VBMI).
//
// Each group of x is rounded once a call to integers X of kDepth + 1 bits, in steps of a power
// of two that its largest magnitude decides: x = step * X, exactly where |x| is within
// 2^(kDepth - significant bits) of the largest, else to half a step. X is stored as three
// signed bytes, largest first, so that a lane's sum over its codes of one group is
//
//   sum = 0;  for each byte of X, largest first:  sum = 256 * sum + codes . bytes
//
// exactly, in 32 bits; then total += scale * (step * sum) in float32. An element counts to half
// a step, at most 2^-kDepth of the largest magnitude in its group. That serves x of 16 bits, of
// which bfloat16 is exact down to 2^-14 of that magnitude and float16 down to 2^-11 (beside
// 8-bit codes 2^-13 and 2^-10), but not every float32 x: one element of twenty times the others
// in each group would take up the 1e-6 that its results are allowed to be off.
//
// 128 codes of 4 bits take 15 vector instructions: 3 to part the nibbles, 6 products, 2 shifts,
// 1 conversion, 1 for the step, 2 for the scale. Float32 lanes take 25.
#pragma once

#include "load.h"

LOWBIT_BEGIN

// Codes as bytes: element i of vector v is the code at element(v, i) of a chunk. A 32-bit lane
// holds codes of one lane of the chunk, kCount in a row, over all vectors.
template <int B, int Count = B <= 4 ? 8 : 4>
struct ByteCodes {
  static constexpr int kCount = Count, kVectors = kCount / 4;
  static constexpr int element(int v, int i) { return i / 4 * kCount + v * 4 + i % 4; }

  // Where the four codes of a lane begin: whole bytes to move there, and the bits left over
  // for each code.
  static constexpr auto kSpread = [] {
    struct {
      alignas(64) uint8_t byte[kVectors][64], bit[kVectors][64];
    } t{};
    for (int v = 0; v < kVectors; v++)
      for (int i = 0; i < 64; i++) {
        const int first = (i / 4 * kCount + v * 4) * B;
        t.byte[v][i] = uint8_t(first / 8 + i % 4);
        t.bit[v][i] = uint8_t(i / 4 % 2 * 32 + first % 8 + i % 4 * B);
      }
    return t;
  }();

  using Raw = __m512i;
  static LOWBIT_FN Raw read(const uint8_t* p) {
    constexpr uint64_t covered = ~uint64_t(0) >> (64 - 2 * B * kCount);
    return _mm512_maskz_loadu_epi8(covered, p);
  }
  template <int v>
  static LOWBIT_FN __m512i vector(Raw raw) {
    const __m512i bytes = _mm512_permutexvar_epi8(_mm512_load_si512(kSpread.byte[v]), raw);
    return _mm512_and_si512(
        _mm512_multishift_epi64_epi8(_mm512_load_si512(kSpread.bit[v]), bytes),
        _mm512_set1_epi8((1 << B) - 1));
  }
};

template <>
struct ByteCodes<4, 8> {
  static constexpr int kCount = 8, kVectors = 2;
  static constexpr int element(int v, int i) { return 2 * i + v; }
  using Raw = __m512i;
  static LOWBIT_FN Raw read(const uint8_t* p) { return _mm512_loadu_si512(p); }
  template <int v>
  static LOWBIT_FN __m512i vector(Raw raw) {
    return _mm512_and_si512(shr<4 * v>(raw), _mm512_set1_epi8(15));
  }
};

template <>
struct ByteCodes<8, 4> {
  static constexpr int kCount = 4, kVectors = 1;
  static constexpr int element(int, int i) { return i; }
  using Raw = __m512i;
  static LOWBIT_FN Raw read(const uint8_t* p) { return _mm512_loadu_si512(p); }
  template <int>
  static LOWBIT_FN __m512i vector(Raw raw) {
    return raw;
  }
};

// x of a group in fixed point: X = rint(x * 2^shift) below 2^depth, as three signed digits of
// base 256.
struct FixedPoint {
  // For a group whose largest magnitude is in [x, x + count), subnormal numbers counting as
  // normal.
  static int shift(const float* x, int count, int depth) {
    u32 largest = splat_u(0);
    for (int k = 0; k < count; k += kLanes)
      largest = _mm512_max_epu32(largest, bit_and(as_u32(load(x + k)), splat_u(0x7fffffffu)));
    const int biased = int(_mm512_reduce_max_epu32(largest) >> 23);
    return depth - 1 + 127 - (biased > 1 ? biased : 1);
  }
  // Sixteen elements; limbs[0] takes the largest digits.
  template <class Limbs>
  static void digits(const float* x, int shift, Limbs& limbs, int64_t at) {
    const u32 fixed = _mm512_cvtps_epi32(_mm512_scalef_ps(load(x), splat(float(shift))));
    const u32 bytes = bit_xor(add(fixed, splat_u(0x808080)), splat_u(0x808080));
    const auto put = [&](int8_t* limb, u32 digit) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(limb + at), _mm512_cvtepi32_epi8(digit));
    };
    put(limbs[0], shr<16>(bytes)), put(limbs[1], shr<8>(bytes)), put(limbs[2], bytes);
  }
};

template <class C>
struct FixedDecoder : ByteCodes<C::kBits> {
  using Code = C;
  using Codes = ByteCodes<C::kBits>;
  using Element = int8_t;
  using Sum = u32;
  static constexpr bool kScaled = true;
  static constexpr int kLimbs = 3, kWidth = 64;
  static constexpr int kChunk = kLanes * Codes::kCount, kBytes = kChunk * C::kBits / 8;
  static constexpr int kRead = kBytes;
  static constexpr float kOffset = 0.0f;
  static constexpr int lane_begin(int lane) { return lane * Codes::kCount; }
  // |X| <= 2^kDepth; a lane's sum fits 31 bits.
  static constexpr int kDepth = C::kBits == 8 ? 21 : 22;
  static_assert(int64_t((1 << C::kBits) - 1) * Codes::kCount << kDepth < int64_t(1) << 31);

  static LOWBIT_FN Sum start() { return splat_u(0); }
  static LOWBIT_FN Sum next_limb(Sum sum) { return shl<8>(sum); }
  static LOWBIT_FN Sum dot(__m512i codes, const int8_t* x, Sum sum) {
    return _mm512_dpbusd_epi32(sum, codes, _mm512_loadu_si512(x));
  }
  static LOWBIT_FN f32 value(Sum sum, f32 step) { return mul(from_int(sum), step); }

  // in: whole chunks, zero beyond K. out: [chunk][byte of X][vector][element]; step: of groups.
  static void pack(const float* in, int64_t K, int group_size, int8_t* out, float* step) {
    alignas(64) static constexpr auto order = [] {
      struct {
        uint8_t from[Codes::kVectors][64];
      } t{};
      for (int v = 0; v < Codes::kVectors; v++)
        for (int i = 0; i < 64; i++) t.from[v][i] = uint8_t(Codes::element(v, i));
      return t;
    }();
    alignas(64) int8_t limbs[kLimbs][128] = {};
    int shift = 0;
    for (int64_t c = 0; c < K; c += kChunk) {
      for (int i = 0; i < kChunk; i += kLanes) {
        const int64_t k = c + i;
        if (k < K && k % group_size == 0) {
          shift = FixedPoint::shift(in + k, group_size, kDepth);
          step[k / group_size] = __builtin_ldexpf(1.0f, -shift);
        }
        FixedPoint::digits(in + k, shift, limbs, i);
      }
      for (const auto& limb : limbs)
        for (int v = 0; v < Codes::kVectors; v++, out += 64)
          _mm512_storeu_si512(out, _mm512_permutex2var_epi8(_mm512_load_si512(limb),
                                                            _mm512_load_si512(order.from[v]),
                                                            _mm512_load_si512(limb + 64)));
    }
  }
};

// Affine formats, whose codes are integers.
template <class Code>
inline constexpr bool kIntegerCodes = false;
template <int B>
inline constexpr bool kIntegerCodes<Unsigned<B>> = true;

LOWBIT_END
