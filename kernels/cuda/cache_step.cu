// One more token of each sequence: its k and v go into the cache, and y is its attention to all
// tokens there. q and k are rotated on the way.
//
// A block has a head of k and v, the heads of q that share it (at most 8), and a part of the
// tokens. Its warps take tiles of 16 tokens in turn. k and v are read once, past shared memory,
// since the order of what a multiply sums over is free, and so is that of the rows of y:
//
//   s[16 tokens, 8 heads] = k q^T   Lane 4 g + c has 8 dims of tokens g and g + 8, from
//                                   32 i + 8 c on.
//
//   y[16 dims, 8 heads] += v^T p^T  Lane 4 g + c has 8 dims of tokens 2 c, 2 c + 1, 2 c + 8 and
//                                   2 c + 9, from 64 i + 8 g on; dims 2 j and 2 j + 1 of them
//                                   are rows g and g + 8 of multiply j.
//
// A tile's s becomes operand p^T of 8 x 8 by movmatrix. Maxima and sums are each warp's own;
// warps, then parts, are put together in their order.
//
// H200, 2026-11-30, 2048 tokens, 32 heads on 8 of 128, cold: 16 sequences 38.5 us, 134 MB
// at 3.5 TB/s (in a model 43; cuDNN there 83, and MLX's rotations and slice updates 18 more),
// one sequence 10.1. With two accumulators of s in turns 39.6 and 10.2; with those and 8 warps,
// two blocks a processor, 41.8 and 10.0.
#include <algorithm>
#include <type_traits>

#include "cache_step.h"
#include "half.h"

namespace lowbit::cuda {

namespace {

constexpr float kInfinity = __builtin_huge_valf();
constexpr int kTile = 16, kMostHeads = 8, kWarps = 16, kThreads = 32 * kWarps;

struct Args {
  CacheStep step;
  int tiles, tiles_of_part, parts;
  float* partial;  // [pairs, parts, share, dims + 2]: y without its divisor, maximum, sum
};

__device__ __forceinline__ uint32_t transpose8(uint32_t a) {
  uint32_t r;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(a));
  return r;
}

// x of two dims that a rotation pairs.
struct Pair {
  float low, high;
};
__device__ __forceinline__ Pair rotated(Pair x, float theta) {
  float s, c;
  sincosf(theta, &s, &c);
  return {x.low * c - x.high * s, x.low * s + x.high * c};
}

template <class T>
__device__ __forceinline__ T narrowed(float x) {
  return __builtin_bit_cast(T, Half<T>::bits(x));
}

template <class T, int D>
struct Tokens {
  uint4 k[2][D / 32], v[4][D / 64];

