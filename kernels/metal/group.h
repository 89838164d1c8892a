// Rows of all pairs sorted by matrix of w, in one threadgroup: what tiles of experts read.
//
// Simdgroups take the matrices in turn. For one matrix 32 lanes go through the pairs together
// and count, then place, those that chose it: the order of pairs is kept, and nothing is
// atomic. Pairs whose index is out of range form a last group. Output: see
// metal_args::GroupArgs.
#pragma once

#include <metal_stdlib>

#include "args.h"

using namespace metal;

namespace lowbit {

constant constexpr int kMostMatrices = 1023;

METAL_FUNC int group_of(const device long* rhs, int pair, int matrices) {
  const long chosen = rhs[pair];
  return chosen >= 0 && chosen < matrices ? int(chosen) : matrices;
}

[[kernel]] void group(const constant metal_args::GroupArgs& args [[buffer(0)]],
                      const device long* rhs [[buffer(1)]], device int* out [[buffer(2)]],
                      uint simdgroup [[simdgroup_index_in_threadgroup]],
                      uint simdgroups [[simdgroups_per_threadgroup]],
                      uint lane [[thread_index_in_simdgroup]]) {
  threadgroup int counts[kMostMatrices + 1];
  const int matrices = args.w_matrices, pairs = args.pairs;
  const int rounds = (pairs + 31) / 32;

  for (int m = int(simdgroup); m <= matrices; m += int(simdgroups)) {
    int mine = 0;
    for (int i = 0; i < rounds; i++) {
      const int pair = 32 * i + int(lane);
      mine += pair < pairs && group_of(rhs, pair, matrices) == m;
    }
    const int count = simd_sum(mine);
    if (lane == 0) counts[m] = count;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  device int* order = out;
  device int* starts = out + pairs * args.M;
  for (int m = int(simdgroup); m <= matrices; m += int(simdgroups)) {
    int before = 0;
    for (int other = int(lane); other < m; other += 32) before += counts[other];
    int next = simd_sum(before);
    if (lane == 0) starts[m] = next * args.M;
    if (lane == 0 && m == matrices) starts[m + 1] = pairs * args.M;
    for (int i = 0; i < rounds; i++) {
      const int pair = 32 * i + int(lane);
      const int here = pair < pairs && group_of(rhs, pair, matrices) == m;
      const int at = next + simd_prefix_exclusive_sum(here);
      if (here)
        for (int row = 0; row < args.M; row++) order[at * args.M + row] = pair * args.M + row;
      next += simd_sum(here);
    }
  }
}

}  // namespace lowbit
