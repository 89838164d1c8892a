// matvec: y = x W^T for a few rows of x. The packed weights stream once, whatever M is; each
// word is decoded in registers and multiplied with all rows of x.
//
//   tasks        blocks of stored rows of W, over the threads
//   for each     block of K that keeps the packed x in L1
//     for each   R rows of W x T rows of x at a time, in registers:
//                  sum[r][t] over a chunk of codes, then total[r][t] += scale * sum
//
// x meets codes as float32, as bfloat16 pairs or in fixed point (fixed_point.h). Affine biases
// enter as one dot product with the group sums of x. Since codes meet x before the scale does,
// rows with extreme x (kernels/cpu/activations.h) take matmul instead.
#include <utility>

#include "kernels_of.h"
#include "packed_x.h"
#if defined(__AVX512VNNI__)
#include "fixed_point.h"
#endif
#if defined(__AMX_BF16__) || defined(LOWBIT_EMULATE_TILES)
#include "matvec_byte_tiles.h"
#include "matvec_tiles.h"
#endif

LOWBIT_BEGIN

using cpu::Arithmetic;
using cpu::parallel_for;
using cpu::Plan;
using cpu::Product;

namespace {

#if defined(__AVX512F__) || defined(__ARM_NEON)
constexpr int kAccumulators = 8;  // R * T, of 32 vector registers: sums, totals, codes, tables
#else
constexpr int kAccumulators = 4;  // of 16
#endif
// Rows of x in one pass over the weights. Eight would leave one row of W to a tile, and every
// vector of x would be loaded for a single product: 2.4 ms against two passes of 0.65 (4-bit,
// 4096x4096, M = 8, Zen 4, 2026-11-22).
constexpr int kMaxTokens = 4;
constexpr int64_t kL1Bytes = 32768;

// Rows of x in a register tile that serves `count` of them.
int64_t tile_tokens(int64_t count) { return count > 2 ? 4 : count; }

// Partial sums of R rows of W with T rows of x, over chunks [begin, end). Chunks from `whole`
// on are copied first: they end beyond the row, or their loads could reach beyond the array.
template <class Decoder, int R, int T>
struct Tile {
  using Element = typename Decoder::Element;
  explicit Tile(const Decoder& decoder) : decoder(decoder) {}

  const Decoder& decoder;
  const uint8_t* codes[R];
  const float* scale[R];
  const Element* x;  // of the first chunk of K
  int64_t token_stride, row_bytes;
  const float* step;  // of fixed-point x: from the block of K's first group on, by token
  int64_t step_stride;
  int group_shift;
  u32 lane_group;

  using Totals = f32[R][T];
  Totals total;

  LOWBIT_FN void chunk(const uint8_t* const (&from)[R], int64_t c, int64_t c0,
                       Totals& total) const {
    typename Decoder::Raw raw[R];
    for (int r = 0; r < R; r++) raw[r] = decoder.read(from[r]);
    const Element* xc = x + c * PackedX<Decoder>::kElements;
    constexpr std::make_integer_sequence<int, Decoder::kVectors * Decoder::kLimbs> all;
    if constexpr (Decoder::kScaled) {
      typename Decoder::Sum sum[R][T];
      for (int r = 0; r < R; r++)
        for (int t = 0; t < T; t++) sum[r][t] = Decoder::start();
      multiply(raw, xc, sum, all);
      const int64_t g =
          (c * Decoder::kChunk >> group_shift) - (c0 * Decoder::kChunk >> group_shift);
      f32 x_step[T] = {};
      if constexpr (PackedX<Decoder>::kFixed)
        for (int t = 0; t < T; t++)
          x_step[t] = permute(load(step + t * step_stride + g), lane_group);
      for (int r = 0; r < R; r++) {
        const f32 s = permute(load(scale[r] + g), lane_group);
        for (int t = 0; t < T; t++)
          total[r][t] = fma(s, Decoder::value(sum[r][t], x_step[t]), total[r][t]);
      }
    } else {
      multiply(raw, xc, total, all);
    }
  }

