// matvec of one row of x with 3 or 4 bits, groups of 64 or 128: integers as in
// matvec_integer.h, and codes never leave their bytes.
//
// A byte of W's rows is a sum of fields, codes or parts of codes, each times a power of two. It
// meets the tensor cores as it is and again with all but a field masked, once for each field
// but one: any factors of the fields are then sums of the bytes' factors, which are integers
// made of x when it is staged. 32 codes take 4 operations of logic with 4 bits, and 9 with 3,
// where as pairs of floats they took 44.
//
//   lane c of a quad   32 codes beside each other of the 128 of a unit: 3 or 4 whole words
//   column q           limb q % 4 of the groups of slot q / 4: with groups of 64 a unit's first
//                      and second, with groups of 128 those of a slice's two units
//   x                  [slice of 256][quarters of 4 words][limb][lane of the quad][4 words];
//                      with 3 bits the last quarter has words 8 and 9 of both units
#pragma once

#include "matvec_integer.h"

namespace lowbit::cuda {

// How codes lie in bytes. kWords words of a lane meet x for its kCodeWords words of 32 codes,
// those of each of kKinds kinds first; 2^kUp makes all factors integers.
template <int B>
struct CodeBytes;

template <>
struct CodeBytes<4> {
  static constexpr int kCodeWords = 4, kKinds = 2, kWords = 8, kUp = 4;

  static __device__ __forceinline__ void load(uint32_t at, uint32_t (&w)[4]) {
    const uint4 v = load_shared4(at);
    w[0] = v.x, w[1] = v.y, w[2] = v.z, w[3] = v.w;
  }
  static __device__ __forceinline__ void operands(const uint32_t (&w)[4], uint32_t (&a)[8]) {
#pragma unroll
    for (int i = 0; i < 4; i++) a[i] = w[i], a[4 + i] = w[i] & 0x0f0f0f0fu;
  }
  // Of the bytes of 8 codes that meet z, by kind, times 2^kUp; `rest` where a word is left.
  static __device__ __forceinline__ void factors(const int (&z)[8], int (&f)[2][4], int&) {
#pragma unroll
    for (int i = 0; i < 4; i++) f[0][i] = z[2 * i + 1], f[1][i] = 16 * z[2 * i] - f[0][i];
  }
  // Word `piece` of a kind's, from the bytes that the four lanes of 32 codes have of it.
  static __device__ __forceinline__ uint32_t word(uint32_t bytes, int) { return bytes; }
};

// Three bytes of 8 codes, from bit 0 on:
//   code 0: 3 bits, 1: 3, 2: 2 | 2: 1, 3: 3, 4: 3, 5: 1 | 5: 2, 6: 3, 7: 3
// Kinds: as they are; codes 0 and 3 and the rest of 5 alone; the beginnings of 2 and 5, and 6.
// The rest of 2 is masked in the four bytes that have it, put together.
template <>
struct CodeBytes<3> {
  static constexpr int kCodeWords = 3, kKinds = 3, kWords = 10, kUp = 7;

