// simt: products in float32 on the CUDA cores, for every case that the tensor-core kernels
// leave: float32 activations, w stored [K, N], scales of another type than x, any size.
//
//   block   kTokens x kColumns of y, in steps of kStep along K
//     step  codes, scales and x go from global memory to registers one step ahead, then as
//           float32 (scale * code + bias, never rounded to 16 bits) to shared memory, K-major
//           4 x 4 outputs a thread; where the tile has fewer, `kSlices` groups of threads take
//           a part of every step and are added up at the end, in fixed order
//   parts   of K, where tiles are too few to fill the device: sums go to scratch memory and a
//           second kernel adds them up, in fixed order
//
// Each step has sums of its own, added to the running ones: K / kStep + kStep roundings in a
// row instead of K.
#include <algorithm>

#include "elements.cuh"
#include "formats.h"
#include "kernels.h"

namespace lowbit::cuda {

namespace {

constexpr int kThreads = 256;

template <int Tokens, int Columns, int Step>
struct Tile {
  static constexpr int kTokens = Tokens, kColumns = Columns, kStep = Step;
  static constexpr int kUnits = kStep / 8;  // of 8 along K
  static constexpr int kSliceThreads = kTokens * kColumns / 16;
  static constexpr int kSlices = kThreads / kSliceThreads;
  static constexpr int kDepth = kStep / kSlices;  // of a step, for one slice
  static constexpr int kXUnits = kTokens * kUnits;
  static constexpr int kWUnits = kColumns * kUnits / kThreads;  // of a thread
  static_assert(kXUnits <= kThreads && kXUnits % 32 == 0 && kWUnits > 0);
  static_assert(kDepth % 8 == 0 || 8 % kDepth == 0);
};

// M=1 must not pay for 64 tokens; beyond kThinTokens the wide tile reads w less often (H200,
// 4096 to 14336, 4 bits, float32: thin 95 us for 4 tokens, 316 for 16; wide 350 for up to 64).
using Wide = Tile<64, 64, 32>;
using Thin = Tile<4, 32, 128>;
constexpr int64_t kThinTokens = 12;

// One multiplication of x matrix `x` with w matrix `w`; exists: both indices are valid.
struct Pair {
  int64_t index, x, w;
  bool exists;

  __device__ Pair(const Product& p, int64_t index)
      : index(index), x(p.lhs ? p.lhs[index] : 0), w(p.rhs ? p.rhs[index] : 0) {
    exists = x >= 0 && w >= 0 && (!p.lhs || x < p.x_matrices) && (!p.rhs || w < p.w.matrices);
  }
};

// Where the work is cut.
struct Cuts {
  int64_t m_tiles, n_tiles, parts, part_k;
  float* sums;  // [parts, rows of y, N], or null for a single part
  bool x_vectors;
};

// Where element (k, i) of a tile `Width` wide lies. A thread writes 8 values of one i, the
// lanes of a warp for different k / 8 as well: those are spread over the banks, by an exchange
// of whole float4s or, in narrow tiles, by padding.
template <int Width, int Step>
struct KMajor {
  static constexpr int kUnits = Step / 8;
  static constexpr int kSize = Width >= 32 ? Step * Width : (Step + kUnits) * Width;
  static __device__ __forceinline__ int at(int k, int i) {
    if constexpr (Width >= 32) {
      constexpr int kTurns = kUnits < 8 ? kUnits : 8;
      return k * Width + (i ^ (k / 8 % kTurns * (32 / kTurns)));
    } else {
      return (k + k / 8) * Width + i;
    }
  }
};

// Eight codes of a row of w and their group's scale, as they are stored.
template <class F>
struct WeightUnit {
  RawCodes<F::kBits> codes;
  uint32_t scale, bias;
  bool exists;

  __device__ __forceinline__ void load(const Weights& w, int64_t matrix, int64_t row,
                                       int64_t column, int group_shift) {
    exists = row < w.rows && column < w.columns;
    codes = {};
    scale = bias = 0;
    if (!exists) return;
    const int64_t r = matrix * w.rows + row;
    codes.load(w.codes + r * w.row_bytes, column);
    const int64_t group = r * (w.columns >> group_shift) + (column >> group_shift);
    scale = load_bits(w.scales, group, size_of(w.scale_type));
    if constexpr (F::kHasBias) bias = load_bits(w.biases, group, size_of(w.scale_type));
  }