  using Sums = typename Decoder::Sum[R][T];
  template <int... i>
  LOWBIT_FN void multiply(const typename Decoder::Raw (&raw)[R], const Element* xc, Sums& sum,
                          std::integer_sequence<int, i...>) const {
    (one<i>(raw, xc, sum), ...);
  }
  // Vector i of the packed chunk, counted through the limbs of x.
  template <int i>
  LOWBIT_FN void one(const typename Decoder::Raw (&raw)[R], const Element* xc,
                     Sums& sum) const {
    constexpr int v = i % Decoder::kVectors;
    for (int r = 0; r < R; r++) {
      const auto w = decoder.template vector<v>(raw[r]);
      for (int t = 0; t < T; t++) {
        if constexpr (i > 0 && v == 0 && Decoder::kLimbs > 1)
          sum[r][t] = Decoder::next_limb(sum[r][t]);
        sum[r][t] = Decoder::dot(w, xc + t * token_stride + i * Decoder::kWidth, sum[r][t]);
      }
    }
  }

  // The loop over whole chunks calls and stores nothing, so that its totals stay in registers.
  void run(int64_t begin, int64_t end, int64_t whole) {
    Totals sums;
    for (int r = 0; r < R; r++)
      for (int t = 0; t < T; t++) sums[r][t] = zero();
    int64_t c = begin;
    for (; c < end && c < whole; c++) {
      const uint8_t* from[R];
      for (int r = 0; r < R; r++) {
        from[r] = codes[r] + c * Decoder::kBytes;
        // The same chunk of the next R rows. A row is often only 2 KiB: too short a stream for
        // the hardware to get ahead of.
        for (int64_t line = 0; line < Decoder::kBytes; line += 64)
          __builtin_prefetch(from[r] + R * row_bytes + line);
      }
      chunk(from, c, begin, sums);
    }
    for (int r = 0; r < R; r++)
      for (int t = 0; t < T; t++) total[r][t] = sums[r][t];
    if (c < end) copied(c, end, begin);
  }

  __attribute__((noinline)) void copied(int64_t c, int64_t end, int64_t begin) {
    alignas(64) uint8_t copy[R][Decoder::kRead + 64];
    for (; c < end; c++) {
      const uint8_t* from[R];
      const int64_t at = c * Decoder::kBytes, left = row_bytes - at;
      for (int r = 0; r < R; r++) {
        std::memset(copy[r], 0, sizeof copy[r]);
        std::memcpy(copy[r], codes[r] + at,
                    size_t(left < Decoder::kBytes ? left : Decoder::kBytes));
        from[r] = copy[r];
      }
      chunk(from, c, begin, total);
    }
  }
};

template <class Decoder>
struct Matvec {
  const Product& p;
  const Plan& plan;
  const Decoder& decoder;
  const PackedX<Decoder>& x;
  int64_t k_chunks;  // of a block of K
  int group_shift = 0;
  alignas(64) uint32_t lane_group[kLanes];

  Matvec(const Product& p, const Plan& plan, const Decoder& decoder, const PackedX<Decoder>& x,
         int64_t k_chunks)
      : p(p), plan(plan), decoder(decoder), x(x), k_chunks(k_chunks) {
    if constexpr (Decoder::kScaled) {
      while ((1 << group_shift) < p.w.group_size) group_shift++;
      for (int i = 0; i < kLanes; i++)
        lane_group[i] = uint32_t(Decoder::lane_begin(i) >> group_shift);
    }
  }

  int64_t block_groups() const {
    return Decoder::kScaled ? Groups::padded((k_chunks * Decoder::kChunk >> group_shift) + 1)
                            : 0;
  }
  // Per thread: scales and biases of R rows, sums of a task's rows.
  int64_t floats(int T) const {
    return up(2 * kAccumulators * block_groups() + int64_t(plan.row_block) * T, 16);
  }

