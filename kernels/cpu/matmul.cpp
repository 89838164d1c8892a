// matmul: many rows of x. A block of stored rows of W is decoded once into a panel that stays
// in L2, and register tiles (mma.h) multiply it with x, which is packed once for all blocks.
//
//   for each     block of rows of x            packed in parallel, then
//     tasks      blocks of stored rows of W    over the threads
//       for each block of K                    decode the panel
//         for each tile of tokens, tile of rows
//
// transpose=False swaps the roles: rows of x are the panel's rows, and decoded rows of W are
// what lies side by side.
#include "activations.h"
#include "arena.h"
#include "mma.h"

LOWBIT_BEGIN

using cpu::Arithmetic;
using cpu::parallel_for;
using cpu::Plan;
using cpu::Product;

namespace {

template <class Mma>
struct Matmul {
  using E = typename Mma::Element;
  static constexpr int64_t kPad = 64 / int64_t(sizeof(E));  // keeps rows out of one cache set

  const Product& p;
  const Plan& plan;
  const Pool& pool;
  const int64_t K = p.w.columns, Kp = up(K, 32), N = p.w.rows, M = p.x.count;
  const int64_t k_block = least(plan.k_block, Kp), panel_ld = k_block + kPad;
  const int64_t row_block = up(least(plan.row_block, up(N, Mma::kRows)), Mma::kRows);
  const int64_t m_block = least(up(plan.m_block, Mma::kTokens), up(M, Mma::kTokens));
  const int64_t row_floats = Kp + kLanes;
  const DecodeFn<E> decode = decoder_of<E>(p.format, p.dense_dtype);

  E* packed = nullptr;     // x: [tile of tokens][k / step][token][k % step]
  E* panels = nullptr;     // per thread: [row_block][panel_ld]
  float* sums = nullptr;   // per thread: [tile of tokens][tile of rows][kRows][kTokens]
  float* rooms = nullptr;  // per thread: a row of x; scales and biases; a row of the result

  int64_t panel_size() const { return row_block * panel_ld; }
  int64_t sums_size() const { return m_block * row_block; }
  int64_t room_size() const {
    return up(row_floats + decode_room(k_block, p.w.group_size) + row_block + kLanes, 16);
  }
  size_t lay_out(Arena a) {
    packed = a.take<E>(m_block * Kp);
    panels = a.take<E>(pool.threads * panel_size());
    sums = a.take<float>(pool.threads * sums_size());
    rooms = a.take<float>(pool.threads * room_size());
    return a.used;
  }

  // Tokens [t0, t0 + kTokens) of the block that starts at m0.
  void pack(int64_t m0, int64_t t0, float* row) const {
    E* out = packed + t0 * Kp;
    constexpr int S = Mma::kStep == 1 ? 1 : 2;
    for (int64_t t = 0; t < Mma::kTokens; t++) {
      const int64_t m = m0 + t0 + t;
      for (int64_t k = m < M ? K : 0; k < row_floats; k++) row[k] = 0.0f;
      if (m < M) {
        read_row(p.x, m, 0, K, row);
        if (p.x.quantize != Format::dense)
          round_trip(p.x.quantize, p.x.dtype, row, K, p.x.global_scale);
      }
      for (int64_t k = 0; k < Kp; k += S)
        for (int s = 0; s < S; s++)
          out[k * Mma::kTokens + t * S + s] = from_float<E>(row[k + s]);
    }
  }

  // The panel of rows [n0, n0 + rows), elements [k0, k1) of K; zero up to whole tiles and
  // steps.
  void fill(E* panel, int64_t n0, int64_t rows, int64_t k0, int64_t k1, float* room) const {
    const int64_t padded = up(k1 - k0, 32);
    for (int64_t r = 0; r < up(rows, Mma::kRows); r++) {
      E* out = panel + r * panel_ld;
      int64_t k = 0;
      if (r < rows) {
        decode(p.w, n0 + r, k0, k1, room, out);
        k = k1 - k0;
      }
      for (; k < padded; k++) out[k] = E{};
    }
  }

  void multiply(const E* panel, const E* x, int64_t steps_k, int64_t tokens, float* c,
                bool first) const {
    if (tokens > Mma::kTokens / Mma::kVectors)
      Mma::template run<Mma::kVectors>(panel, panel_ld, x, steps_k, c, first);
    else
      Mma::template run<1>(panel, panel_ld, x, steps_k, c, first);
  }

  void task(int64_t m0, int64_t n0, int thread) const {
    E* panel = panels + thread * panel_size();
    float* c = sums + thread * sums_size();
    float* room = rooms + thread * room_size() + row_floats;
    float* line = room + decode_room(k_block, p.w.group_size);
    const int64_t rows = least(row_block, N - n0), tokens = least(m_block, M - m0);
    const int64_t row_tiles = up(rows, Mma::kRows) / Mma::kRows;
    constexpr int64_t kTile = int64_t(Mma::kRows) * Mma::kTokens;
    Mma::begin();
    for (int64_t k0 = 0; k0 < K; k0 += k_block) {
      const int64_t k1 = least(k0 + k_block, K);
      fill(panel, n0, rows, k0, k1, room);
      for (int64_t t = 0; t < tokens; t += Mma::kTokens)
        for (int64_t i = 0; i < row_tiles; i++)
          multiply(panel + i * Mma::kRows * panel_ld, packed + t * Kp + k0 * Mma::kTokens,
                   up(k1 - k0, 32), tokens - t, c + (t / Mma::kTokens * row_tiles + i) * kTile,
                   k0 == 0);
    }
    Mma::end();
    for (int64_t t = 0; t < tokens; t++) {
      const float* tile = c + t / Mma::kTokens * row_tiles * kTile + t % Mma::kTokens;
      for (int64_t r = 0; r < rows; r++) line[r] = tile[r * Mma::kTokens];
      write_row(p.y, m0 + t, n0, rows, line);
    }
  }

