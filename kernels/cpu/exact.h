// Codes in natural order as exact bfloat16, and products of codes and scales that are exact in
// bfloat16 as well: e2m1 times e4m3, and anything times a power of two.
#pragma once

#include "load.h"

LOWBIT_BEGIN

// Codes that a table in registers maps to bfloat16: all but 6 bits.
template <class Code>
inline constexpr bool kHasExactCodes = Code::kBits == 8 || Code::kBits <= 5;

// Up to 5 bits: one load serves 128 codes (32 of 5 bits), one lookup 32.
template <class Code>
struct ExactDecoder {
  static constexpr int kBits = Code::kBits, kStep = kBits <= 4 ? 128 : 32;
  static constexpr int kVectors = kStep / 32, kBytes = kStep * kBits / 8;
  static constexpr float kOffset = kCentre<Code>;
  pairs table;
  ExactDecoder() {
    bf16 value[32];
    for (uint32_t i = 0; i < 32; i++)
      value[i] = from_float<bf16>(Code::decode(i & ((1u << kBits) - 1)) - kOffset);
    table = load_pairs(value);
  }

  // Element i of vector v is the 16 bits that begin at bit (32v + i) * kBits, shifted to bit 0.
  static constexpr auto kSpread = [] {
    struct {
      alignas(64) uint8_t byte[kVectors][64];
      alignas(64) uint16_t shift[32];
    } t{};
    for (int v = 0; v < kVectors; v++)
      for (int i = 0; i < 32; i++)
        for (int b = 0; b < 2; b++)
          t.byte[v][2 * i + b] = uint8_t((32 * v + i) * kBits / 8 + b);
    for (int i = 0; i < 32; i++) t.shift[i] = uint16_t(i * kBits % 8);
    return t;
  }();

  // Codes [k, k + kStep) of a row of `count`, in the low bits of 16, junk above. Nothing beyond
  // the row is read; what stands for it is code 0.
  static LOWBIT_FN void spread(const uint8_t* row, int64_t k, int64_t count,
                               pairs (&out)[kVectors]) {
    const int64_t bytes = (count - k) * kBits / 8;
    constexpr uint64_t whole = kBytes == 64 ? ~uint64_t(0) : (uint64_t(1) << (kBytes & 63)) - 1;
    const uint64_t here = bytes >= kBytes ? whole : (uint64_t(1) << bytes) - 1;
    const __m512i packed = _mm512_maskz_loadu_epi8(here, row + k * kBits / 8);
    const __m512i shift = _mm512_load_si512(kSpread.shift);
    for (int v = 0; v < kVectors; v++)
      out[v] = _mm512_srlv_epi16(
          _mm512_permutexvar_epi8(_mm512_load_si512(kSpread.byte[v]), packed), shift);
  }

  // The same as values less kOffset.
  LOWBIT_FN void step(const uint8_t* row, int64_t k, int64_t count,
                      pairs (&out)[kVectors]) const {
    spread(row, k, count, out);
    for (pairs& v : out) v = lookup32(table, v);
  }

  // A whole row; `out` has room for whole vectors of 32.
  void row(const uint8_t* p, int64_t count, bf16* out) const {
    store_row(*this, p, count, out);
  }
};

// 8 bits: 64 codes, as a low and a high byte each.
template <class Code>
  requires(Code::kBits == 8)
struct ExactDecoder<Code> {
  using Bytes = BytePairDecoder<Code>;
  static constexpr int kStep = 64;
  static constexpr float kOffset = Bytes::kOffset;
  Bytes bytes;

  LOWBIT_FN void step(const uint8_t* row, int64_t k, int64_t count, pairs (&out)[2]) const {
    // Interleaving takes eight bytes of each sixteen at a time: this order makes it natural.
    const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
    const __mmask64 here = count - k < 64 ? (uint64_t(1) << (count - k)) - 1 : ~uint64_t(0);
    const __m512i codes = _mm512_maskz_loadu_epi8(here, row + k);
    const PairOfPairs decoded = bytes.decode(_mm512_permutexvar_epi64(order, codes));
    out[0] = decoded.first, out[1] = decoded.second;
  }

  void row(const uint8_t* p, int64_t count, bf16* out) const {
    store_row(*this, p, count, out);
  }
};

template <class Decoder>
inline void store_row(const Decoder& decoder, const uint8_t* p, int64_t count, bf16* out) {
  for (int64_t k = 0; k < count; k += Decoder::kStep) {
    pairs v[Decoder::kStep / 32];
    decoder.step(p, k, count, v);
    for (int i = 0; i < Decoder::kStep / 32 && k + i * 32 < count; i++)
      _mm512_storeu_si512(out + k + i * 32, v[i]);
  }
}

