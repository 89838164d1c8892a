// A weight by itself, from global memory: what the slow paths of kernels multiply by.
#pragma once

#include <cstdint>

namespace lowbit::cuda {

// The value of one code, decoded from global memory: for operands that products of codes cannot
// carry.
template <class F, class T, class Args>
__device__ float one_weight(const Args& a, int64_t row, int k) {
  constexpr int B = F::kBits;
  const auto* words = reinterpret_cast<const uint32_t*>(a.codes + row * a.row_bytes);
  const int bit = k * B, word = bit / 32;
  uint32_t code = words[word] >> (bit % 32);
  if (bit % 32 + B > 32) code |= words[word + 1] << (32 - bit % 32);
  const float value = F::Code::decode(code & ((B < 32 ? 1u << B : 0u) - 1u));
  const int64_t group = row * (a.K / F::kGroup) + k / F::kGroup;
  if constexpr (F::kHasBias) {
    const float s = float(reinterpret_cast<const T*>(a.scales)[group]);
    return fmaf(s, value, float(reinterpret_cast<const T*>(a.biases)[group]));
  } else {
    return F::Scale::decode(a.scales[group]) * value;
  }
}

}  // namespace lowbit::cuda
