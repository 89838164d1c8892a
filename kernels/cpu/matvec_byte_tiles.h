// matvec with tiles of bytes, for up to 8 rows of 16-bit x and integer codes: codes are copied
// or spread to bytes, never looked up, and x is fixed point (fixed_point.h), three bytes an
// element.
//
//   for each   16 stored rows of W and block of K (tile_task.h), two groups of K, a and b
//                A, B = panel x (largest and middle bytes of x), of each group
//                C    = panel x (smallest bytes), of both
//                sum[n] += scale[n][a] * (step[a] * A[n]) + scale[n][b] * (step[b] * B[n])
//                        + scale[n][a, b] * (step[a, b] * C[n])
//                        + bias[n][a, b] * (group sums of x)[a, b],   n = 0..15
//
// Columns 2t and 2t + 1 of a tile belong to row t of x: in A and B they are the largest and the
// middle bytes, in C the groups a and b. They are added at the end.
#pragma once

#include <type_traits>

#include "activations.h"
#include "fixed_point.h"
#include "simd_amx.h"
#include "tile_task.h"

LOWBIT_BEGIN

template <class Code>
struct ByteTileMatvec {
  static constexpr int kBits = Code::kBits;
  using Codes = ByteCodes<kBits, 4>;  // in natural order
  using Task = TileTask<uint8_t>;
  static constexpr int64_t kBlock = Task::kBlock, kLd = Task::kLd, kMaxRows = 8, kTile = 1024;
  static constexpr int kDepth = 22;

  const cpu::Product& p;
  const Pool& pool;
  const int64_t K = p.w.columns, N = p.w.rows, M = p.x.count;
  const int64_t group = p.w.group_size, groups = K / group, pairs_of_groups = (groups + 1) / 2;
  const int64_t step_codes = group < 64 ? group : 64;  // along K in a tile
  Task tasks{p, pool.threads, 256};

  int8_t* x = nullptr;     // [step][largest and middle, smallest][k/4][column][k%4]
  float* steps = nullptr;  // [pair of groups][a, b, both][column], x_sums[column]
  float* rows = nullptr;   // [row of x][K]
  bool extreme_x = false;

  size_t lay_out(Arena a) {
    x = a.take<int8_t>(K / step_codes * 2 * kTile + kTile);
    steps = a.take<float>(pairs_of_groups * 64);
    rows = a.take<float>(kMaxRows * up(K, 64));
    tasks.lay_out(a);
    return a.used;
  }

  // Pairs of groups [first, last) of all rows of x.
  void pack(int64_t first, int64_t last) {
    const int64_t begin = first * 2 * group;
    const int64_t end = last * 2 * group < K ? last * 2 * group : K;
    std::memset(x + begin / step_codes * 2 * kTile, 0,
                size_t((end - begin) / step_codes * 2 * kTile));
    std::memset(steps + first * 64, 0, size_t(last - first) * 256);
    alignas(64) int8_t limbs[3][128];
    for (int64_t t = 0; t < M; t++) {
      float* row = rows + t * up(K, 64);
      read_row(p.x, t, begin, end - begin, row + begin);
      if (extreme(row + begin, end - begin))
        __atomic_store_n(&extreme_x, true, __ATOMIC_RELAXED);
      for (int64_t g = begin / group; g * group < end; g++) {
        const float* from = row + g * group;
        const int shift = FixedPoint::shift(from, int(group), kDepth);
        const float step = __builtin_ldexpf(1.0f, -shift);
        f32 sum = zero();
        for (int64_t k = 0; k < group; k += kLanes) {
          sum = add(sum, load(from + k));
          FixedPoint::digits(from + k, shift, limbs, k);
        }
        float* out = steps + g / 2 * 64;
        out[g % 2 * 16 + 2 * t] = step * 65536.0f;
        out[g % 2 * 16 + 2 * t + 1] = step * 256.0f;
        out[32 + 2 * t + g % 2] = step;
        out[48 + 2 * t + g % 2] = reduce(sum);
        for (int64_t k = 0; k < group; k += 4) {
          const int64_t at = g * group + k;
          int8_t* to = x + at / step_codes * 2 * kTile + at % step_codes * 16 + 8 * t;
          std::memcpy(to, limbs[0] + k, 4);
          std::memcpy(to + 4, limbs[1] + k, 4);
          std::memcpy(to + kTile + 4 * (g % 2), limbs[2] + k, 4);
        }
      }
    }
  }

  // Codes [0, count) of a row of whole groups as bytes.
  static LOWBIT_FN void decode(const uint8_t* from, int64_t count, uint8_t* out) {
    int64_t k = 0;
    for (; k + 64 <= count; k += 64)
      _mm512_storeu_si512(out + k,
                          Codes::template vector<0>(Codes::read(from + k * kBits / 8)));
    if (k < count) {
      uint8_t half[64] = {};
      std::memcpy(half, from + k * kBits / 8, size_t((count - k) * kBits / 8));
      _mm512_storeu_si512(out + k, Codes::template vector<0>(Codes::read(half)));
    }
  }

