// Packed codes to float32 or bfloat16 vectors: how each instruction set reads kernels/formats'
// element types. The exhaustive tests hold every decoder equal to `Code::decode`.
//
// matvec reads codes in lane order: a chunk of kLanes windows, lane i holding kCount
// consecutive codes in one word, so that one load serves kCount vectors, each a shift and a
// lookup away. Vector v of a chunk then holds elements element(v, 0), element(v, 1), ...;
// activations are stored in the same order once a call. All codes of a lane belong to one
// group, so scales are applied once a chunk.
//
//   4-bit, 8 lanes, chunk of 64:   word i = codes 8i .. 8i+7
//                                  vector v = codes v, 8+v, 16+v, .. 56+v
#pragma once

#include "../formats/affine.h"
#include "../formats/mxfp4.h"
#include "../formats/mxfp8.h"
#include "../formats/nvfp4.h"
#include "simd.h"
#if defined(__AVX512BF16__)
#include "simd_bf16.h"
#endif

LOWBIT_BEGIN

// Affine codes are decoded relative to the middle of their range, and the group's bias is moved
// by scale * centre: the partial sums stay small, which keeps float32 accumulation accurate.
template <class Code>
inline constexpr float kCentre = 0.0f;
template <int B>
inline constexpr float kCentre<Unsigned<B>> = float(1 << (B - 1));

template <class Code>
struct CodeTable {
  float value[16];
  CodeTable() {
    for (uint32_t i = 0; i < 16; i++)
      value[i] = Code::decode(i & ((1u << Code::kBits) - 1)) - kCentre<Code>;
  }
};

// One code, in the low bits of each word (junk above), to its float32 value less the centre.
template <class Code>
struct ToFloat {
  static_assert(Code::kBits <= 4, "four index bits");
  CodeTable<Code> values;
  Table16 table = table16(values.value);
  LOWBIT_FN f32 operator()(u32 code) const { return lookup(table, code); }
};

template <int B>
  requires(B > 4)
struct ToFloat<Unsigned<B>> {
  // The centred value is the code as a B-bit two's complement number with its top bit flipped.
  LOWBIT_FN f32 operator()(u32 code) const {
    return from_int(sra<32 - B>(shl<32 - B>(bit_xor(code, splat_u(1u << (B - 1))))));
  }
};

template <>
struct ToFloat<E4m3> {
  // The text of E4m3::decode, lane by lane.
  LOWBIT_FN f32 operator()(u32 code) const {
    const u32 low = bit_and(code, splat_u(0x7f));
    const f32 rebased = as_f32(add(shl<20>(low), splat_u(120u << 23)));
    f32 value = select_eq(bit_and(code, splat_u(0x78)), splat_u(0),
                          fma(rebased, splat(2.0f), splat(-0.015625f)), rebased);
    value = select_eq(low, splat_u(0x7f), splat(__builtin_nanf("")), value);
    return as_f32(bit_xor(as_u32(value), shl<24>(bit_and(code, splat_u(0x80)))));
  }
};

template <>
struct ToFloat<E8m0> {
  // Byte 0 is 2^-127, below the normal range.
  LOWBIT_FN f32 operator()(u32 byte) const {
    return select_eq(byte, splat_u(0), as_f32(splat_u(0x00400000)), as_f32(shl<23>(byte)));
  }
};

// Codes meet x as numbers that add up in float32. (fixed_point.h: as integers, x in several
// limbs.)
struct FloatSums {
  using Sum = f32;
  static constexpr int kLimbs = 1;
  static LOWBIT_FN Sum start() { return zero(); }
  static LOWBIT_FN f32 value(Sum sum, f32) { return sum; }
};

// ---- lane order, float32
// ----------------------------------------------------------------------

template <class C>
struct LaneDecoder : FloatSums {
  using Code = C;
  using Element = float;
  static constexpr bool kScaled = true;
  static constexpr int kCount = Code::kBits <= 4 ? 8 : 4;
  static constexpr int kVectors = kCount,
                       kWidth = kLanes;  // vectors a chunk, elements a vector
  static constexpr int kChunk = kLanes * kCount, kBytes = kChunk * Code::kBits / 8;
  static constexpr int kRead = kReach<Code::kBits, kCount>;
  static constexpr float kOffset = kCentre<Code>;
  static constexpr int element(int v, int i) { return i * kCount + v; }
  static constexpr int lane_begin(int lane) { return lane * kCount; }

  ToFloat<Code> to_float;
  using Raw = u32;
  static LOWBIT_FN Raw read(const uint8_t* p) { return windows<Code::kBits, kCount>(p); }
  template <int v>
  LOWBIT_FN f32 vector(const Raw& raw) const {
    return to_float(shr<v * Code::kBits>(raw));
  }
  static LOWBIT_FN f32 dot(f32 w, const float* x, f32 sum) { return fma(w, load(x), sum); }
};

// ---- dense rows
// -------------------------------------------------------------------------------

// Unquantized weights in stored order, through the same matvec: no codes, no scales.
template <class T>
struct DenseDecoder : FloatSums {
  using Element = float;
  static constexpr bool kScaled = false;
  static constexpr int kVectors = 4, kWidth = kLanes, kChunk = kVectors * kWidth;
  static constexpr int kBytes = kChunk * int(sizeof(T)), kRead = kBytes;
  static constexpr int element(int v, int i) { return v * kWidth + i; }
  static constexpr int lane_begin(int) { return 0; }
  using Raw = const T*;
  static LOWBIT_FN Raw read(const uint8_t* p) { return reinterpret_cast<const T*>(p); }
  template <int v>
  LOWBIT_FN f32 vector(Raw raw) const {
    return load(raw + v * kWidth);
  }
  static LOWBIT_FN f32 dot(f32 w, const float* x, f32 sum) { return fma(w, load(x), sum); }
};

