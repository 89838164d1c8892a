// matvec with integers: unsigned codes meet x as fixed point, in mma of 8-bit integers.
//
// Codes become bytes in fewer operations than they become floats (8-bit codes in none), one mma
// takes 32 of them instead of 16, and no offset has to be taken out again. Each group of x is
//   x = unit * (65536 limb 0 + 256 limb 1 + limb 2),  |sum| < 2^22,  unit a power of two,
// rounded to nearest: the error is at most 2^-22 of the group's largest, as that of a float32
// sum. Limbs are columns of the product beside each other, and exact; they meet in float32.
#pragma once

#include "matvec_staging.h"

namespace lowbit::cuda {

// Eight codes of a lane (LaneAt::load) as bytes of two words, code order(i) in byte i.
template <int B>
struct ByteCodes {
  static constexpr __device__ int order(int i) { return B == 4 ? i % 4 * 2 + i / 4 : i; }

  // Four codes from bit 0 on, a byte each.
  static __device__ __forceinline__ uint32_t spread(uint32_t v) {
    constexpr uint32_t kMask = (1u << B) - 1, kLow = kMask | kMask << 16;
    const uint32_t halves = (v & 0xffffu) | ((v << (16 - 2 * B)) & 0xffff0000u);
    return (halves & kLow) | ((halves << (8 - B)) & (kLow << 8));
  }
  static __device__ __forceinline__ uint2 words(uint2 v) {
    if constexpr (B == 8)
      return v;
    else if constexpr (B == 4)
      return {v.x & 0x0f0f0f0fu, (v.x >> 4) & 0x0f0f0f0fu};
    else
      return {spread(v.x), spread(__funnelshift_r(v.x, v.y, 4 * B))};
  }
};

// d += a[16 x 32] * b[32 x 8], a unsigned
__device__ __forceinline__ void mma_bytes(int (&d)[4], const uint2 (&a)[2], uint2 b) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 "
      "{%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0].x), "r"(a[1].x), "r"(a[0].y), "r"(a[1].y), "r"(b.x), "r"(b.y));
}

// x as fixed point.
template <class F, class T, int TOK, bool gather>
struct MatvecFixed : MatvecStaging<F, T, TOK, gather> {
  using Base = MatvecStaging<F, T, TOK, gather>;
  using Base::lane;
  using typename Base::H, typename Base::Shape;
  static constexpr float kUnit = 1.0f;  // of sums
  static constexpr bool kRaised = false;
  // Added to a float below 2^22: leaves its integer in the low bits.
  static constexpr float kMagic = 12582912.0f;

  // Eight elements of a group that is spread over lanes: returns the power of two that makes
  // them integers below 2^bits, and puts its inverse and the group's sum where the first lane
  // says.
  template <int bits>
  __device__ __forceinline__ float fix(const uint4& in, float (&f)[8], float2* about,
                                       uint32_t& largest) const {
    const uint32_t v[4] = {in.x, in.y, in.z, in.w};
    float sum = 0.0f;
    uint32_t top = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) {
      f[i] = i % 2 ? H::high(v[i / 2]) : H::low(v[i / 2]);
      top = max(top, __float_as_uint(fabsf(f[i])));  // bits: NaN is largest
      sum += f[i];
    }
#pragma unroll
    for (int other = 1; other < Shape::kGroup / 8; other *= 2) {
      sum += __shfl_xor_sync(0xffffffffu, sum, other);
      top = max(top, __shfl_xor_sync(0xffffffffu, top, other));
    }
    largest = max(largest, top);
    // 2^(bits - 1 - e) for a largest in [2^e, 2^(e + 1)). Where that is no float, x is below
    // 2^-105 and keeps fewer bits.
    const int e = max(int(top >> 23), bits - 1);
    if (lane % (Shape::kGroup / 8) == 0)
      *about = {e > bits - 1 ? __int_as_float((e - bits + 1) << 23) : 0x1p-127f, sum};
    return __int_as_float((253 + bits - e) << 23);
  }
};