  static __device__ __forceinline__ void load(uint32_t at, uint32_t (&w)[3]) {
#pragma unroll
    for (int i = 0; i < 3; i++) w[i] = load_shared(at + 4 * i);
  }
  // The bytes 0, 1 and 2 of three, from byte `first` of them on.
  static constexpr __device__ uint32_t mask(uint32_t three, int first) {
    uint32_t m = 0;
    for (int i = 0; i < 4; i++) m |= (three >> (first + i) % 3 * 8 & 0xffu) << 8 * i;
    return m;
  }
  static __device__ __forceinline__ void operands(const uint32_t (&w)[3], uint32_t (&a)[10]) {
#pragma unroll
    for (int i = 0; i < 3; i++) {
      a[i] = w[i];
      a[3 + i] = w[i] & mask(0x030e07u, i);
      a[6 + i] = w[i] & mask(0x1c80c0u, i);
    }
    a[9] = __byte_perm(__byte_perm(w[0], w[1], 0x0741), w[2], 0x6210) & 0x01010101u;
  }
  static __device__ __forceinline__ void factors(const int (&z)[8], int (&f)[3][4], int& rest) {
    f[0][0] = 16 * z[1], f[0][1] = 8 * z[4], f[0][2] = 4 * z[7];
    f[1][0] = 128 * z[0] - f[0][0];
    f[1][1] = 64 * z[3] - f[0][1];
    f[1][2] = 256 * z[5] - f[0][2];
    f[2][0] = 2 * z[2] - f[0][0];
    f[2][1] = z[5] - f[0][1];
    f[2][2] = 32 * z[6] - f[0][2];
    rest = 512 * z[2] - f[0][1];
  }
  static __device__ __forceinline__ uint32_t word(uint32_t bytes, int piece) {
    const uint32_t next = __shfl_down_sync(0xffffffffu, bytes, 1);
    return __byte_perm(bytes, next, piece == 0 ? 0x4210 : piece == 1 ? 0x5421 : 0x6542);
  }
};

template <class F, class T, bool gather>
struct MatvecInPlace : MatvecFixed<F, T, 1, gather> {
  using Base = MatvecFixed<F, T, 1, gather>;
  using Base::base, Base::lane, Base::g, Base::c, Base::at, Base::k0, Base::shared;
  using typename Base::H, typename Base::Shape, typename Base::Slice;
  using Bytes = CodeBytes<F::kBits>;
  static constexpr int kUnitCodes = 128, kQuarter = 4 * 4 * 16;  // bytes of four words
  static constexpr int kSliceX = Shape::kZeros;
  static_assert(kSliceX == 2 * Bytes::kWords * 4 * 4 * 4);  // units, limbs, lanes, bytes
  // Whether a word is left beside those of the kinds: a byte of 8 codes.
  static constexpr bool kRest = Bytes::kWords > Bytes::kKinds* Bytes::kCodeWords;
  // Sums of a limb are below 2^22, and 256 times that below 2^30.
  static_assert(Shape::kGroup == 64 || Shape::kGroup == 128);

  // Of x in a slice, where word `word` of unit `unit` lies.
  static __device__ __forceinline__ int word_at(int unit, int word) {
    return word < 8 ? (2 * unit + word / 4) * kQuarter + word % 4 * 4
                    : 4 * kQuarter + (2 * unit + word - 8) * 4;
  }
  __device__ __forceinline__ void store_x(int k, int, const uint4 (&in)[1], int,
                                          uint32_t& largest) const {
    constexpr int kFixedBits = 21;
    auto* about = reinterpret_cast<float2*>(shared + at.x_sums) + (k - k0) / Shape::kGroup;
    float v[8];
    const float scale = Base::template fix<kFixedBits>(in[0], v, about, largest);
    int z[8];
#pragma unroll
    for (int i = 0; i < 8; i++)
      z[i] = __float_as_int(fmaf(v[i], scale, Base::kMagic)) - __float_as_int(Base::kMagic);
    int f[Bytes::kKinds][4] = {}, rest = 0;
    Bytes::factors(z, f, rest);
    // For lane lane % 16 / 4 of a quad, whose 32 codes four lanes have here.
    const int unit = lane / 16, piece = lane % 4;
    char* const x = shared + at.x + (k - k0) / Shape::kSlice * kSliceX + lane % 16 / 4 * 16;
#pragma unroll
    for (int kind = 0; kind < Bytes::kKinds; kind++) {
      uint32_t limbs[4];
      split(f[kind], limbs);
      char* const to = x + word_at(unit, kind * Bytes::kCodeWords + piece);
#pragma unroll
      for (int limb = 0; limb < 4; limb++) {
        const uint32_t word = Bytes::word(limbs[limb], piece);
        if (piece < Bytes::kCodeWords) *reinterpret_cast<uint32_t*>(to + limb * 64) = word;
      }
    }
    if constexpr (kRest) {
      const int some[4] = {rest, 0, 0, 0};
      uint32_t limbs[4];
      split(some, limbs);
#pragma unroll
      for (int limb = 0; limb < 4; limb++)
        x[word_at(unit, Bytes::kWords - 1) + limb * 64 + piece] = char(limbs[limb]);
    }
  }

  // This lane's x for its first column of a slice that starts at k, and what is known of its
  // group.
  __device__ uint32_t x_at(int k) const {
    return base + at.x + uint32_t(k - k0) / Shape::kSlice * kSliceX + g % 4 * 64 + c * 16;
  }
  __device__ uint32_t sums_at(int k) const {
    return base + at.x_sums + (uint32_t(k - k0) / Shape::kGroup + c / 2) * 8;
  }