  // Rows [row, row + count) of W, count <= R; the tile's other rows repeat the last one.
  template <int R, int T>
  void rows(int64_t row, int64_t count_rows, int64_t token, int64_t c0, int64_t c1, float* room,
            float* sums) const {
    const Matrix& w = p.w;
    Tile<Decoder, R, T> tile(decoder);
    tile.x = x.data + token * x.row();
    tile.token_stride = x.row();
    tile.row_bytes = w.row_bytes;
    tile.group_shift = group_shift;
    const int64_t g0 = c0 * Decoder::kChunk >> group_shift;
    const int64_t k1 = c1 * Decoder::kChunk < x.K ? c1 * Decoder::kChunk : x.K;
    const int64_t count = ((k1 + (int64_t(1) << group_shift) - 1) >> group_shift) - g0;
    if constexpr (PackedX<Decoder>::kFixed) {
      tile.step = x.steps + token * x.groups + g0;
      tile.step_stride = x.groups;
    }
    Groups groups[R];
    for (int r = 0; r < R; r++) {
      const int64_t at = row + (r < count_rows ? r : count_rows - 1);
      tile.codes[r] = w.codes + at * w.row_bytes;
      if constexpr (Decoder::kScaled) {
        groups[r] = {room + 2 * r * block_groups(),
                     w.biases ? room + (2 * r + 1) * block_groups() : nullptr};
        groups[r].read(w, at, g0, count, Decoder::kOffset);
        tile.scale[r] = groups[r].scale;
      }
    }
    if constexpr (Decoder::kScaled) tile.lane_group = load(lane_group);
    const int64_t within = w.row_bytes / Decoder::kBytes;
    const int64_t left = w.end - tile.codes[R - 1] - Decoder::kRead;
    const int64_t readable = left < 0 ? 0 : left / Decoder::kBytes + 1;
    tile.run(c0, c1, readable < within ? readable : within);
    for (int r = 0; r < R && r < count_rows; r++)
      for (int t = 0; t < T; t++) {
        f32 total = tile.total[r][t];
        if constexpr (Decoder::kScaled)
          if (groups[r].bias) {
            const float* xs = x.group_sums + (token + t) * x.groups + g0;
            for (int64_t g = 0; g < count; g += kLanes)
              total = fma(load(groups[r].bias + g), load(xs + g), total);
          }
        sums[t * plan.row_block + r] += reduce(total);
      }
  }

