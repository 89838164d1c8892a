// matvec with floats: codes become pairs of a 16-bit type (load.h), and groups' scales are
// applied to float32 sums of products, or, of nvfp4 from 8 tokens on, to the codes.
//
// e4m3 codes become float16, exactly, an instruction for two where as bfloat16 each pair takes
// three and a test for NaN (mxfp8 4096x14336, M = 1: 20.0 us as bfloat16, 18.1 so; H200,
// 2026-11-29). bfloat16 x then is staged as float16 too, each group times a power of two that
// brings its largest to [2^14, 2^15): exact but for what is below 2^-39 of that. The power's
// inverse, the group's unit, waits beside x and meets sums before scales do.
//
// e2m1 codes are moved to where T has its exponent and mantissa, which makes them 2^kLift times
// too small. Most stay so: sums are multiplied by what is missing. In bfloat16, where that is
// 2^-126, x is staged 2^100 times as large, so that no product is lost to float32's range; x
// that does not fit that is staged again, as it is or 2^200 times as large, and y is corrected.
// From 8 tokens on, where x takes longer to stage, codes are multiplied.
#pragma once

#include "matvec_staging.h"

namespace lowbit::cuda {

template <class F, class T, int TOK, bool gather>
struct MatvecFloat : MatvecStaging<F, T, TOK, gather> {
  using Base = MatvecStaging<F, T, TOK, gather>;
  using Base::base, Base::warp, Base::lane, Base::g, Base::c, Base::at, Base::k0, Base::shared;
  using Base::lane_at, Base::kTogether, Base::block_at, Base::taker, Base::load_words;
  using typename Base::H, typename Base::Shape, typename Base::Slice;
  // What codes become, and x with them.
  using E = std::conditional_t<Shape::kE4m3, f16, T>;
  using HE = Half<E>;
  using Codes = LaneCodes<typename F::Code, E, Shape::kJoin>;
  static constexpr int kPlanes = Codes::kPlanes, NT = Shape::kColumnTiles;
  static constexpr int kSlots = Shape::kSlots;
  // bfloat16's codes that no scale meets: whether they are multiplied by 2^kLift, or x is
  // staged 2^kXLift times as large.
  static constexpr bool kTiny = !Shape::kAffine && !Shape::kFolded && HE::kWide;
  static constexpr bool kLifted = kTiny && TOK >= 8, kRaised = kTiny && TOK < 8;
  static constexpr int kXLift = 100;
  static constexpr bool kUnits = !std::is_same_v<E, T>;
  // What is missing then: of sums of products before e8m0 scales, which may be as small as
  // float32 has them, and of y before it is stored otherwise.
  static constexpr float kMissing =
      Shape::kFolded || kLifted ? 1.0f : float(1u << (Codes::kLift - (kRaised ? kXLift : 0)));
  static constexpr bool kE8m0 = !Shape::kAffine && Shape::kGroup == 32;
  static constexpr float kSumUnit = kE8m0 ? kMissing : 1.0f;
  static constexpr float kUnit = (kE8m0 ? 1.0f : kMissing) / float(1 << Codes::kTop);
  // nvfp4: scale times code is exact in T when its power of two is moved down a little.
  static constexpr int kDown = Codes::kLift - (H::kMantissaBits == 7 ? 110 : 7);