template <class F, class T, int TOK, bool gather>
struct MatvecInteger : MatvecFixed<F, T, TOK, gather> {
  using Base = MatvecFixed<F, T, TOK, gather>;
  using Base::base, Base::lane, Base::g, Base::c, Base::at, Base::k0, Base::shared;
  using Base::lane_at, Base::kTogether;
  using typename Base::H, typename Base::Shape, typename Base::Slice;
  static constexpr int NT = Shape::kColumnTiles, kSlots = Shape::kSlots;
  using Bytes = ByteCodes<F::kBits>;
  // Column q of the product: limb q / TOK of token q % TOK. TOK == 1: limb q % 4 of the group
  // of slot q / 4, and limb 3, which there is not, collects biases. Other columns are never
  // read.
  static constexpr int kBlock = 3 * TOK * 32;  // bytes of x for a block of 32 codes

  // A slice of x: limbs as [block of 32][limb][token][lane of the quad][8], and of each group
  // and token its unit and its sum.
  __device__ __forceinline__ void store_x(int k, int token, const uint4 (&in)[kTogether], int,
                                          uint32_t& largest) const {
    auto* about =
        reinterpret_cast<float2*>(shared + at.x_sums) + (k - k0) / Shape::kGroup * TOK + token;
    char* x = shared + at.x + this->block_at(k) * kBlock + token * 32 + this->taker() * 8;
#pragma unroll
    for (int t = 0; t < kTogether; t++) {
      if (token + t >= this->run.tokens) break;  // nobody reads their columns
      float f[8];
      const float scale = Base::template fix<22>(in[t], f, about + t, largest);
      uint32_t z[8];  // limb 2 + 128, limb 1 + 128, limb 0
#pragma unroll
      for (int i = 0; i < 8; i++)
        z[i] =
            __float_as_int(fmaf(f[Bytes::order(i)], scale, Base::kMagic)) + 0x8080 - 0x400000;
      uint32_t limbs[3][2];
#pragma unroll
      for (int w = 0; w < 2; w++) {
        const uint32_t* four = z + 4 * w;
        const uint32_t low = __byte_perm(four[0], four[1], 0x5140);
        const uint32_t high = __byte_perm(four[2], four[3], 0x5140);
        limbs[2][w] = __byte_perm(low, high, 0x5410) ^ 0x80808080u;
        limbs[1][w] = __byte_perm(low, high, 0x7632) ^ 0x80808080u;
        limbs[0][w] = __byte_perm(__byte_perm(four[0], four[1], 0x0062),
                                  __byte_perm(four[2], four[3], 0x0062), 0x5410);
      }
#pragma unroll
      for (int limb = 0; limb < 3; limb++)
        *reinterpret_cast<uint2*>(x + (limb * TOK + t) * 32) = {limbs[limb][0], limbs[limb][1]};
    }
  }

  // This lane's x for its first column of a slice that starts at k, and what is known of its
  // group.
  __device__ uint32_t x_at(int k) const {
    return base + at.x + uint32_t(k - k0) / 32 * kBlock + (TOK == 1 ? g % 4 : g) * 32 + c * 8;
  }
  __device__ uint32_t sums_at(int k) const {
    const int token = TOK == 1 ? c / 2 : 2 * c % TOK;  // TOK == 1: its slot's group
    return base + at.x_sums + (uint32_t(k - k0) / Shape::kGroup * TOK + token) * 8;
  }