  template <int T>
  void task(int64_t first_row, int64_t token, int64_t tokens, float* room) const {
    constexpr int R = T >= kAccumulators ? 1 : (kAccumulators / T < 4 ? kAccumulators / T : 4);
    float* sums = room + 2 * kAccumulators * block_groups();
    const int64_t left = p.w.rows - first_row;
    const int64_t count = left < plan.row_block ? left : plan.row_block;
    for (int64_t i = 0; i < plan.row_block * T; i++) sums[i] = 0.0f;
    for (int64_t c0 = 0; c0 < x.chunks; c0 += k_chunks) {
      const int64_t c1 = c0 + k_chunks < x.chunks ? c0 + k_chunks : x.chunks;
      for (int64_t r = 0; r < count; r += R)
        rows<R, T>(first_row + r, count - r, token, c0, c1, room, sums + r);
    }
    for (int64_t t = 0; t < tokens; t++)
      write_row(p.y, token + t, first_row, count, sums + t * plan.row_block);
  }
};

template <class Decoder, int T>
void run_tokens(const Matvec<Decoder>& m, int64_t token, int64_t tokens, const Pool& pool,
                float* room) {
  const int64_t tasks = up(m.p.w.rows, m.plan.row_block) / m.plan.row_block;
  parallel_for(pool, tasks, [&](int64_t i, int thread) {
    m.template task<T>(i * m.plan.row_block, token, tokens,
                       room + thread * m.floats(kMaxTokens));
  });
}

// Returns false when x is too extreme for codes to meet it before their scale.
template <class Decoder>
bool run_matvec(const Product& p, const Plan& plan, const Pool& pool) {
  static const Decoder decoder;
  const int64_t K = p.w.columns, M = p.x.count;
  PackedX<Decoder> x{K, Decoder::kScaled ? p.w.group_size : 0};
  const int64_t tokens = M / kMaxTokens * kMaxTokens + tile_tokens(M % kMaxTokens);
  const int64_t per_chunk = x.kElements * int64_t(sizeof(typename Decoder::Element));
  int64_t k_chunks = kL1Bytes / (per_chunk * (M < kMaxTokens ? M : kMaxTokens));
  const int64_t unit = 128 / Decoder::kChunk < 1 ? 1 : 128 / Decoder::kChunk;
  k_chunks = k_chunks < unit ? unit : k_chunks / unit * unit;
  if (k_chunks > x.chunks) k_chunks = up(x.chunks, unit);
  const Matvec<Decoder> m(p, plan, decoder, x, k_chunks);

  const int64_t row_floats = up(x.depth(), 16);
  float *rows = nullptr, *room = nullptr;
  const auto lay_out = [&](Arena a) {
    x.lay_out(a, tokens);
    rows = a.take<float>(pool.threads * row_floats);
    room = a.take<float>(pool.threads * m.floats(kMaxTokens));
    return a.used;
  };
  lay_out(Arena{static_cast<char*>(pool.scratch(lay_out(Arena{})))});

  bool any_extreme = false;
  const auto pack = [&](int64_t t, int thread) {
    float* row = rows + thread * row_floats;
    for (int64_t k = K; k < row_floats; k++) row[k] = 0.0f;
    if (t < M) {
      read_row(p.x, t, 0, K, row);
      if (Decoder::kScaled && extreme(row, K)) __atomic_store_n(&any_extreme, true, 0);
      if (p.x.quantize != Format::dense)
        round_trip(p.x.quantize, p.x.dtype, row, K, p.x.global_scale);
    } else {
      for (int64_t k = 0; k < K; k++) row[k] = 0.0f;
    }
    x.pack(row, t);
  };
  if (tokens <= 2) {
    for (int64_t t = 0; t < tokens; t++) pack(t, 0);
  } else {
    parallel_for(pool, tokens, pack);
  }
  if (any_extreme) return false;

  for (int64_t t = 0; t < M; t += kMaxTokens) {
    const int64_t count = M - t < kMaxTokens ? M - t : kMaxTokens;
    switch (tile_tokens(count)) {
      case 1:
        run_tokens<Decoder, 1>(m, t, count, pool, room);
        break;
      case 2:
        run_tokens<Decoder, 2>(m, t, count, pool, room);
        break;
      default:
        run_tokens<Decoder, 4>(m, t, count, pool, room);
    }
  }
  return true;
}

template <class F>
bool run_format(const Product& p, const Plan& plan, const Pool& pool) {
  using Code = typename F::Code;
#if defined(__AMX_BF16__) || defined(LOWBIT_EMULATE_TILES)
  if constexpr (kTileFormat<F>) {
    if (plan.arithmetic == Arithmetic::tiles) {
      using Decoder = typename TileDecoderOf<F>::type;
      static const Decoder decoder;
      return TileMatvec<Decoder>{p, pool, decoder}.run();
    }
  }
  if constexpr (kIntegerCodes<Code>) {
    if (plan.arithmetic == Arithmetic::byte_tiles) return ByteTileMatvec<Code>{p, pool}.run();
  }
#endif
#if defined(__AVX512VNNI__)
  if constexpr (kIntegerCodes<Code>) {
    if (plan.arithmetic == Arithmetic::fixed_point)
      return run_matvec<FixedDecoder<Code>>(p, plan, pool);
  }
#endif
#if defined(__AVX512BF16__)
  if (plan.arithmetic == Arithmetic::bf16_pairs)
    return run_matvec<typename PairsOf<Code>::type>(p, plan, pool);
#endif
  return run_matvec<LaneDecoder<Code>>(p, plan, pool);
}

bool run_dense(const Product& p, const Plan& plan, const Pool& pool) {
#if defined(__AVX512BF16__)
  if (plan.arithmetic == Arithmetic::bf16_pairs && p.dense_dtype == Dtype::bf16)
    return run_matvec<DensePairs>(p, plan, pool);
#endif
  switch (p.dense_dtype) {
    case Dtype::f32:
      return run_matvec<DenseDecoder<float>>(p, plan, pool);
    case Dtype::f16:
      return run_matvec<DenseDecoder<f16>>(p, plan, pool);
    case Dtype::bf16:
      return run_matvec<DenseDecoder<bf16>>(p, plan, pool);
  }
  return false;
}

}  // namespace

void matvec(const Product& p, const Plan& plan, const Pool& pool) {
  bool done = false;
  if (p.format == Format::dense) {
    done = run_dense(p, plan, pool);
  } else {
    visit(p.format,
          [&](auto tag) { done = run_format<typename decltype(tag)::type>(p, plan, pool); });
  }
  if (!done) matmul(p, plan, pool);
}

LOWBIT_END