  // One group of the panel against x: tiles `big` and `small` take its sums.
  template <int big, int small>
  LOWBIT_FN void products(const uint8_t* panel, const int8_t* xb) const {
    for (int64_t k = 0; k < group; k += step_codes, xb += 2 * kTile) {
      tiles::load<6>(panel + k, kLd);
      tiles::load<7>(xb, 64);
      tiles::multiply_bytes<big, 6, 7>(int(step_codes / 4));
      tiles::load<7>(xb + kTile, 64);
      tiles::multiply_bytes<small, 6, 7>(int(step_codes / 4));
    }
  }

  static LOWBIT_FN f32 both(const float* two) {
    double bits;
    std::memcpy(&bits, two, 8);
    return _mm512_castpd_ps(_mm512_set1_pd(bits));
  }
  static LOWBIT_FN f32 floats(const int32_t* p) { return from_int(_mm512_loadu_si512(p)); }

  // All groups of one block of K.
  void accumulate(const uint8_t* panel, const float* scale, int64_t depth, const int8_t* xb,
                  const float* step, float* sum) const {
    alignas(64) int32_t c[2][3][256];
    f32 total[16];
    for (int n = 0; n < 16; n++) total[n] = load(sum + n * 16);
    const int64_t span = 2 * group, x_group = group / step_codes * 2 * kTile;
    const auto multiply = [&](int64_t k, auto set) {
      constexpr int first = 3 * set.value;
      tiles::clear<first>(), tiles::clear<first + 1>(), tiles::clear<first + 2>();
      products<first, first + 2>(panel + k, xb + k / group * x_group);
      if (k + group < depth)
        products<first + 1, first + 2>(panel + k + group, xb + (k / group + 1) * x_group);
      tiles::store<first>(c[set.value][0], 64), tiles::store<first + 1>(c[set.value][1], 64);
      tiles::store<first + 2>(c[set.value][2], 64);
    };
    const auto apply = [&](int64_t k, int set) {
      const float* s = scale + k / group;
      const float* xs = step + k / span * 64;
      const f32 a = load(xs), b = load(xs + 16), small = load(xs + 32), x_sums = load(xs + 48);
      for (int n = 0; n < 16; n++, s += 2 * tasks.room_groups) {
        f32 t = fma(mul(floats(c[set][0] + n * 16), a), splat(s[0]), total[n]);
        t = fma(mul(floats(c[set][1] + n * 16), b), splat(s[1]), t);
        t = fma(mul(floats(c[set][2] + n * 16), small), both(s), t);
        total[n] = fma(x_sums, both(s + tasks.room_groups), t);
      }
    };
    for (int64_t k = 0; k < depth; k += 2 * span) {
      multiply(k, std::integral_constant<int, 0>());
      if (k + span < depth) multiply(k + span, std::integral_constant<int, 1>());
      apply(k, 0);
      if (k + span < depth) apply(k + span, 1);
    }
    for (int n = 0; n < 16; n++) store(sum + n * 16, total[n]);
  }

  void task(int64_t n0, int thread) const {
    const auto spread = [](const uint8_t* from, int64_t depth, int64_t, int64_t, uint8_t* out) {
      decode(from, depth, out);
    };
    const auto multiply = [&](const uint8_t* panel, const float* scale, float* sum, int64_t k0,
                              int64_t depth) {
      accumulate(panel, scale, depth, x + k0 / step_codes * 2 * kTile,
                 steps + k0 / group / 2 * 64, sum);
    };
    const auto write = [&](const float* sum, int64_t n, int64_t count) {
      for (int64_t m = 0; m < M; m++) {
        float line[16 + kLanes];
        for (int64_t i = 0; i < count; i++)
          line[i] = sum[i * 16 + 2 * m] + sum[i * 16 + 2 * m + 1];
        write_row(p.y, m, n, count, line);
      }
    };
    tiles::configure_bytes(int(step_codes / 4));
    tasks.run(n0, thread, 0.0f, false, spread, multiply, write);
    tiles::release();
  }

  bool run() {
    lay_out(Arena{static_cast<char*>(pool.scratch(lay_out(Arena{})))});
    const int64_t piece = kBlock / (2 * group);
    cpu::parallel_for(pool, (pairs_of_groups + piece - 1) / piece, [&](int64_t i, int) {
      const int64_t last = (i + 1) * piece;
      pack(i * piece, last < pairs_of_groups ? last : pairs_of_groups);
    });
    if (extreme_x) return false;
    cpu::parallel_for(pool, (N + tasks.rows - 1) / tasks.rows,
                      [&](int64_t i, int thread) { task(i * tasks.rows, thread); });
    return true;
  }
};

LOWBIT_END