  __device__ __forceinline__ void decode(ScaleType type, float (&out)[8]) const {
    const float s = exists ? to_float(scale, type) : 0.0f;
    const float b = exists && F::kHasBias ? to_float(bias, type) : 0.0f;
    Eight<typename F::Code>::decode(codes.codes(), out);
#pragma unroll
    for (int i = 0; i < 8; i++) out[i] = F::kHasBias ? fmaf(s, out[i], b) : s * out[i];
  }
};

// Eight elements of x through w's format. The lanes of a group are neighbours.
template <class F>
__device__ __forceinline__ void round_trip(float (&x)[8], float enlarge) {
  uint32_t most = 0;
#pragma unroll
  for (int i = 0; i < 8; i++) most = max(most, to_bits(x[i]) & 0x7fffffffu);
#pragma unroll
  for (int lanes = 1; lanes < F::kGroup / 8; lanes *= 2)
    most = max(most, __shfl_xor_sync(0xffffffffu, most, lanes));
  const Block<F> block(most, enlarge);
  const float s = F::Scale::decode(block.scale);
#pragma unroll
  for (int i = 0; i < 8; i++) x[i] = F::Code::decode(block.encode(x[i])) * s;
}

template <class F, bool transpose, class T>
struct TileLoader {
  using XAt = KMajor<T::kTokens, T::kStep>;
  using WAt = KMajor<T::kColumns, T::kStep>;

  const Product& p;
  const int64_t x_row, w_matrix, m0, n0;
  const int group_shift;
  const bool x_vectors;
  const float enlarge;
  EightBits x;
  WeightUnit<F> w[T::kWUnits];

  // Unit u of w: token-free coordinates inside the tile.
  static __device__ __forceinline__ int unit_k(int u) {
    return transpose ? u % T::kUnits * 8 : u / (T::kColumns / 8);
  }
  static __device__ __forceinline__ int unit_n(int u) {
    return transpose ? u / T::kUnits : u % (T::kColumns / 8) * 8;
  }

  __device__ __forceinline__ void fetch(int64_t k0) {
    const int t = threadIdx.x;
    if (t < T::kXUnits) {
      const int64_t m = m0 + t / T::kUnits, k = k0 + t % T::kUnits * 8;
      x = EightBits::load(p.x, (x_row + m) * p.K + k, m < p.M ? p.K - k : 0, p.dtype,
                          x_vectors);
    }
#pragma unroll
    for (int i = 0; i < T::kWUnits; i++) {
      const int u = t + i * kThreads;
      const int64_t k = k0 + unit_k(u), n = n0 + unit_n(u);
      w[i].load(p.w, w_matrix, transpose ? n : k, transpose ? k : n, group_shift);
    }
  }

