// matvec with tiles, for the few to a hundred rows of x between matvec's registers and matmul's
// panels. Codes are exact in bfloat16, so tiles multiply codes with x and the scale is applied
// to the 16 x 16 sums of each group: decoding is one table lookup for 32 codes, and no weight
// is rounded. Float32 x is the exact sum of three bfloat16 and float16 x of two, so that tiles
// serve them as well; while x has few rows, the parts share a tile's 16 columns.
//
//   for each   16 stored rows of W and block of K (tile_task.h), 16 rows of x, group of K
//                C = panel x X over the group (1 to 4 steps of 32, times the tiles that the
//                parts of x fill)
//                sum[n] += scale[n] * C[n] + bias[n] * (group sum of x), n = 0..15
//
// Up to 8 columns, tiles have 8: as many cycles, but half of x and of C to read and write.
//
// nvfp4's groups of 16 are shorter than a tile's 32 along K; scale times code is exact in
// bfloat16 there, so its panel holds weights, and 128 of them count as one group of scale 1:
// four C tiles take turns, as with the other formats.
#pragma once

#include "activations.h"
#include "exact.h"
#include "simd_amx.h"
#include "tile_task.h"

LOWBIT_BEGIN

template <class F>
inline constexpr bool kTileFormat = kHasExactCodes<typename F::Code>;

// Codes for groups that fill tiles, folded weights for shorter ones.
template <class F>
struct TileDecoderOf {
  struct type : ExactDecoder<typename F::Code> {
    static constexpr bool kFolded = false;
    void row(const uint8_t* p, int64_t count, const uint8_t*, bf16* out) const {
      ExactDecoder<typename F::Code>::row(p, count, out);
    }
  };
};
template <class F>
  requires(kHasProducts<F>)
struct TileDecoderOf<F> {
  struct type : ProductDecoder<F> {
    static constexpr bool kFolded = true;
    static constexpr float kOffset = 0.0f;
  };
};

template <class Decoder>
struct TileMatvec {
  using Task = TileTask<bf16>;
  static constexpr int64_t kBlock = Task::kBlock, kLd = Task::kLd;

  const cpu::Product& p;
  const Pool& pool;
  const Decoder& decoder;
  const int64_t K = p.w.columns, Kp = up(K, 32), N = p.w.rows, M = p.x.count;
  const int64_t blocks = (M + 15) / 16;  // of x
  const int64_t stored_group = p.w.group_size;
  const int64_t group = Decoder::kFolded ? 128 : stored_group;  // that a C tile covers
  const int64_t groups = (Kp + group - 1) / group;
  // bfloat16 parts of an element of x. A quantized x has one.
  const int parts = p.x.quantize != Format::dense || p.x.dtype == Dtype::bf16 ? 1
                    : p.x.dtype == Dtype::f16                                 ? 2
                                                                              : 3;
  // Part i of row t has column i * width + t, counted through `products` tiles of `columns`;
  // up to 8 rows leave room for several parts in one tile, whose columns are summed at the end
  // (float32 x, M = 8, 4096 x 4096, Xeon with AMX shared with others, 2026-11-22, best of two
  // rounds: 4-bit g64 1.97 -> 1.71 ms, 8-bit g64 2.29 -> 1.75).
  const int width = M > 8 ? 16 : int(M) * parts > 16 ? 8 : int(M);
  const int columns = width * parts <= 8 ? 8 : 16;
  const int products = (width * parts + 15) / 16;
  const int parts_side_by_side = parts < 16 / width ? parts : 16 / width;
  Task tasks{p, pool.threads, blocks * 16 * columns};

  bf16* x = nullptr;        // [16 tokens][k/32][product][k/2 % 16][column][k%2]
  float* x_sums = nullptr;  // [16 tokens][group][column], 8 columns twice
  float* rows = nullptr;    // per thread: kBlock elements of a row of x
  bool extreme_x = false;

  size_t lay_out(Arena a) {
    x = a.take<bf16>(blocks * columns * Kp * products);
    x_sums = a.take<float>(blocks * 16 * groups);
    rows = a.take<float>(pool.threads * (kBlock + 32));
    tasks.lay_out(a);
    return a.used;
  }