  void run() {
    lay_out(Arena{static_cast<char*>(pool.scratch(lay_out(Arena{})))});
    for (int64_t m0 = 0; m0 < M; m0 += m_block) {
      const int64_t tiles = up(least(m_block, M - m0), Mma::kTokens) / Mma::kTokens;
      parallel_for(pool, tiles, [&](int64_t i, int thread) {
        pack(m0, i * Mma::kTokens, rooms + thread * room_size());
      });
      parallel_for(pool, up(N, row_block) / row_block,
                   [&](int64_t i, int thread) { task(m0, i * row_block, thread); });
    }
  }
};

// y[M, N] = x[M, K] W, W stored [K, N]. Float32 throughout.
struct MatmulN {
  using Mma = FloatMma;
  const Product& p;
  const Plan& plan;
  const Pool& pool;
  const int64_t K = p.w.rows, N = p.w.columns, M = p.x.count;
  static constexpr int64_t kColumns = 128, kDepth = 256;  // of W in a panel; whole groups
  static constexpr int64_t kBlocks = kColumns / Mma::kTokens;
  const int64_t m_block = least(up(plan.m_block, Mma::kRows), up(M, Mma::kRows));
  const int64_t x_ld = up(K, 16) + 16;
  const DecodeFn<float> decode = decoder_of<float>(p.format, p.dense_dtype);

  float *x = nullptr, *panels = nullptr, *sums = nullptr, *rooms = nullptr;

  int64_t room_size() const {
    return up(decode_room(kColumns, p.w.group_size) + 2 * kColumns + 2 * kLanes, 16);
  }
  size_t lay_out(Arena a) {
    x = a.take<float>(m_block * x_ld);
    panels = a.take<float>(pool.threads * kColumns * kDepth);
    sums = a.take<float>(pool.threads * m_block * kColumns);
    rooms = a.take<float>(pool.threads * room_size());
    return a.used;
  }

  void task(int64_t m0, int64_t n0, int thread) const {
    float* panel = panels + thread * kColumns * kDepth;  // [block][k][kTokens]
    float* c = sums + thread * m_block * kColumns;  // [tile of rows][block][kRows][kTokens]
    float* room = rooms + thread * room_size();
    float* line = room + decode_room(kColumns, p.w.group_size);
    const int64_t columns = least(kColumns, N - n0), rows = least(m_block, M - m0);
    for (int64_t k0 = 0; k0 < K; k0 += kDepth) {
      const int64_t depth = least(kDepth, K - k0);
      for (int64_t k = 0; k < depth; k++) {
        for (int64_t i = columns; i < kColumns; i++) line[i] = 0.0f;
        decode(p.w, k0 + k, n0, n0 + columns, room, line);
        for (int64_t b = 0; b < kBlocks; b++)
          std::memcpy(panel + (b * kDepth + k) * Mma::kTokens, line + b * Mma::kTokens,
                      Mma::kTokens * sizeof(float));
      }
      for (int64_t m = 0; m < rows; m += Mma::kRows)
        for (int64_t b = 0; b * Mma::kTokens < columns; b++)
          Mma::run<Mma::kVectors>(x + m * x_ld + k0, x_ld, panel + b * kDepth * Mma::kTokens,
                                  depth, c + (m * kColumns + b * Mma::kRows * Mma::kTokens),
                                  k0 == 0);
    }
    for (int64_t m = 0; m < rows; m++) {
      const float* from =
          c + m / Mma::kRows * Mma::kRows * kColumns + m % Mma::kRows * Mma::kTokens;
      for (int64_t b = 0; b < kBlocks; b++)
        std::memcpy(line + b * Mma::kTokens, from + b * Mma::kRows * Mma::kTokens,
                    Mma::kTokens * sizeof(float));
      write_row(p.y, m0 + m, n0, columns, line);
    }
  }

  void run() {
    lay_out(Arena{static_cast<char*>(pool.scratch(lay_out(Arena{})))});
    for (int64_t m0 = 0; m0 < M; m0 += m_block) {
      parallel_for(pool, m_block, [&](int64_t i, int) {
        float* row = x + i * x_ld;
        for (int64_t k = m0 + i < M ? K : 0; k < x_ld; k++) row[k] = 0.0f;
        if (m0 + i < M) read_row(p.x, m0 + i, 0, K, row);
      });
      parallel_for(pool, up(N, kColumns) / kColumns,
                   [&](int64_t i, int thread) { task(m0, i * kColumns, thread); });
    }
  }
};

}  // namespace

void matmul(const Product& p, const Plan& plan, const Pool& pool) {
  if (!p.transpose) return MatmulN{p, plan, pool}.run();
#if defined(__AVX512BF16__)
#if defined(__AMX_BF16__) || defined(LOWBIT_EMULATE_TILES)
  if (plan.arithmetic == Arithmetic::tiles) return Matmul<TileMma>{p, plan, pool}.run();
#endif
  if (plan.arithmetic == Arithmetic::bf16_pairs) return Matmul<PairMma>{p, plan, pool}.run();
#endif
  Matmul<FloatMma>{p, plan, pool}.run();
}

LOWBIT_END