  __device__ __forceinline__ void load_keys(const T* keys, int tile, int last, int lane) {
    for (int r = 0; r < 2; r++) {
      const int token = min(tile * kTile + lane / 4 + 8 * r, last);
      const T* row = keys + int64_t(token) * D + lane % 4 * 8;
#pragma unroll
      for (int i = 0; i < D / 32; i++)
        k[r][i] = __ldcg(reinterpret_cast<const uint4*>(row + 32 * i));
    }
  }
  __device__ __forceinline__ void load_values(const T* values, int tile, int last, int lane) {
#pragma unroll
    for (int n = 0; n < 4; n++) {
      const int token = min(tile * kTile + lane % 4 * 2 + n % 2 + n / 2 * 8, last);
      const T* row = values + int64_t(token) * D + lane / 4 * 8;
#pragma unroll
      for (int i = 0; i < D / 64; i++)
        v[n][i] = __ldcg(reinterpret_cast<const uint4*>(row + 64 * i));
    }
  }
};

template <class T, int D>
__global__ void __launch_bounds__(kThreads, 1)
    attention_kernel(const __grid_constant__ Args a) {
  const CacheStep& p = a.step;
  extern __shared__ __align__(16) char shared[];
  __shared__ __align__(16) T query[kMostHeads][D];
  __shared__ float maxima[kWarps][kMostHeads], sums[kWarps][kMostHeads];
  auto* parts = reinterpret_cast<float*>(shared);  // [kWarps, share, D]

  const int thread = int(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int g = lane / 4, c = lane % 4;
  const int pair = int(blockIdx.x) / a.parts, part = int(blockIdx.x) % a.parts;
  const int sequence = pair / p.heads, head = pair % p.heads;
  const int first = part * a.tiles_of_part, end = min(first + a.tiles_of_part, a.tiles);
  T* const keys = static_cast<T*>(p.keys) + pair * p.capacity * D;
  T* const values = static_cast<T*>(p.values) + pair * p.capacity * D;

  // The last tile has the new token.
  int tile = first + warp;
  Tokens<T, D> now;
  if (tile < end && tile + 1 < a.tiles) {
    now.load_keys(keys, tile, p.at, lane);
    now.load_values(values, tile, p.at, lane);
  }
  const bool writes = end == a.tiles;
  const auto row = [&](const HeadRows& x, int h) {
    return static_cast<const T*>(x.data) + sequence * x.sequence + h * x.head;
  };
  for (int i = thread; i < (p.share + writes) * (D / 2); i += kThreads) {
    const int r = i / (D / 2), d = i % (D / 2);
    const T* from = r < p.share ? row(p.q, head * p.share + r) : row(p.k, head);
    T* to = r < p.share ? query[r] : keys + int64_t(p.at) * D;
    Pair x{float(from[d]), float(from[d + D / 2])};
    if (p.periods) x = rotated(x, float(p.at) / p.periods[d]);
    to[d] = narrowed<T>(x.low);
    to[d + D / 2] = narrowed<T>(x.high);
  }
  if (writes)
    for (int d = thread; d < D; d += kThreads)
      values[int64_t(p.at) * D + d] = row(p.v, head)[d];
  __syncthreads();
  if (tile < end && tile + 1 == a.tiles) {
    now.load_keys(keys, tile, p.at, lane);
    now.load_values(values, tile, p.at, lane);
  }

  const float scale = p.scale * 1.4426950408889634f;  // exponents are of 2
  float maximum[2] = {-kInfinity, -kInfinity}, sum[2] = {}, y[D / 64][4][4] = {};
  for (; tile < end; tile += kWarps) {
    const bool more = tile + kWarps < end;
    float s[4] = {};
#pragma unroll
    for (int i = 0; i < D / 32; i++) {
      const uint4 q =
          g < p.share ? *reinterpret_cast<const uint4*>(&query[g][32 * i + 8 * c]) : uint4{};
      const uint4 k0 = now.k[0][i], k1 = now.k[1][i];
      Half<T>::mma(s, {k0.x, k1.x, k0.y, k1.y}, q.x, q.y);
      Half<T>::mma(s, {k0.z, k1.z, k0.w, k1.w}, q.z, q.w);
    }
    if (more) now.load_keys(keys, tile + kWarps, p.at, lane);

#pragma unroll
    for (int i = 0; i < 4; i++)
      s[i] = tile * kTile + g + i / 2 * 8 <= p.at ? s[i] * scale : -kInfinity;
    bool higher = false;
    float most[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
      most[h] = fmaxf(s[h], s[h + 2]);
#pragma unroll
      for (int lanes = 4; lanes < 32; lanes *= 2)
        most[h] = fmaxf(most[h], __shfl_xor_sync(~0u, most[h], lanes));
      higher |= most[h] > maximum[h];
    }
    if (__any_sync(~0u, higher)) {
      float factor[2];
#pragma unroll
      for (int h = 0; h < 2; h++) {
        most[h] = fmaxf(most[h], maximum[h]);
        factor[h] = most[h] == -kInfinity ? 1.0f : exp2f(maximum[h] - most[h]);
        sum[h] *= factor[h];
        maximum[h] = most[h];
      }
#pragma unroll
      for (auto& piece : y)
        for (auto& rows : piece)
          for (int i = 0; i < 4; i++) rows[i] *= factor[i % 2];
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float base = maximum[i % 2] == -kInfinity ? 0.0f : maximum[i % 2];
      s[i] = exp2f(s[i] - base);
      sum[i % 2] += s[i];
    }
    const uint32_t p0 = transpose8(Half<T>::pack(s[0], s[1]));
    const uint32_t p1 = transpose8(Half<T>::pack(s[2], s[3]));
#pragma unroll
    for (int i = 0; i < D / 64; i++) {
      const auto multiply = [&](float(&rows)[4], uint32_t v0, uint32_t v1, uint32_t v8,
                                uint32_t v9) {
        Half<T>::mma(rows,
                     {__byte_perm(v0, v1, 0x5410), __byte_perm(v0, v1, 0x7632),
                      __byte_perm(v8, v9, 0x5410), __byte_perm(v8, v9, 0x7632)},
                     p0, p1);
      };
      multiply(y[i][0], now.v[0][i].x, now.v[1][i].x, now.v[2][i].x, now.v[3][i].x);
      multiply(y[i][1], now.v[0][i].y, now.v[1][i].y, now.v[2][i].y, now.v[3][i].y);
      multiply(y[i][2], now.v[0][i].z, now.v[1][i].z, now.v[2][i].z, now.v[3][i].z);
      multiply(y[i][3], now.v[0][i].w, now.v[1][i].w, now.v[2][i].w, now.v[3][i].w);
    }
    if (more) now.load_values(values, tile + kWarps, p.at, lane);
  }

  // Warps, in their order.
#pragma unroll
  for (int h = 0; h < 2; h++) {
#pragma unroll
    for (int lanes = 4; lanes < 32; lanes *= 2) sum[h] += __shfl_xor_sync(~0u, sum[h], lanes);
    if (g == 0) maxima[warp][2 * c + h] = maximum[h], sums[warp][2 * c + h] = sum[h];
  }
  __syncthreads();
  const auto most_of = [&](int q) {
    float most = maxima[0][q];
    for (int w = 1; w < kWarps; w++) most = fmaxf(most, maxima[w][q]);
    return most;
  };
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int q = 2 * c + h;
    if (q >= p.share) continue;
    const float factor = exp2f(maximum[h] - most_of(q));
#pragma unroll
    for (int i = 0; i < D / 64; i++)
#pragma unroll
      for (int j = 0; j < 4; j++)
        *reinterpret_cast<float2*>(&parts[(warp * p.share + q) * D + 64 * i + 8 * g + 2 * j]) =
            make_float2(y[i][j][h] * factor, y[i][j][h + 2] * factor);
  }
  __syncthreads();
  for (int i = thread; i < p.share * D; i += kThreads) {
    const int q = i / D, d = i % D;
    const float most = most_of(q);
    float all = 0.0f, total = 0.0f;
    for (int w = 0; w < kWarps; w++) {
      all += sums[w][q] * exp2f(maxima[w][q] - most);
      total += parts[(w * p.share + q) * D + d];
    }
    const int64_t at = int64_t(pair) * p.share + q;
    if (a.parts == 1) {
      static_cast<T*>(p.y)[at * D + d] = narrowed<T>(total / all);
      continue;
    }
    float* to = a.partial + ((int64_t(pair) * a.parts + part) * p.share + q) * (D + 2);
    to[d] = total;
    if (d == 0) to[D] = most, to[D + 1] = all;
  }
}

// y of the parts. A block has a head of q, a thread one of its dims; parts of a warp's lanes.
template <class T, int D>
__global__ void __launch_bounds__(D) combine_kernel(const __grid_constant__ Args a) {
  const int pair = int(blockIdx.x) / a.step.share, q = int(blockIdx.x) % a.step.share;
  const int lane = int(threadIdx.x) % 32;
  const int64_t next = int64_t(a.step.share) * (D + 2);
  const float* from = a.partial + (int64_t(pair) * a.parts * a.step.share + q) * (D + 2);
  float most = -kInfinity, all = 0.0f, total = 0.0f;
  for (int part = lane; part < a.parts; part += 32) most = fmaxf(most, from[part * next + D]);
#pragma unroll
  for (int lanes = 16; lanes; lanes /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, lanes));
#pragma unroll 8
  for (int part = 0; part < a.parts; part++) {
    const float factor = exp2f(from[part * next + D] - most);
    all += from[part * next + D + 1] * factor;
    total += from[part * next + threadIdx.x] * factor;
  }
  static_cast<T*>(a.step.y)[int64_t(blockIdx.x) * D + threadIdx.x] = narrowed<T>(total / all);
}

