// What the three languages that read this folder call the same things: C++ for the CPU, CUDA
// and Metal. Nothing else in kernels/formats tests which compiler reads it.
#pragma once

#if defined(__METAL_VERSION__)
#include <metal_stdlib>
#define LOWBIT_FN inline
#elif defined(__CUDACC__)
#include <cstdint>
#define LOWBIT_FN __host__ __device__ __forceinline__
#else
#include <cstdint>
#define LOWBIT_FN inline __attribute__((always_inline))
#endif

// The CPU compiles the same text once for every instruction set. Each copy lives in a namespace
// of its own, so that the linker can never hand one target's code to another.
#ifndef LOWBIT_TARGET
#define LOWBIT_TARGET baseline
#endif
#define LOWBIT_BEGIN \
  namespace lowbit { \
  inline namespace LOWBIT_TARGET {
#define LOWBIT_END \
  }                \
  }

LOWBIT_BEGIN

#if defined(__METAL_VERSION__)
using uint32 = uint;
LOWBIT_FN uint32 to_bits(float x) { return as_type<uint32>(x); }
LOWBIT_FN float from_bits(uint32 b) { return as_type<float>(b); }
LOWBIT_FN float round_even(float x) { return metal::rint(x); }
LOWBIT_FN float magnitude(float x) { return metal::fabs(x); }
#elif defined(__CUDA_ARCH__)
using uint32 = uint32_t;
LOWBIT_FN uint32 to_bits(float x) { return __float_as_uint(x); }
LOWBIT_FN float from_bits(uint32 b) { return __uint_as_float(b); }
LOWBIT_FN float round_even(float x) { return rintf(x); }
LOWBIT_FN float magnitude(float x) { return fabsf(x); }
#else
using uint32 = uint32_t;
LOWBIT_FN uint32 to_bits(float x) { return __builtin_bit_cast(uint32, x); }
LOWBIT_FN float from_bits(uint32 b) { return __builtin_bit_cast(float, b); }
LOWBIT_FN float round_even(float x) { return __builtin_rintf(x); }
LOWBIT_FN float magnitude(float x) { return __builtin_fabsf(x); }
#endif

LOWBIT_FN float smaller(float a, float b) { return b < a ? b : a; }
LOWBIT_FN float larger(float a, float b) { return a < b ? b : a; }

LOWBIT_END