// Formats with so few scales and codes that all their products are in a table: nvfp4.
template <class F>
inline constexpr bool kHasProducts = F::kGroup == 16;

// Weights of nvfp4: the 16 products of each of its 256 scales are in a table of 8 KiB, and
// decoding is without arithmetic. A lookup serves two groups, the first half of its table
// one's, the second the other's: 5 vector instructions for 32 codes, products in float32 take
// 10 (16 rows of 512 codes on a Xeon, 2026-11-23: 1,000 cycles, 1,540 before).
template <class F>
struct ProductDecoder {
  using Codes = ExactDecoder<typename F::Code>;
  alignas(64) bf16 products[256][16];
  ProductDecoder() {
    for (uint32_t s = 0; s < 256; s++)
      for (uint32_t i = 0; i < 16; i++)
        products[s][i] = from_float<bf16>(F::Scale::decode(s) * F::Code::decode(i));
  }

  // scale: the bytes of the row's groups. A last half vector is filled with zeros.
  void row(const uint8_t* p, int64_t count, const uint8_t* scale, bf16* out) const {
    alignas(64) static constexpr auto half = [] {
      struct {
        uint16_t of[32];
      } t{};
      for (int i = 16; i < 32; i++) t.of[i] = 16;
      return t;
    }();
    const auto group = [&](int64_t g) {
      const bf16* of = products[g * F::kGroup < count ? scale[g] : 0];
      return _mm256_load_si256(reinterpret_cast<const __m256i*>(of));
    };
    for (int64_t k = 0; k < count; k += Codes::kStep) {
      pairs v[Codes::kVectors];
      Codes::spread(p, k, count, v);
      for (int i = 0; i < Codes::kVectors && k + i * 32 < count; i++) {
        const int64_t g = (k + i * 32) / F::kGroup;
        const pairs table =
            _mm512_inserti64x4(_mm512_castsi256_si512(group(g)), group(g + 1), 1);
        // (code & 15) | half
        const pairs index = _mm512_ternarylogic_epi32(v[i], _mm512_set1_epi16(15),
                                                      _mm512_load_si512(half.of), 0xea);
        _mm512_storeu_si512(out + k + i * 32, lookup32(table, index));
      }
    }
  }
};

// Weights as bfloat16: code times scale, exact in the block formats, plus bias in affine ones,
// then rounded. Even and odd elements are computed as float32 and put back side by side; a last
// half vector is filled with what zeros decode to.
template <class F>
struct FoldedDecoder {
  using Codes = ExactDecoder<typename F::Code>;
  static constexpr float kOffset = Codes::kOffset;
  Codes codes;

  static LOWBIT_FN pairs weights(pairs q, const float* scale, const float* bias) {
    const f32 factor = splat(scale[0]);
    const f32 even = as_f32(shl<16>(q)), odd = as_f32(bit_and(q, splat_u(0xffff0000u)));
    if constexpr (F::kHasBias) {
      const f32 shift = splat(bias[0]);
      // Rounding two vectors puts one behind the other; this order interleaves them.
      alignas(64) static constexpr auto order = [] {
        struct {
          uint16_t from[32];
        } t{};
        for (int i = 0; i < 32; i++) t.from[i] = uint16_t(i / 2 + i % 2 * 16);
        return t;
      }();
      const pairs rounded = round_pairs(fma(even, factor, shift), fma(odd, factor, shift));
      return _mm512_permutexvar_epi16(_mm512_load_si512(order.from), rounded);
    } else {
      return bit_or(shr<16>(as_u32(mul(even, factor))), as_u32(mul(odd, factor)));
    }
  }

  // scale, bias: of the row's groups, kLanes readable beyond the last; biases moved by kOffset.
  void row(const uint8_t* p, int64_t count, const float* scale, const float* bias,
           bf16* out) const {
    for (int64_t k = 0; k < count; k += Codes::kStep) {
      pairs v[Codes::kStep / 32];
      codes.step(p, k, count, v);
      for (int i = 0; i < Codes::kStep / 32 && k + i * 32 < count; i++) {
        const int64_t g = (k + i * 32) / F::kGroup;
        _mm512_storeu_si512(out + k + i * 32, weights(v[i], scale + g, bias + g));
      }
    }
  }
};

LOWBIT_END