#if defined(__AVX512BF16__)

struct DensePairs : FloatSums {
  using Element = bf16;
  static constexpr bool kScaled = false;
  static constexpr int kVectors = 2, kWidth = 2 * kLanes, kChunk = kVectors * kWidth;
  static constexpr int kBytes = kChunk * 2, kRead = kBytes;
  static constexpr int element(int v, int i) { return v * kWidth + i; }
  static constexpr int lane_begin(int) { return 0; }
  using Raw = const bf16*;
  static LOWBIT_FN Raw read(const uint8_t* p) { return reinterpret_cast<const bf16*>(p); }
  template <int v>
  LOWBIT_FN pairs vector(Raw raw) const {
    return load_pairs(raw + v * kWidth);
  }
  static LOWBIT_FN f32 dot(pairs w, const bf16* x, f32 sum) {
    return lowbit::dot(w, load_pairs(x), sum);
  }
};

// ---- lane order, bfloat16 pairs
// ---------------------------------------------------------------

// Up to 4 bits: 16-bit element i holds codes 4i .. 4i+3, looked up by their low five bits in a
// table that repeats, so that nothing above the code needs masking.
template <class C>
struct PairDecoder : FloatSums {
  using Code = C;
  using Element = bf16;
  static constexpr bool kScaled = true;
  static constexpr int kCount = 4;
  static constexpr int kVectors = kCount, kWidth = 2 * kLanes;
  static constexpr int kChunk = kWidth * kCount, kBytes = kChunk * Code::kBits / 8;
  static constexpr int kRead = kBytes;
  static constexpr float kOffset = kCentre<Code>;
  static constexpr int element(int v, int i) { return i * kCount + v; }
  static constexpr int lane_begin(int lane) { return lane * 2 * kCount; }

  pairs table;
  PairDecoder() {
    bf16 value[32];
    for (uint32_t i = 0; i < 32; i++)
      value[i] = from_float<bf16>(Code::decode(i & ((1u << Code::kBits) - 1)) - kOffset);
    table = load_pairs(value);
  }
  using Raw = pairs;
  static LOWBIT_FN Raw read(const uint8_t* p) { return windows16<kCount * Code::kBits>(p); }
  template <int v>
  LOWBIT_FN pairs vector(const Raw& raw) const {
    return lookup32(table, shr16<v * Code::kBits>(raw));
  }
  static LOWBIT_FN f32 dot(pairs w, const bf16* x, f32 sum) {
    return lowbit::dot(w, load_pairs(x), sum);
  }
};

// 8 bits: 64 codes a chunk, each looked up as a low and a high byte and interleaved.
template <class C>
struct BytePairDecoder : FloatSums {
  using Code = C;
  using Element = bf16;
  static constexpr bool kScaled = true;
  static constexpr int kVectors = 2, kWidth = 2 * kLanes, kChunk = 64, kBytes = 64, kRead = 64;
  // Centred between the two middle codes, so that value is symmetric and odd/2: exact in
  // bfloat16.
  static constexpr float kOffset = kCentre<Code> == 0.0f ? 0.0f : kCentre<Code> - 0.5f;
  static constexpr bool kSymmetric = kOffset != 0.0f;
  static constexpr int element(int v, int i) { return 16 * (i / 8) + 8 * v + i % 8; }
  static constexpr int lane_begin(int lane) { return 16 * (lane / 4); }

  Table128 table;
  BytePairDecoder() {
    uint8_t low[128], high[128];
    for (uint32_t i = 0; i < 128; i++) {
      const float value = kSymmetric ? kOffset - float(i) : Code::decode(i);
      const uint16_t bits = from_float<bf16>(value).bits;
      low[i] = uint8_t(bits), high[i] = uint8_t(bits >> 8);
    }
    table = table128(low, high);
  }
  using Raw = PairOfPairs;
  LOWBIT_FN Raw decode(__m512i codes) const {
    if constexpr (kSymmetric) {
      // q and 255-q have the same magnitude, 127.5 - min(q, 255-q); below the middle it is
      // minus.
      const __m512i mirrored = _mm512_xor_si512(codes, _mm512_set1_epi8(-1));
      return lookup128(table, _mm512_min_epu8(codes, mirrored), mirrored);
    } else {
      return lookup128(table, codes, codes);
    }
  }
  LOWBIT_FN Raw read(const uint8_t* p) const { return decode(_mm512_loadu_si512(p)); }
  template <int v>
  LOWBIT_FN pairs vector(const Raw& raw) const {
    return v == 0 ? raw.first : raw.second;
  }
  static LOWBIT_FN f32 dot(pairs w, const bf16* x, f32 sum) {
    return lowbit::dot(w, load_pairs(x), sum);
  }
};

// Which decoder multiplies bfloat16 pairs; 5 and 6 bits stay with float32 lanes.
template <class Code>
struct PairsOf {
  using type = LaneDecoder<Code>;
};
template <class Code>
  requires(Code::kBits <= 4)
struct PairsOf<Code> {
  using type = PairDecoder<Code>;
};
template <class Code>
  requires(Code::kBits == 8)
struct PairsOf<Code> {
  using type = BytePairDecoder<Code>;
};

#endif

LOWBIT_END