  // A slice: y[0] and y[2] += scale * unit * (256 * limb 0 + limb 1), or limbs 2 and 3 in lanes
  // of odd c, all times 2^kUp, and y[1] and y[3] += bias * (sum of x) in both.
  template <bool whole>
  __device__ __forceinline__ void multiply_slice(const Slice& slice, int groups,
                                                 float (&out)[1][4]) const {
    constexpr int kWords = Shape::kSliceScales / 4, kUnits = 2 * Shape::kGroup / kUnitCodes;
    float(&y)[4] = out[0];
    uint32_t scales[2][kWords], biases[2][kWords];
#pragma unroll
    for (int r = 0; r < 2; r++) {
      Base::load_words(slice.scales[r], scales[r]);
      Base::load_words(slice.biases[r], biases[r]);
    }
    const uint32_t zeros = base + at.zeros + g % 4 * 64 + c * 16;
#pragma unroll
    for (int first = 0; first < Shape::kInSlice; first += 2) {
      int sum[4] = {};
#pragma unroll
      for (int i = 0; i < kUnits; i++) {
        const int unit = first / 2 * kUnits + i;
        if (!whole && unit * kUnitCodes >= groups * Shape::kGroup) break;
        const uint32_t x = g / 4 == (kUnits == 1 ? c / 2 : i) ? slice.x : zeros;
        uint32_t a[2][Bytes::kWords];
#pragma unroll
        for (int r = 0; r < 2; r++) {
          uint32_t w[Bytes::kCodeWords];
          Bytes::load(slice.codes[r] + unit * 16 * F::kBits + 4 * F::kBits * c, w);
          Bytes::operands(w, a[r]);
        }
        uint4 quarters[(Bytes::kWords + 3) / 4];
#pragma unroll
        for (int i = 0; i < (Bytes::kWords + 3) / 4; i++)
          quarters[i] = load_shared4(x + (i < 2 ? 2 * unit + i : 4) * kQuarter);
#pragma unroll
        for (int i = 0; i < Bytes::kWords; i += 2) {
          const uint4& v = quarters[i / 4];
          const bool second = i < 8 ? i % 4 == 2 : unit == 1;
          const uint2 codes[2] = {{a[0][i], a[0][i + 1]}, {a[1][i], a[1][i + 1]}};
          mma_bytes(sum, codes, second ? uint2{v.z, v.w} : uint2{v.x, v.y});
        }
      }
      const uint2 about = load_shared2(slice.x_sums + first * 8);
#pragma unroll
      for (int r = 0; r < 2; r++) {
        float s = H::either(scales[r][first / 2], c >= 2);
        float b = H::either(biases[r][first / 2], c >= 2);
        if (!whole && first + c / 2 >= groups) s = b = 0.0f;
        const float both = float(256 * sum[2 * r] + sum[2 * r + 1]);
        y[2 * r] = fmaf(s * __uint_as_float(about.x), both, y[2 * r]);
        y[2 * r + 1] = fmaf(b, __uint_as_float(about.y), y[2 * r + 1]);
      }
    }
  }

  __device__ __forceinline__ void fill_table() const {}
  // The row's sums from sums by column, in y[0].
  __device__ __forceinline__ void sum_columns(float (&out)[1][4]) const {
    constexpr float kDown = 1.0f / float(1 << Bytes::kUp);
    float(&y)[4] = out[0];
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      float sum = fmaf(c % 2 ? kDown : 65536.0f * kDown, y[i], c % 2 ? 0.0f : y[i + 1]);
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      y[i] = sum + __shfl_xor_sync(0xffffffffu, sum, 2);
    }
  }

 private:
  // Four integers as limbs of 8 bits, the most significant first, a byte each.
  static __device__ __forceinline__ void split(const int (&v)[4], uint32_t (&limbs)[4]) {
    constexpr int kCarry = 0x00808080;
    constexpr uint32_t kSign = 0x80808080u;
    const uint32_t low = __byte_perm(v[0] + kCarry, v[1] + kCarry, 0x5140);
    const uint32_t low2 = __byte_perm(v[2] + kCarry, v[3] + kCarry, 0x5140);
    const uint32_t high = __byte_perm(v[0] + kCarry, v[1] + kCarry, 0x7362);
    const uint32_t high2 = __byte_perm(v[2] + kCarry, v[3] + kCarry, 0x7362);
    limbs[3] = __byte_perm(low, low2, 0x5410) ^ kSign;
    limbs[2] = __byte_perm(low, low2, 0x7632) ^ kSign;
    limbs[1] = __byte_perm(high, high2, 0x5410) ^ kSign;
    limbs[0] = __byte_perm(high, high2, 0x7632);
  }
};

}  // namespace lowbit::cuda