  __device__ __forceinline__ void store(float* xs, float* ws) const {
    const int t = threadIdx.x;
    float v[8];
    if (t < T::kXUnits) {
      x.widen(p.dtype, v);
      if constexpr (transpose && !F::kHasBias)
        if (p.quantize_x) round_trip<F>(v, enlarge);
      const int m = t / T::kUnits, k = t % T::kUnits * 8;
#pragma unroll
      for (int i = 0; i < 8; i++) xs[XAt::at(k + i, m)] = v[i];
    }
#pragma unroll
    for (int i = 0; i < T::kWUnits; i++) {
      const int u = t + i * kThreads, k = unit_k(u), n = unit_n(u);
      w[i].decode(p.w.scale_type, v);
      if constexpr (transpose) {
#pragma unroll
        for (int j = 0; j < 8; j++) ws[WAt::at(k + j, n)] = v[j];
      } else {
        *reinterpret_cast<float4*>(ws + WAt::at(k, n)) = {v[0], v[1], v[2], v[3]};
        *reinterpret_cast<float4*>(ws + WAt::at(k, n + 4)) = {v[4], v[5], v[6], v[7]};
      }
    }
  }
};

// The slice's part of a step for 4 tokens from m and 4 columns from n on.
template <class T>
__device__ __forceinline__ void multiply(const float* xs, const float* ws, int slice, int m,
                                         int n, float (&sums)[4][4]) {
  using XAt = KMajor<T::kTokens, T::kStep>;
  using WAt = KMajor<T::kColumns, T::kStep>;
  constexpr int kRun = T::kDepth < 8 ? T::kDepth : 8;
  float part[4][4] = {};
#pragma unroll 1
  for (int k = slice * T::kDepth; k < (slice + 1) * T::kDepth; k += kRun) {
    const float* x = xs + XAt::at(k, m);  // the rest of a run of 8 lies at equal distances
    const float* w = ws + WAt::at(k, n);
#pragma unroll
    for (int i = 0; i < kRun; i++) {
      const float4 a = *reinterpret_cast<const float4*>(x + i * T::kTokens);
      const float4 b = *reinterpret_cast<const float4*>(w + i * T::kColumns);
      const float at[4] = {a.x, a.y, a.z, a.w}, bt[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
      for (int r = 0; r < 4; r++)
#pragma unroll
        for (int c = 0; c < 4; c++) part[r][c] = fmaf(at[r], bt[c], part[r][c]);
    }
  }
#pragma unroll
  for (int r = 0; r < 4; r++)
#pragma unroll
    for (int c = 0; c < 4; c++) sums[r][c] += part[r][c];
}

// Elements of y's matrix of a pair.
struct Output {
  const Product& p;
  const Pair& pair;
  float alpha;

  __device__ Output(const Product& p, const Pair& pair) : p(p), pair(pair), alpha(1.0f) {
    if (!pair.exists) return;
    if (p.global_x) alpha *= __fdiv_rn(*p.global_x, Nvfp4::kGlobalMax);
    if (p.global_w)
      alpha *= __fdiv_rn(p.global_w[p.global_w_count > 1 ? pair.w : 0], Nvfp4::kGlobalMax);
  }
  __device__ __forceinline__ void write(int64_t m, int64_t n, float sum) const {
    float y = from_bits(0x7fc00000u);
    if (pair.exists) {
      y = alpha * sum;
      if (p.bias) y += load_float(p.bias, pair.w * p.N + n, p.bias_dtype);
    }
    store_float(p.y, (pair.index * p.M + m) * p.N + n, y, p.dtype);
  }
};

template <class F, bool transpose, class T>
__global__ void __launch_bounds__(kThreads) simt_kernel(Product p, Cuts cuts, int64_t blocks) {
  constexpr int kXSize = KMajor<T::kTokens, T::kStep>::kSize;
  constexpr int kWSize = KMajor<T::kColumns, T::kStep>::kSize;
  constexpr int kOutputs = T::kTokens * T::kColumns;
  static_assert(T::kSlices == 1 || T::kSlices * kOutputs <= kWSize);
  __shared__ __align__(16) float xs[kXSize];
  __shared__ __align__(16) float ws[kWSize];

  const int slice = threadIdx.x / T::kSliceThreads, place = threadIdx.x % T::kSliceThreads;
  const int m = place / (T::kColumns / 4) * 4, n = place % (T::kColumns / 4) * 4;
  const int group_shift = __ffs(p.w.group_size) - 1;
  const float enlarge = p.quantize_x ? enlarge_by(p.global_x) : 1.0f;

  for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    const int64_t part = block % cuts.parts, tile = block / cuts.parts;
    const int64_t m0 = tile % cuts.m_tiles * T::kTokens, rest = tile / cuts.m_tiles;
    const int64_t n0 = rest % cuts.n_tiles * T::kColumns;
    const Pair pair(p, rest / cuts.n_tiles);
    const int64_t first = part * cuts.part_k;
    const int64_t end = pair.exists ? min(first + cuts.part_k, p.K) : first;
    TileLoader<F, transpose, T> loader{p,           pair.x * p.M,   pair.w,  m0, n0,
                                       group_shift, cuts.x_vectors, enlarge, {}, {}};
    float sums[4][4] = {};
    if (first < end) loader.fetch(first);
    for (int64_t k0 = first; k0 < end; k0 += T::kStep) {
      __syncthreads();  // the last step has been read
      loader.store(xs, ws);
      __syncthreads();
      if (k0 + T::kStep < end) loader.fetch(k0 + T::kStep);
      multiply<T>(xs, ws, slice, m, n, sums);
    }

    const Output out(p, pair);
    const auto write = [&](int64_t m, int64_t n, float sum) {
      if (m >= p.M || n >= p.N) return;
      if (cuts.sums) {
        const int64_t rows = (p.rhs ? p.pairs : 1) * p.M, row = pair.index * p.M + m;
        cuts.sums[(part * rows + row) * p.N + n] = sum;
      } else {
        out.write(m, n, sum);
      }
    };
    if constexpr (T::kSlices == 1) {
#pragma unroll
      for (int r = 0; r < 4; r++)
#pragma unroll
        for (int c = 0; c < 4; c++) write(m0 + m + r, n0 + n + c, sums[r][c]);
    } else {
      __syncthreads();
#pragma unroll
      for (int r = 0; r < 4; r++)
        *reinterpret_cast<float4*>(ws + slice * kOutputs + (m + r) * T::kColumns + n) = {
            sums[r][0], sums[r][1], sums[r][2], sums[r][3]};
      __syncthreads();
      for (int i = threadIdx.x; i < kOutputs; i += kThreads) {
        float sum = 0.0f;
        for (int s = 0; s < T::kSlices; s++) sum += ws[s * kOutputs + i];
        write(m0 + i / T::kColumns, n0 + i % T::kColumns, sum);
      }
    }
  }
}

// An element of y a thread.
__global__ void __launch_bounds__(kThreads) add_parts(Product p, Cuts cuts, int64_t count) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) return;
  const int64_t row = i / p.N;
  const Pair pair(p, row / p.M);
  float sum = 0.0f;
  for (int64_t part = 0; part < cuts.parts; part++) sum += cuts.sums[part * count + i];
  Output(p, pair).write(row % p.M, i % p.N, sum);
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class F, bool transpose, class T>
void launch(const Product& p, const Plan& plan, Queue& queue) {
  Cuts cuts{};
  cuts.m_tiles = divide_up(p.M, T::kTokens);
  cuts.n_tiles = divide_up(p.N, T::kColumns);
  cuts.x_vectors =
      reinterpret_cast<uintptr_t>(p.x) % 16 == 0 && p.K * size_of(p.dtype) % 16 == 0;
  const int64_t pairs = p.rhs ? p.pairs : 1, tiles = cuts.m_tiles * cuts.n_tiles * pairs;
  const int64_t outputs = pairs * p.M * p.N;
  if (tiles == 0) return;

  // Two waves of two blocks a processor; a part is worth it from four steps on.
  const int64_t steps = std::max<int64_t>(1, divide_up(p.K, T::kStep));
  const int64_t wanted =
      plan.split_k ? plan.split_k : std::min(steps / 4, 4 * queue.device().processors / tiles);
  const int64_t part_steps = divide_up(steps, std::clamp<int64_t>(wanted, 1, steps));
  cuts.parts = divide_up(steps, part_steps);
  cuts.part_k = part_steps * T::kStep;
  if (cuts.parts > 1)
    cuts.sums =
        static_cast<float*>(queue.scratch(size_t(cuts.parts * outputs) * sizeof(float)));

  const int64_t blocks = tiles * cuts.parts;
  queue.run(simt_kernel<F, transpose, T>, dim3(unsigned(std::min<int64_t>(blocks, 0x7fffffff))),
            dim3(kThreads), 0, 1, p, cuts, blocks);
  if (cuts.parts > 1)
    queue.run(add_parts, dim3(unsigned(divide_up(outputs, kThreads))), dim3(kThreads), 0, 1, p,
              cuts, outputs);
}

template <class F>
void run(const Product& p, const Plan& plan, Queue& queue) {
  const bool thin = plan.tokens ? plan.tokens <= Thin::kTokens : p.M <= kThinTokens;
  if (p.transpose)
    thin ? launch<F, true, Thin>(p, plan, queue) : launch<F, true, Wide>(p, plan, queue);
  else
    thin ? launch<F, false, Thin>(p, plan, queue) : launch<F, false, Wide>(p, plan, queue);
}

}  // namespace

// Plan: tokens of a tile, 4 or 64, and parts of K; 0 leaves the choice to the shape.
void simt(const Product& p, const Plan& plan, Queue& queue) {
  with_format(p.format, [&](auto f) {
    run<typename Family<typename TypeOf<f.value>::type>::type>(p, plan, queue);
  });
}

}  // namespace lowbit::cuda
