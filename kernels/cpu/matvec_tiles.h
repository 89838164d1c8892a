// matvec with tiles, for the few to a hundred rows of x between matvec's registers and matmul's
// panels. Codes are exact in bfloat16, so tiles multiply codes with x and the scale is applied
// to the 16 x 16 sums of each group: decoding is one table lookup for 32 codes, and no weight
// is rounded. Float32 x is the exact sum of three bfloat16 and float16 x of two, so that tiles
// serve them as well; while x has few rows, the parts share a tile's 16 columns.
//
//   for each     16 stored rows of W, block of K
//                  codes -> panel[16][k], in L1
//     for each   16 rows of x, group of K
//                  C = panel x X over the group (1 to 4 steps of 32, times the tiles that the
//                  parts of x fill)
//                  sum[n] += scale[n] * C[n] + bias[n] * (group sum of x), n = 0..15
//
// nvfp4's groups of 16 are shorter than a tile's 32 along K; scale times code is exact in
// bfloat16 there, so its panel holds weights, and 128 of them count as one group of scale 1:
// four C tiles take turns, as with the other formats.
#pragma once

#include "activations.h"
#include "arena.h"
#include "exact.h"
#include "simd_amx.h"

LOWBIT_BEGIN

template <class F>
inline constexpr bool kTileFormat = kHasExactCodes<typename F::Code>;

// Codes for groups that fill tiles, folded weights for shorter ones.
template <class F>
struct TileDecoderOf {
  struct type : ExactDecoder<typename F::Code> {
    static constexpr bool kFolded = false;
    void row(const uint8_t* p, int64_t count, const float*, bf16* out) const {
      ExactDecoder<typename F::Code>::row(p, count, out);
    }
  };
};
template <class F>
  requires(F::kGroup < 32)
struct TileDecoderOf<F> {
  struct type : FoldedDecoder<F> {
    static constexpr bool kFolded = true;
    void row(const uint8_t* p, int64_t count, const float* scale, bf16* out) const {
      FoldedDecoder<F>::row(p, count, scale, scale, out);
    }
  };
};

template <class Decoder>
struct TileMatvec {
  static constexpr int64_t kBlock = 512, kLd = kBlock + 32;  // of K; a panel is 17 KiB

  const cpu::Product& p;
  const Pool& pool;
  const Decoder& decoder;
  const int bits = kFormats[int(p.format)].bits;
  const int64_t K = p.w.columns, Kp = up(K, 32), N = p.w.rows, M = p.x.count;
  const int64_t blocks = (M + 15) / 16;  // of x
  const int64_t stored_group = p.w.group_size;
  const int64_t group = Decoder::kFolded ? 128 : stored_group;  // that a C tile covers
  const int64_t groups = (Kp + group - 1) / group;
  const int64_t room_groups = Groups::padded(K / stored_group);
  // bfloat16 parts of an element of x. A quantized x has one.
  const int parts = p.x.quantize != Format::dense || p.x.dtype == Dtype::bf16 ? 1
                    : p.x.dtype == Dtype::f16                                 ? 2
                                                                              : 3;
  // Part i of row t has column i * width + t, counted through `products` tiles of 16 columns;
  // up to 8 rows leave room for several parts in one tile, whose columns are summed at the end
  // (float32 x, M = 8, 4096 x 4096, Xeon with AMX shared with others, 2026-11-22, best of two
  // rounds: 4-bit g64 1.97 -> 1.71 ms, 8-bit g64 2.29 -> 1.75). A part of 8 columns in tiles of
  // 8 columns instead would gain nothing: loads, products and stores of a tile take as long
  // (8, 16, 17 cycles).
  const int width = M > 8 ? 16 : int(M) * parts > 16 ? 8 : int(M);
  const int products = (width * parts + 15) / 16;
  const int parts_side_by_side = parts < 16 / width ? parts : 16 / width;

  bf16* x = nullptr;        // [16 tokens][k/32][product][k/2 % 16][column][k%2]
  float* x_sums = nullptr;  // [16 tokens][group][column], 0 beyond the first parts
  float* rows = nullptr;    // per thread: kBlock elements of a row of x
  bf16* panels = nullptr;   // per thread: [16][kLd]
  float* scales = nullptr;  // per thread: [16][scale, bias][room_groups]
  float* sums = nullptr;    // per thread: [16 tokens][16 rows][column]
  bool extreme_x = false;

