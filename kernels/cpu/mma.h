// Register tiles of matmul: C[kRows][kTokens] += W[kRows][K] * X[K][kTokens], W as rows of a
// panel (K contiguous), X packed with kTokens neighbours side by side:
//
//   float32    X[k][token]                one fused multiply-add a row, a vector of tokens and
//   k bfloat16   X[k/2][token][k%2]         the same with pairs: one instruction for two k
//   tiles      X[k/2][token][k%2]         16 rows x 32 k times 32 k x 16 tokens at once
//
// C is float32 [kRows][kTokens], contiguous; `first` overwrites what is there. Sums start from
// zero in every call and are added to C at its end: chains no longer than a block of K keep
// float32 errors small. `vectors` says how many of the two vectors of tokens are in use.
#pragma once

#include "panel.h"
#if defined(__AVX512BF16__)
#include "simd_amx.h"
#endif

LOWBIT_BEGIN

struct FloatMma {
  using Element = float;
#if defined(__AVX512F__) || defined(__ARM_NEON)
  static constexpr int kRows = 8;  // 16 accumulators, of 32 registers
#else
  static constexpr int kRows = 4;  // 8 of 16
#endif
  static constexpr int kVectors = 2, kTokens = kVectors * kLanes, kStep = 1;
  static void begin() {}
  static void end() {}

  template <int V>
  static void run(const float* w, int64_t ld, const float* x, int64_t K, float* c, bool first) {
    f32 sum[kRows][V];
    for (int r = 0; r < kRows; r++)
      for (int v = 0; v < V; v++) sum[r][v] = zero();
    for (int64_t k = 0; k < K; k++) {
      f32 xv[V];
      for (int v = 0; v < V; v++) xv[v] = load(x + k * kTokens + v * kLanes);
      for (int r = 0; r < kRows; r++) {
        const f32 wr = splat(w[r * ld + k]);
        for (int v = 0; v < V; v++) sum[r][v] = fma(wr, xv[v], sum[r][v]);
      }
    }
    for (int r = 0; r < kRows; r++)
      for (int v = 0; v < V; v++) {
        float* to = c + r * kTokens + v * kLanes;
        store(to, first ? sum[r][v] : add(load(to), sum[r][v]));
      }
  }
};

#if defined(__AVX512BF16__)

struct PairMma {
  using Element = bf16;
  static constexpr int kRows = 8, kVectors = 2, kTokens = kVectors * kLanes, kStep = 2;
  static void begin() {}
  static void end() {}

  template <int V>
  static void run(const bf16* w, int64_t ld, const bf16* x, int64_t K, float* c, bool first) {
    f32 sum[kRows][V];
    for (int r = 0; r < kRows; r++)
      for (int v = 0; v < V; v++) sum[r][v] = zero();
    for (int64_t k = 0; k < K; k += 2) {
      pairs xv[V];
      for (int v = 0; v < V; v++) xv[v] = load_pairs(x + (k * kLanes + v * kLanes) * 2);
      for (int r = 0; r < kRows; r++) {
        const pairs wr = splat_pair(w + r * ld + k);
        for (int v = 0; v < V; v++) sum[r][v] = dot(wr, xv[v], sum[r][v]);
      }
    }
    for (int r = 0; r < kRows; r++)
      for (int v = 0; v < V; v++) {
        float* to = c + r * kTokens + v * kLanes;
        store(to, first ? sum[r][v] : add(load(to), sum[r][v]));
      }
  }
};

#if defined(__AMX_BF16__) || defined(LOWBIT_EMULATE_TILES)

// Tiles 0-3: C (row half, token half); 4, 5: W; 6, 7: X.
struct TileMma {
  using Element = bf16;
  static constexpr int kRows = 32, kVectors = 2, kTokens = 32, kStep = 32;
  static void begin() { tiles::configure(); }
  static void end() { tiles::release(); }

  template <int V>
  static void run(const bf16* w, int64_t ld, const bf16* x, int64_t K, float* c, bool first) {
    constexpr size_t c_stride = kTokens * sizeof(float), x_stride = kTokens * 2 * sizeof(bf16);
    const size_t w_stride = size_t(ld) * sizeof(bf16);
    if (first) {
      tiles::clear<0>(), tiles::clear<2>();
      if constexpr (V == 2) tiles::clear<1>(), tiles::clear<3>();
    } else {
      tiles::load<0>(c, c_stride), tiles::load<2>(c + 16 * kTokens, c_stride);
      if constexpr (V == 2)
        tiles::load<1>(c + 16, c_stride), tiles::load<3>(c + 16 * kTokens + 16, c_stride);
    }
    for (int64_t k = 0; k < K; k += kStep) {
      tiles::load<4>(w + k, w_stride);
      tiles::load<6>(x + k * kTokens, x_stride);
      tiles::multiply<0, 4, 6>();
      if constexpr (V == 2) {
        tiles::load<7>(x + k * kTokens + 32, x_stride);
        tiles::multiply<1, 4, 7>();
      }
      tiles::load<5>(w + 16 * ld + k, w_stride);
      tiles::multiply<2, 5, 6>();
      if constexpr (V == 2) tiles::multiply<3, 5, 7>();
    }
    tiles::store<0>(c, c_stride), tiles::store<2>(c + 16 * kTokens, c_stride);
    if constexpr (V == 2)
      tiles::store<1>(c + 16, c_stride), tiles::store<3>(c + 16 * kTokens + 16, c_stride);
  }
};

#endif
#endif

LOWBIT_END