  // Eight elements, as the pairs of codes that they meet.
  __device__ __forceinline__ void put_in_order(const uint32_t (&v)[4],
                                               uint32_t (&pairs)[4]) const {
    if constexpr (Codes::kAcross) {  // halves of the pairs of two lanes
      const bool high = lane % 2;
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const uint32_t own = high ? v[2 + i] : v[i];
        const uint32_t other = __shfl_xor_sync(0xffffffffu, high ? v[i] : v[2 + i], 1);
        const uint32_t first = high ? other : own, second = high ? own : other;
        pairs[2 * i] = __byte_perm(first, second, 0x5410);
        pairs[2 * i + 1] = __byte_perm(first, second, 0x7632);
      }
    } else {
#pragma unroll
      for (int p = 0; p < 4; p++) {
        const int even = Codes::order(2 * p), odd = Codes::order(2 * p + 1);
        pairs[p] = __byte_perm(v[even / 2], v[odd / 2],
                               (even % 2 ? 0x32 : 0x10) | (odd % 2 ? 0x7600 : 0x5400));
      }
    }
  }
  static __device__ __forceinline__ uint32_t lift_if(bool yes) {
    return H::power(yes ? kXLift : 0) * 0x10001u;
  }
  // Puts a slice into fragment order, [block of 32][token][lane of the quad][8], and beside it
  // of each group and token its unit (kUnits), or what takes the codes' offset out of a sum of
  // products, and the sum of x, both times 2^kTop. lifts: kRaised, how often x is multiplied by
  // 2^kXLift.
  __device__ __forceinline__ void store_x(int k, int token, const uint4 (&in)[kTogether],
                                          int lifts, uint32_t& largest) const {
    const int group = (k - k0) / Shape::kGroup * TOK + token;
    [[maybe_unused]] auto* about = reinterpret_cast<float2*>(shared + at.x_sums) + group;
    auto* x =
        reinterpret_cast<uint4*>(shared + at.x) + (block_at(k) * TOK + token) * 4 + taker();
#pragma unroll
    for (int t = 0; t < kTogether; t++) {
      if (token + t >= this->run.tokens) break;  // nobody reads their columns
      uint32_t v[4] = {in[t].x, in[t].y, in[t].z, in[t].w};
      if constexpr (kUnits) {
        const float unit = to_half(v, largest);
        if (lane % (Shape::kGroup / 8) == 0)
          reinterpret_cast<float*>(shared + at.x_sums)[group + t] = unit;
      }
      uint32_t out[4];
      put_in_order(v, out);
      float sum = 0.0f, lifted = 0.0f;
#pragma unroll
      for (int p = 0; p < 4; p++) {
        const int lift = Codes::kTop - Codes::place(p);
        if constexpr (Shape::kAffine) {
          const float low = H::low(out[p]), high = H::high(out[p]);
          largest = max(largest, __float_as_uint(fabsf(low)));  // bits: NaN is largest
          largest = max(largest, __float_as_uint(fabsf(high)));
          sum += low + high;
          lifted = fmaf(float(1 << lift), low + high, lifted);
          if (lift != 0) out[p] = H::multiply(out[p], H::power(lift) * 0x10001u);
        }
        if constexpr (kRaised) {
          largest = max(largest, __float_as_uint(fabsf(H::low(out[p]))));
          largest = max(largest, __float_as_uint(fabsf(H::high(out[p]))));
          out[p] = H::multiply(H::multiply(out[p], lift_if(lifts >= 1)), lift_if(lifts == 2));
        }
      }
      if constexpr (Shape::kAffine) {
#pragma unroll
        for (int other = 1; other < Shape::kGroup / 8; other *= 2) {
          sum += __shfl_xor_sync(0xffffffffu, sum, other);
          if (Codes::kTop != 0) lifted += __shfl_xor_sync(0xffffffffu, lifted, other);
        }
        if (Codes::kTop == 0) lifted = sum;
        if (lane % (Shape::kGroup / 8) == 0)
          about[t] = {-Codes::kOffset * lifted, float(1 << Codes::kTop) * sum};
      }
      x[t * 4] = make_uint4(out[0], out[1], out[2], out[3]);
    }
  }