  size_t lay_out(Arena a) {
    x = a.take<bf16>(blocks * 16 * Kp * products);
    x_sums = a.take<float>(blocks * 16 * groups);
    rows = a.take<float>(pool.threads * (kBlock + 32));
    panels = a.take<bf16>(pool.threads * 16 * kLd);
    scales = a.take<float>(pool.threads * 32 * room_groups);
    sums = a.take<float>(pool.threads * blocks * 256);
    return a.used;
  }

  // Elements [k0, k0 + kBlock) of 16 rows of x.
  void pack(int64_t block, int64_t k0, int thread) {
    float* row = rows + thread * (kBlock + 32);
    const int64_t count = K - k0 < kBlock ? K - k0 : kBlock, padded = up(count, 32);
    bf16* out = x + (block * Kp + k0) * products * 16;
    float* out_sums = x_sums + (block * groups + k0 / group) * 16;
    std::memset(out, 0, size_t(padded * products * 16) * sizeof(bf16));
    std::memset(out_sums, 0, size_t((padded + group - 1) / group * 16) * sizeof(float));
    for (int64_t t = 0; t < 16 && block * 16 + t < M; t++) {
      read_row(p.x, block * 16 + t, k0, count, row);
      for (int64_t k = count; k < padded; k++) row[k] = 0.0f;
      if (extreme(row, count) || (parts > 1 && tiny(row, count)))
        __atomic_store_n(&extreme_x, true, __ATOMIC_RELAXED);
      if (p.x.quantize != Format::dense)
        round_trip(p.x.quantize, p.x.dtype, row, count, p.x.global_scale);
      for (int64_t g = 0; g * group < padded; g++) {
        f32 sum = zero();
        for (int64_t k = g * group; k < (g + 1) * group && k < padded; k += 16)
          sum = add(sum, load(row + k));
        out_sums[g * 16 + t] = reduce(sum);
      }
      for (int64_t k = 0; k < padded; k += 32) {
        f32 low = load(row + k), high = load(row + k + 16);
        for (int part = 0; part < parts; part++) {
          alignas(64) bf16 rounded[32];
          _mm512_store_si512(rounded, round_pairs(low, high));
          const int64_t column = part * width + t;
          bf16* to = out + (k * products + column / 16 * 32) * 16 + column % 16 * 2;
          for (int64_t i = 0; i < 16; i++) std::memcpy(to + i * 32, rounded + 2 * i, 4);
          if (part + 1 == parts) break;
          low = _mm512_sub_ps(low, load(rounded)),
          high = _mm512_sub_ps(high, load(rounded + 16));
        }
      }
    }
  }

  // The smaller parts of x must stay in bfloat16's normal range.
  static bool tiny(const float* row, int64_t count) {
    float largest = 0.0f;
    for (int64_t k = 0; k < count; k++) largest = larger(largest, magnitude(row[k]));
    return largest > 0.0f && largest < 0x1p-80f;
  }

  // 32 elements of K into C tile `c`; none from `end` on.
  template <int c>
  LOWBIT_FN void step(const bf16* panel, const bf16* xb, int64_t k, int64_t end) const {
    if (k >= end) return;
    tiles::load<4 + c % 2>(panel + k, kLd * sizeof(bf16));
    for (int i = 0; i < products; i++) {
      tiles::load<6 + c % 2>(xb + (k * products + i * 32) * 16, 64);
      tiles::multiply<c, 4 + c % 2, 6 + c % 2>();
    }
  }