  template <bool whole>
  __device__ __forceinline__ void multiply_slice(const Slice& slice, int groups,
                                                 float (&y)[NT][4]) const {
    constexpr int kBlocks = Shape::kGroup / 32, kWords = Shape::kSliceScales / 4;
    constexpr int kJoin = Shape::kJoin;
    uint32_t scales[2][kWords], biases[2][kWords];
#pragma unroll
    for (int r = 0; r < 2; r++) {
      Base::load_words(slice.scales[r], scales[r]);
      Base::load_words(slice.biases[r], biases[r]);
    }
    const uint32_t zeros = base + at.zeros + 8 * c;
#pragma unroll
    for (int first = 0; first < Shape::kInSlice; first += kSlots) {
      int sum[NT][4] = {};
#pragma unroll
      for (int slot = 0; slot < kSlots; slot++) {
        if (!whole && first + slot >= groups) break;
        const uint32_t there = slice.x + (first + slot) * kBlocks * kBlock;
        const uint32_t from = kSlots == 1 || g / 4 == slot ? there : zeros;
#pragma unroll
        for (int i = 0; i < kBlocks; i += kJoin) {
          const int block = (first + slot) * kBlocks + i;
          uint2 codes[2][kJoin];
#pragma unroll
          for (int r = 0; r < 2; r++)
            lane_at.load(slice.codes[r] + block * 4 * F::kBits, codes[r]);
#pragma unroll
          for (int j = 0; j < kJoin; j++) {
            const uint2 w[2] = {Bytes::words(codes[0][j]), Bytes::words(codes[1][j])};
#pragma unroll
            for (int nt = 0; nt < NT; nt++)
              mma_bytes(sum[nt], w, load_shared2(from + (i + j) * kBlock + nt * 256));
          }
        }
      }
      // y += scale * unit * sum, and bias * (sum of x) in the columns of limb 2.
#pragma unroll
      for (int half = 0; half < Shape::kTokenTiles; half++) {
        float unit[2], total[2];
        if constexpr (TOK == 1) {
          const uint2 v = load_shared2(slice.x_sums + first * 8);
          unit[0] = __uint_as_float(v.x), unit[1] = c % 2 ? 0.0f : unit[0];
          total[0] = 0.0f, total[1] = c % 2 ? __uint_as_float(v.y) : 0.0f;
        } else {
          const uint4 v = load_shared4(slice.x_sums + (first * TOK + half * 8) * 8);
          unit[0] = __uint_as_float(v.x), total[0] = __uint_as_float(v.y);
          unit[1] = __uint_as_float(v.z), total[1] = __uint_as_float(v.w);
        }
#pragma unroll
        for (int r = 0; r < 2; r++) {
          float s = pick(scales[r][first / 2], first), b = pick(biases[r][first / 2], first);
          if (!whole && first + (TOK == 1 ? c / 2 : 0) >= groups) s = b = 0.0f;
#pragma unroll
          for (int i = 0; i < 2; i++) {
            const float factor = s * unit[i];
#pragma unroll
            for (int nt = half; nt < NT; nt += Shape::kTokenTiles) {
              float& into = y[nt][2 * r + i];
              into = fmaf(factor, float(sum[nt][2 * r + i]), into);
            }
            if (TOK > 1 || i == 1) {
              float& into = y[2 * TOK / 8 + half][2 * r + i];
              into = fmaf(b, total[i], into);
            }
          }
        }
      }
    }
  }

  __device__ __forceinline__ void fill_table() const {}
  // Sums by token from sums by column, in y[half].
  __device__ __forceinline__ void sum_columns(float (&y)[NT][4]) const {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if constexpr (TOK == 1) {
        if (i % 2) continue;
        float sum =
            fmaf(c % 2 ? 1.0f : 65536.0f, y[0][i], (c % 2 ? 1.0f : 256.0f) * y[0][i + 1]);
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        y[0][i] = sum + __shfl_xor_sync(0xffffffffu, sum, 2);
      } else if constexpr (TOK == 4) {
        const float sum = c < 2 ? fmaf(65536.0f, y[0][i], y[1][i]) : 256.0f * y[0][i];
        y[0][i] = sum + __shfl_xor_sync(0xffffffffu, sum, 2);
      } else {
        constexpr int H = Shape::kTokenTiles;
#pragma unroll
        for (int half = 0; half < H; half++)
          y[half][i] =
              fmaf(65536.0f, y[half][i], fmaf(256.0f, y[H + half][i], y[2 * H + half][i]));
      }
    }
  }

 private:
  // The scale of group `first` out of a pair, or of this lane's slot's.
  __device__ __forceinline__ float pick(uint32_t pair, int first) const {
    if constexpr (TOK == 1)
      return H::either(pair, c >= 2);
    else
      return first % 2 ? H::high(pair) : H::low(pair);
  }
};

}  // namespace lowbit::cuda