  // Elements [k0, k0 + kBlock) of 16 rows of x.
  void pack(int64_t block, int64_t k0, int thread) {
    float* row = rows + thread * (kBlock + 32);
    const int64_t count = K - k0 < kBlock ? K - k0 : kBlock, padded = up(count, 32);
    bf16* out = x + (block * Kp + k0) * products * columns;
    float* out_sums = x_sums + (block * groups + k0 / group) * 16;
    std::memset(out, 0, size_t(padded * products * columns) * sizeof(bf16));
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
        for (int i = 0; i < 16; i += columns) out_sums[g * 16 + i + t] = reduce(sum);
      }
      for (int64_t k = 0; k < padded; k += 32) {
        f32 low = load(row + k), high = load(row + k + 16);
        for (int part = 0; part < parts; part++) {
          alignas(64) bf16 rounded[32];
          _mm512_store_si512(rounded, round_pairs(low, high));
          const int64_t column = part * width + t;
          bf16* to = out + (k * products + column / 16 * 32) * columns + column % 16 * 2;
          for (int64_t i = 0; i < 16; i++)
            std::memcpy(to + i * columns * 2, rounded + 2 * i, 4);
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
  template <int c, int kColumns>
  LOWBIT_FN void step(const bf16* panel, const bf16* xb, int64_t k, int64_t end) const {
    if (k >= end) return;
    tiles::load<4 + c % 2>(panel + k, kLd * sizeof(bf16));
    for (int i = 0; i < products; i++) {
      tiles::load<6 + c % 2>(xb + (k * products + i * 32) * kColumns, kColumns * 4);
      tiles::multiply<c, 4 + c % 2, 6 + c % 2>();
    }
  }

  // What belongs to vector v of a tile: one row's scale, or those of two rows of 8 columns.
  template <int kColumns>
  LOWBIT_FN f32 of_rows(const float* scale, int v) const {
    if constexpr (kColumns == 16) return splat(scale[v * 2 * tasks.room_groups]);
    const float* two = scale + v * 4 * tasks.room_groups;
    return _mm512_mask_broadcastss_ps(splat(two[0]), 0xff00,
                                      _mm_load_ss(two + 2 * tasks.room_groups));
  }

  // All groups of one block of K against one block of x, four at a time, in turns.
  template <int kColumns>
  void accumulate(const bf16* panel, const float* scale, const float* bias, int64_t depth,
                  const bf16* xb, const float* xs, float* sum) const {
    constexpr int kVectors = kColumns;  // of 16 x kColumns sums
    alignas(64) float c[4][16 * kColumns];
    f32 total[kVectors];
    for (int v = 0; v < kVectors; v++) total[v] = load(sum + v * 16);
    const auto apply = [&](int64_t g, const float* tile) {
      const f32 group_sum = load(xs + g * 16);
      for (int v = 0; v < kVectors; v++) {
        const f32 products = load(tile + v * 16);
        if constexpr (Decoder::kFolded) {
          total[v] = add(products, total[v]);
        } else {
          total[v] = fma(products, of_rows<kColumns>(scale + g, v), total[v]);
          if (bias) total[v] = fma(group_sum, of_rows<kColumns>(bias + g, v), total[v]);
        }
      }
    };
    constexpr size_t kStride = kColumns * sizeof(float);
    const int64_t count = (depth + group - 1) / group;
    for (int64_t g = 0; g < count; g += 4) {
      tiles::clear<0>(), tiles::clear<1>(), tiles::clear<2>(), tiles::clear<3>();
      for (int64_t k = g * group; k < (g + 1) * group; k += 32) {
        step<0, kColumns>(panel, xb, k, depth);
        step<1, kColumns>(panel, xb, k + group, depth);
        step<2, kColumns>(panel, xb, k + 2 * group, depth);
        step<3, kColumns>(panel, xb, k + 3 * group, depth);
      }
      tiles::store<0>(c[0], kStride), tiles::store<1>(c[1], kStride);
      tiles::store<2>(c[2], kStride), tiles::store<3>(c[3], kStride);
      for (int i = 0; i < 4 && g + i < count; i++) apply(g + i, c[i]);
    }
    for (int v = 0; v < kVectors; v++) store(sum + v * 16, total[v]);
  }

  void task(int64_t n0, int thread) const {
    const auto* scales = static_cast<const uint8_t*>(p.w.scales);
    const auto decode = [&](const uint8_t* from, int64_t depth, int64_t row, int64_t k0,
                            bf16* out) {
      decoder.row(from, depth, scales + (row * K + k0) / stored_group, out);
    };
    const auto multiply = [&](const bf16* panel, const float* scale, float* sum, int64_t k0,
                              int64_t depth) {
      const float* bias = p.w.biases ? scale + tasks.room_groups : nullptr;
      const auto serve =
          columns == 8 ? &TileMatvec::accumulate<8> : &TileMatvec::accumulate<16>;
      for (int64_t b = 0; b < blocks; b++)
        (this->*serve)(panel, scale, bias, up(depth, 32),
                       x + (b * Kp + k0) * products * columns,
                       x_sums + (b * groups + k0 / group) * 16, sum + b * 16 * columns);
    };
    const auto write = [&](const float* sum, int64_t n, int64_t count) {
      for (int64_t m = 0; m < M; m++) {
        const float* from = sum + m / 16 * 16 * columns + m % 16;
        float line[16 + kLanes];
        for (int64_t i = 0; i < count; i++) {
          line[i] = from[i * columns];
          for (int part = 1; part < parts_side_by_side; part++)
            line[i] += from[i * columns + part * width];
        }
        write_row(p.y, m, n, count, line);
      }
    };
    tiles::configure(columns);
    tasks.run(n0, thread, decoder.kOffset, Decoder::kFolded, decode, multiply, write);
    tiles::release();
  }

  bool run() {
    lay_out(Arena{static_cast<char*>(pool.scratch(lay_out(Arena{})))});
    const int64_t pieces = (K + kBlock - 1) / kBlock;
    cpu::parallel_for(pool, blocks * pieces, [&](int64_t i, int thread) {
      pack(i / pieces, i % pieces * kBlock, thread);
    });
    if (extreme_x) return false;
    cpu::parallel_for(pool, (N + tasks.rows - 1) / tasks.rows,
                      [&](int64_t i, int thread) { task(i * tasks.rows, thread); });
    return true;
  }
};

LOWBIT_END