  // All groups of one block of K against one block of x, four at a time, in turns.
  void accumulate(const bf16* panel, const float* scale, const float* bias, int64_t depth,
                  const bf16* xb, const float* xs, float* sum) const {
    alignas(64) float c[4][256];
    f32 total[16];
    for (int n = 0; n < 16; n++) total[n] = load(sum + n * 16);
    const auto apply = [&](int64_t g, const float* tile) {
      const f32 group_sum = load(xs + g * 16);
      for (int n = 0; n < 16; n++) {
        const int64_t at = n * 2 * room_groups + g;
        if constexpr (Decoder::kFolded) {
          total[n] = add(load(tile + n * 16), total[n]);
        } else {
          total[n] = fma(load(tile + n * 16), splat(scale[at]), total[n]);
          if (bias) total[n] = fma(group_sum, splat(bias[at]), total[n]);
        }
      }
    };
    const int64_t count = (depth + group - 1) / group;
    for (int64_t g = 0; g < count; g += 4) {
      tiles::clear<0>(), tiles::clear<1>(), tiles::clear<2>(), tiles::clear<3>();
      for (int64_t k = g * group; k < (g + 1) * group; k += 32) {
        step<0>(panel, xb, k, depth);
        step<1>(panel, xb, k + group, depth);
        step<2>(panel, xb, k + 2 * group, depth);
        step<3>(panel, xb, k + 3 * group, depth);
      }
      tiles::store<0>(c[0], 64), tiles::store<1>(c[1], 64);
      tiles::store<2>(c[2], 64), tiles::store<3>(c[3], 64);
      for (int i = 0; i < 4 && g + i < count; i++) apply(g + i, c[i]);
    }
    for (int n = 0; n < 16; n++) store(sum + n * 16, total[n]);
  }

  // Rows of a task: many, so that the rows prefetched while 16 are in work are this thread's
  // next.
  int64_t task_rows() const {
    const int64_t share = up((N + pool.threads * 4 - 1) / (pool.threads * 4), 16);
    return share < 128 ? share : 128;
  }

  void task(int64_t n0, int thread) const {
    tiles::configure();
    for (int64_t n = n0; n < n0 + task_rows() && n < N; n += 16) rows16(n, thread);
    tiles::release();
  }

  void rows16(int64_t n0, int thread) const {
    bf16* panel = panels + thread * 16 * kLd;
    float* scale = scales + thread * 32 * room_groups;
    float* sum = sums + thread * blocks * 256;
    const int64_t count_rows = N - n0 < 16 ? N - n0 : 16;
    for (int64_t i = 0; i < blocks * 256; i++) sum[i] = 0.0f;
    const auto stored_row = [&](int64_t n) {
      return n0 + (n < count_rows ? n : count_rows - 1);
    };
    for (int64_t n = 0; n < 16; n++) {
      float* s = scale + n * 2 * room_groups;
      Groups{s, p.w.biases ? s + room_groups : nullptr}.read(p.w, stored_row(n), 0,
                                                             K / stored_group, decoder.kOffset);
    }
    for (int64_t k0 = 0; k0 < K; k0 += kBlock) {
      const int64_t count = K - k0 < kBlock ? K - k0 : kBlock;
      const float* here = scale + k0 / stored_group;
      for (int64_t n = 0; n < 16; n++) {
        const uint8_t* from = p.w.codes + stored_row(n) * p.w.row_bytes + k0 * bits / 8;
        for (int64_t line = 0; line < count * bits / 8; line += 64)
          __builtin_prefetch(from + 16 * p.w.row_bytes + line);
        decoder.row(from, count, here + n * 2 * room_groups, panel + n * kLd);
      }
      for (int64_t b = 0; b < blocks; b++)
        accumulate(panel, here, p.w.biases ? here + room_groups : nullptr, up(count, 32),
                   x + (b * Kp + k0) * products * 16, x_sums + (b * groups + k0 / group) * 16,
                   sum + b * 256);
    }
    for (int64_t m = 0; m < M; m++) {
      float line[16 + kLanes];
      for (int64_t n = 0; n < count_rows; n++) {
        const float* columns = sum + m / 16 * 256 + n * 16 + m % 16;
        line[n] = columns[0];
        for (int i = 1; i < parts_side_by_side; i++) line[n] += columns[i * width];
      }
      write_row(p.y, m, n0, count_rows, line);
    }
  }

  bool run() {
    lay_out(Arena{static_cast<char*>(pool.scratch(lay_out(Arena{})))});
    const int64_t pieces = (K + kBlock - 1) / kBlock;
    cpu::parallel_for(pool, blocks * pieces, [&](int64_t i, int thread) {
      pack(i / pieces, i % pieces * kBlock, thread);
    });
    if (extreme_x) return false;
    const int64_t size = task_rows();
    cpu::parallel_for(pool, (N + size - 1) / size,
                      [&](int64_t i, int thread) { task(i * size, thread); });
    return true;
  }
};

LOWBIT_END