  // Eight elements of a group that is spread over lanes, as float16; returns the group's unit.
  static __device__ __forceinline__ float to_half(uint32_t (&v)[4], uint32_t& largest) {
    float f[8];
    uint32_t top = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) {
      f[i] = i % 2 ? H::high(v[i / 2]) : H::low(v[i / 2]);
      top = max(top, __float_as_uint(fabsf(f[i])));  // bits: NaN is largest
    }
#pragma unroll
    for (int other = 1; other < Shape::kGroup / 8; other *= 2)
      top = max(top, __shfl_xor_sync(0xffffffffu, top, other));
    largest = max(largest, top);
    // 2^(14 - e) for a largest in [2^e, 2^(e + 1)). Where the inverse is no float, x is below
    // 2^-112 and keeps fewer bits.
    const int e = max(int(top >> 23), 15);
    const float power = __int_as_float((268 - e) << 23);
#pragma unroll
    for (int i = 0; i < 4; i++) v[i] = HE::pack(f[2 * i] * power, f[2 * i + 1] * power);
    return __int_as_float((e - 14 + Codes::kLift) << 23);
  }

  // nvfp4: scales as pairs of T.
  __device__ __forceinline__ void fill_table() const {
    if constexpr (Shape::kFolded) {
      constexpr int kUp = Codes::kLift - kDown;
      auto* table = reinterpret_cast<uint32_t*>(shared + at.table);
      for (int i = warp * 32 + lane; i < 256; i += Shape::kWorkers) {
        const uint32_t s =
            H::bits(F::Scale::decode(uint32_t(i)) * __uint_as_float((kUp + 127) << 23));
        table[i] = s | s << 16;
      }
    }
  }

  // Scales (or biases) of `n` groups of a row from i on, an even i when there are two.
  template <int n>
  __device__ __forceinline__ void load_scales(uint32_t row, int i, float (&s)[n]) const {
    if constexpr (Shape::kAffine && n == 2) {
      const uint32_t v = load_shared(row + 2 * i);
      s[0] = H::low(v), s[1] = H::high(v);
    } else if constexpr (Shape::kAffine) {
      uint16_t v;
      asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(row + 2 * i));
      s[0] = H::low(v);
    } else if constexpr (n == 2) {
      uint16_t both;
      asm volatile("ld.shared.u16 %0, [%1];" : "=h"(both) : "r"(row + i));
      const float2 two = two_scales<typename F::Scale>(both);
      s[0] = two.x, s[1] = two.y;
    } else {
      uint32_t v;
      asm volatile("ld.shared.u8 %0, [%1];" : "=r"(v) : "r"(row + i));
      s[0] = two_scales<typename F::Scale>(v).x;
    }
  }
  // nvfp4's scale of this lane's codes of a block, as a pair of elements.
  __device__ __forceinline__ uint32_t folded_scale(uint32_t row, int block) const {
    uint32_t byte;
    asm volatile("ld.shared.u8 %0, [%1];" : "=r"(byte) : "r"(row + 2 * block + c / 2));
    return load_shared(base + at.table + 4 * byte);
  }

  // A slice, or its first spans.
  template <bool whole>
  __device__ __forceinline__ void multiply_slice(const Slice& slice, int spans,
                                                 float (&y)[NT][4]) const {
    constexpr int kBlocks = Shape::kSpan / 32, kJoin = Shape::kJoin;
    constexpr int kInSpan = Shape::kInSpan;
    // Columns: token g % TOK, of the groups whose turn is slot g / TOK. Of two groups in a
    // block each has its own half of the quad's codes.
    const int my_slot = g / (TOK < 8 ? TOK : 8) - (kInSpan == 2 ? c / 2 : 0);
    [[maybe_unused]] uint32_t nans[2] = {};
    const uint32_t zeros = base + at.zeros + 16 * c;
    // Affine groups whose turn never varies: all scales of the slice in a few words.
    constexpr int kWords = Shape::kAffine && kSlots == 1 ? Shape::kSliceScales / 4 : 0;
    uint32_t scales[2][kWords + 1], biases[2][kWords + 1];
    if constexpr (kWords > 0) {
#pragma unroll
      for (int r = 0; r < 2; r++) {
        load_words(slice.scales[r], reinterpret_cast<uint32_t(&)[kWords]>(scales[r]));
        load_words(slice.biases[r], reinterpret_cast<uint32_t(&)[kWords]>(biases[r]));
      }
    }
#pragma unroll
    for (int first = 0; first < Shape::kInSlice; first += kSlots) {
      float sum[NT][kPlanes][4] = {};
      float2 x_sum[NT] = {}, offset[NT] = {};
      if constexpr (Shape::kAffine) {
#pragma unroll
        for (int nt = 0; nt < NT; nt++) {
          const uint4 v = load_shared4(slice.x_sums + (first * TOK + nt * 8) * 8);
          x_sum[nt] = {__uint_as_float(v.y), __uint_as_float(v.w)};
          offset[nt] = {__uint_as_float(v.x), __uint_as_float(v.z)};
        }
      }
      float2 unit[NT];
#pragma unroll
      for (int nt = 0; nt < NT; nt++) {
        unit[nt] = {kSumUnit, kSumUnit};
        if constexpr (kUnits) {
          const uint2 v = load_shared2(slice.x_sums + (first * TOK + nt * 8) * 4);
          unit[nt] = {__uint_as_float(v.x), __uint_as_float(v.y)};
        }
      }
#pragma unroll
      for (int slot = 0; slot < kSlots; slot++) {
        if (!whole && first + slot >= spans) break;
        const uint32_t there = slice.x + (first + slot) * kBlocks * TOK * 64;
        const uint32_t from = Shape::kFree == 1 || my_slot == kInSpan * slot ? there : zeros;
#pragma unroll
        for (int i = 0; i < kBlocks; i += kJoin) {
          const int block = (first + slot) * kBlocks + i;
          uint2 codes[2][kJoin];
#pragma unroll
          for (int r = 0; r < 2; r++)
            lane_at.load(slice.codes[r] + block * 4 * F::kBits, codes[r]);
#pragma unroll
          for (int j = 0; j < kJoin; j++) {
            uint32_t pairs[2][kPlanes][4];
#pragma unroll
            for (int r = 0; r < 2; r++) {
              if (j == 0)
                Codes::template pairs<0>(codes[r][j], pairs[r]);
              else
                Codes::template pairs<1>(codes[r][j], pairs[r]);
              if constexpr (Codes::kNan) nans[r] = Codes::nans(codes[r][j], nans[r]);
              if constexpr (Shape::kFolded || kLifted) {
                uint32_t factor;
                if constexpr (Shape::kFolded)
                  factor = folded_scale(slice.scales[r], block);
                else
                  factor = H::power(Codes::kLift) * 0x10001u;
#pragma unroll
                for (int p = 0; p < 4; p++)
                  pairs[r][0][p] = H::multiply(pairs[r][0][p], factor);
              }
            }
#pragma unroll
            for (int nt = 0; nt < NT; nt++) {
              const uint4 xb = load_shared4(from + (i + j) * TOK * 64 + nt * 512);
#pragma unroll
              for (int plane = 0; plane < kPlanes; plane++) {
                float(&into)[4] = *(Shape::kFolded ? &y[nt] : &sum[nt][plane]);
                const auto& p = pairs;
                HE::mma(into, {p[0][plane][0], p[1][plane][0], p[0][plane][1], p[1][plane][1]},
                        xb.x, xb.y);
                HE::mma(into, {p[0][plane][2], p[1][plane][2], p[0][plane][3], p[1][plane][3]},
                        xb.z, xb.w);
              }
            }
          }
        }
      }
      if constexpr (kWords > 0) {
        float s[2][1], b[2][1];
#pragma unroll
        for (int r = 0; r < 2; r++) {
          const uint32_t sv = scales[r][first / 2], bv = biases[r][first / 2];
          s[r][0] = first % 2 ? H::high(sv) : H::low(sv);
          b[r][0] = first % 2 ? H::high(bv) : H::low(bv);
        }
        apply<whole>(sum, unit, x_sum, offset, s, b, first, spans, y);
      } else if constexpr (!Shape::kFolded) {
        constexpr int kDistinct = TOK == 1 ? 2 : 1;  // groups of this lane's two columns
        const int group = first * kInSpan + 2 * c / TOK % (kSlots * kInSpan);
        float s[2][kDistinct], b[2][kDistinct] = {};
#pragma unroll
        for (int r = 0; r < 2; r++) {
          load_scales(slice.scales[r], group, s[r]);
          if constexpr (Shape::kAffine) load_scales(slice.biases[r], group, b[r]);
        }
        apply<whole>(sum, unit, x_sum, offset, s, b, group, spans * kInSpan, y);
      }
    }
    if constexpr (Codes::kNan)
      if (__any_sync(0xffffffffu, (nans[0] | nans[1]) & Codes::kNans)) spread_nans(nans, y);
  }

  // NaN codes of a row make its sums NaN, of all tokens.
  __device__ __forceinline__ void spread_nans(const uint32_t (&nans)[2],
                                              float (&y)[NT][4]) const {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const uint32_t lanes = __ballot_sync(0xffffffffu, nans[r] & Codes::kNans);
      if ((lanes >> (lane - c) & 15u) == 0) continue;
#pragma unroll
      for (int nt = 0; nt < NT; nt++)
        y[nt][2 * r] = y[nt][2 * r + 1] = __uint_as_float(0x7fffffffu);
    }
  }

  // y += scale * (unit * sum + offset) + bias * (sum of x), each column with its group's:
  // `group` or, when there are two scales, the next. (Columns of no slot are left out when
  // columns are summed.)
  template <bool whole, int n>
  __device__ __forceinline__ void apply(const float (&sum)[NT][kPlanes][4],
                                        const float2 (&unit)[NT], const float2 (&x_sum)[NT],
                                        const float2 (&offset)[NT], float (&s)[2][n],
                                        float (&b)[2][n], int group, int groups,
                                        float (&y)[NT][4]) const {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      if constexpr (!whole)
#pragma unroll
        for (int d = 0; d < n; d++)
          if (group + d >= groups) s[r][d] = b[r][d] = 0.0f;
#pragma unroll
      for (int nt = 0; nt < NT; nt++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
          float code = sum[nt][0][2 * r + i];
          if constexpr (kPlanes == 2) code = fmaf(16.0f, sum[nt][1][2 * r + i], code);
          if constexpr (kUnits || kSumUnit != 1.0f) code *= i ? unit[nt].y : unit[nt].x;
          if constexpr (Shape::kAffine) code += i ? offset[nt].y : offset[nt].x;
          float& into = y[nt][2 * r + i];
          into = fmaf(s[r][i % n], code, into);
          if constexpr (Shape::kAffine)
            into = fmaf(b[r][i % n], i ? x_sum[nt].y : x_sum[nt].x, into);
        }
    }
  }

  // This lane's x for its first column of a slice that starts at k, and the sums of its group.
  __device__ uint32_t x_at(int k) const {
    return base + at.x + uint32_t(k - k0) / 32 * TOK * 64 +
           (g % (TOK < 8 ? TOK : 8) * 4 + c) * 16;
  }
  __device__ uint32_t sums_at(int k) const {
    return base + at.x_sums +
           (uint32_t(k - k0) / Shape::kGroup * TOK + 2 * c % (kSlots * TOK)) *
               (Shape::kE4m3 ? 4 : 8);
  }

  // The sum over a token's columns: of a lane, then of lanes of the quad.
  __device__ __forceinline__ void sum_columns(float (&y)[NT][4]) const {
    constexpr int kUsed = kSlots * Shape::kInSpan * TOK;
    if constexpr (kUsed > TOK) {
#pragma unroll
      for (int r = 0; r < 2; r++) {
        float low = 2 * c < kUsed ? y[0][2 * r] : 0.0f;
        float high = 2 * c + 1 < kUsed ? y[0][2 * r + 1] : 0.0f;
        if constexpr (TOK == 1) low += high;
#pragma unroll
        for (int other = TOK <= 2 ? 1 : TOK / 2; other < 4; other *= 2) {
          low += __shfl_xor_sync(0xffffffffu, low, other);
          high += __shfl_xor_sync(0xffffffffu, high, other);
        }
        y[0][2 * r] = low, y[0][2 * r + 1] = high;
      }
    }
  }
};

}  // namespace lowbit::cuda