template <class T, int D>
void attend_with(const CacheStep& p, Queue& queue) {
  const int pairs = p.sequences * p.heads, tiles = p.at / kTile + 1;
  // As many blocks as run at once, where each has a tile for half of its warps.
  const int most = std::max(1, std::min(queue.device().processors / pairs, 2 * tiles / kWarps));
  Args a{p, tiles, (tiles + most - 1) / most, 1, nullptr};
  a.parts = (tiles + a.tiles_of_part - 1) / a.tiles_of_part;
  if (a.parts > 1)
    a.partial =
        static_cast<float*>(queue.scratch(sizeof(float) * pairs * a.parts * p.share * (D + 2)));
  queue.run(attention_kernel<T, D>, dim3(unsigned(pairs * a.parts)), dim3(kThreads),
            sizeof(float) * kWarps * p.share * D, 1, a);
  if (a.parts > 1)
    queue.run(combine_kernel<T, D>, dim3(unsigned(pairs * p.share)), dim3(D), 0, 1, a);
}

}  // namespace

bool takes_cache_step(int share, int dims, Dtype dtype) {
  return share <= kMostHeads && (dims == 64 || dims == 128) && dtype != Dtype::f32;
}

void cache_step(const CacheStep& p, Queue& queue) {
  const auto with = [&]<class T>(T) {
    p.dims == 64 ? attend_with<T, 64>(p, queue) : attend_with<T, 128>(p, queue);
  };
  p.dtype == Dtype::bf16 ? with(bf16{}) : with(f16{});
}

}  // namespace lowbit::cuda
