// The short forms of elements.cuh against kernels/formats (decoding) and encode_element: every
// code, every float32 but NaN. Quotients of encode.cuh against IEEE division, where it matters
// on which side of 1/2, 3/2, ... 511/2 they are: all mantissas of the divisor.
#pragma once

#include "cuda/encode.cuh"
#include "device_memory.h"

namespace lowbit::check {

inline uint64_t fetch_count(const unsigned long long* count, StreamQueue& queue,
                            DeviceMemory& memory) {
  std::vector<uint8_t> out(8);
  memory.fetch(count, out, queue.stream());
  memory.reset();
  return *reinterpret_cast<const uint64_t*>(out.data());
}

// Counts the differences among floats 0, stride, 2 * stride, ... of which there are `count`,
// each in one of eight places, with others around it.
template <class Code>
__global__ void compare_encoders(uint64_t count, uint32_t stride, unsigned long long* wrong) {
  const uint64_t i = uint64_t(blockIdx.x) * 256 + threadIdx.x;
  if (i >= count) return;
  const uint32_t bits = uint32_t(i) * stride;
  if ((bits & 0x7fffffffu) > 0x7f800000u) return;
  float x[8];
  for (int j = 0; j < 8; j++) x[j] = float(j) * (j % 2 ? -0.5f : 0.5f);
  for (int j = 0; j < 8; j++) x[j] = uint32_t(j) == i % 8 ? from_bits(bits) : x[j];
  uint32_t codes[cuda::Eight<Code>::kWords];
  cuda::Eight<Code>::encode(x, codes);
  bool same = true;
  constexpr int kOfWord = 32 / Code::kBits;
  for (int j = 0; j < 8; j++) {
    const uint32_t code = codes[j / kOfWord] >> (j % kOfWord * Code::kBits);
    same &= (code & ((1u << Code::kBits) - 1)) == cuda::encode_element<Code>(x[j]);
  }
  if (!same) atomicAdd(wrong, 1ull);
}

template <class Code>
__global__ void compare_decoders(unsigned long long* wrong) {
  const uint32_t first = threadIdx.x;
  uint64_t codes = 0;
  for (uint32_t j = 0; j < 8; j++)
    codes |= uint64_t((first + 37 * j) & ((1u << Code::kBits) - 1)) << (Code::kBits * j);
  float x[8];
  cuda::Eight<Code>::decode(codes, x);
  for (int j = 0; j < 8; j++) {
    const float want = Code::decode(cuda::code_of<Code::kBits>(codes, j));
    if (to_bits(x[j]) != to_bits(want) && (x[j] == x[j] || want == want))
      atomicAdd(wrong, 1ull);
  }
}

// Divisors with mantissa 0, stride, 2 * stride, ... and `exponent`; for each the x whose
// quotients are nearest to the half.
__global__ void compare_quotients(uint32_t stride, int exponent, unsigned long long* wrong) {
  const uint32_t mantissa = (blockIdx.x * 256 + threadIdx.x) * stride;
  if (mantissa >= 1u << 23) return;
  const float y = from_bits(uint32_t(exponent + 127) << 23 | mantissa);
  const cuda::Divisor divisor(y);
  uint32_t count = 0;
  for (int k = 0; k < 256; k++) {
    const float half = float(k) + 0.5f;
    const uint32_t near = to_bits(__fmul_rn(half, y));
    for (uint32_t i = 0; i < 7; i++) {
      const float x = from_bits(near - 3 + i);
      count += (divisor.divide(x) >= half) != (__fdiv_rn(x, y) >= half);
    }
  }
  if (count > 0) atomicAdd(wrong, (unsigned long long)count);
}

inline uint64_t wrong_quotients(StreamQueue& queue, DeviceMemory& memory, bool quick) {
  auto* wrong = memory.copy(std::vector<unsigned long long>{0}, 0, queue.stream());
  const uint32_t stride = quick ? 65521 : 1;
  for (const int exponent : {-25, -1, 0, 99})
    queue.run(compare_quotients, dim3(((1u << 23) / stride + 256) / 256), dim3(256), 0, 1,
              stride, exponent, wrong);
  return fetch_count(wrong, queue, memory);
}

template <class Code>
uint64_t differences(StreamQueue& queue, DeviceMemory& memory, bool quick) {
  auto* wrong = memory.copy(std::vector<unsigned long long>{0}, 0, queue.stream());
  queue.run(compare_decoders<Code>, dim3(1), dim3(256), 0, 1, wrong);
  if constexpr (requires { cuda::Eight<Code>::kWords; }) {
    const uint32_t stride = quick ? 65521 : 1;
    const uint64_t count = (uint64_t(1) << 32) / stride;
    queue.run(compare_encoders<Code>, dim3(unsigned((count + 255) / 256)), dim3(256), 0, 1,
              count, stride, wrong);
  }
  return fetch_count(wrong, queue, memory);
}

}  // namespace lowbit::check
