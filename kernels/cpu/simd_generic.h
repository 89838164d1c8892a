// Plain C++: eight lanes in the vector extension that gcc and clang share. The compiler lowers
// it to whatever the machine has, so this target runs everywhere and says nothing about an ISA.
#pragma once

LOWBIT_BEGIN

constexpr int kLanes = 8;
typedef float f32 __attribute__((vector_size(32)));
typedef uint32_t u32 __attribute__((vector_size(32)));
typedef int32_t s32 __attribute__((vector_size(32)));

// Vectors are passed by value between inlined functions only; the ABI note does not apply.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

LOWBIT_FN f32 zero() { return f32{}; }
LOWBIT_FN f32 splat(float x) { return x - f32{}; }  // a sum with +0 would lose -0
LOWBIT_FN u32 splat_u(uint32_t x) { return u32{} + x; }
template <class V, class T>
LOWBIT_FN V gather_lanes(const T* p) {
  V v;
  for (int i = 0; i < kLanes; i++) v[i] = p[i];
  return v;
}
LOWBIT_FN f32 load(const float* p) {
  f32 v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
LOWBIT_FN u32 load(const uint32_t* p) {
  u32 v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class T>
LOWBIT_FN f32 load_converted(const T* p) {
  f32 v;
  for (int i = 0; i < kLanes; i++) v[i] = to_float(p[i]);
  return v;
}
LOWBIT_FN f32 load(const bf16* p) { return load_converted(p); }
LOWBIT_FN f32 load(const f16* p) { return load_converted(p); }
LOWBIT_FN u32 load_bytes(const uint8_t* p) { return gather_lanes<u32>(p); }
LOWBIT_FN void store(float* p, f32 x) { std::memcpy(p, &x, sizeof x); }
template <class T>
LOWBIT_FN void store(T* p, f32 x) {
  for (int i = 0; i < kLanes; i++) p[i] = from_float<T>(x[i]);
}
LOWBIT_FN f32 add(f32 a, f32 b) { return a + b; }
LOWBIT_FN f32 mul(f32 a, f32 b) { return a * b; }
LOWBIT_FN f32 fma(f32 a, f32 b, f32 c) { return a * b + c; }
LOWBIT_FN float reduce(f32 x) {
  return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
}
LOWBIT_FN u32 as_u32(f32 x) { return (u32)x; }
LOWBIT_FN f32 as_f32(u32 x) { return (f32)x; }
LOWBIT_FN f32 from_int(u32 x) { return __builtin_convertvector((s32)x, f32); }
template <int n>
LOWBIT_FN u32 shl(u32 x) {
  return x << n;
}
template <int n>
LOWBIT_FN u32 shr(u32 x) {
  return x >> n;
}
template <int n>
LOWBIT_FN u32 sra(u32 x) {
  return (u32)((s32)x >> n);
}
LOWBIT_FN u32 add(u32 a, u32 b) { return a + b; }
LOWBIT_FN u32 bit_and(u32 a, u32 b) { return a & b; }
LOWBIT_FN u32 bit_or(u32 a, u32 b) { return a | b; }
LOWBIT_FN u32 bit_xor(u32 a, u32 b) { return a ^ b; }
LOWBIT_FN f32 select_eq(u32 a, u32 b, f32 x, f32 y) {
  const u32 mask = (u32)(a == b);
  return (f32)(((u32)x & mask) | ((u32)y & ~mask));
}
LOWBIT_FN f32 permute(f32 x, u32 index) {
  f32 v;
  for (int i = 0; i < kLanes; i++) v[i] = x[index[i]];
  return v;
}

struct Table16 {
  const float* values;
};
LOWBIT_FN Table16 table16(const float* p) { return {p}; }
LOWBIT_FN f32 lookup(Table16 t, u32 index) {
  f32 v;
  for (int i = 0; i < kLanes; i++) v[i] = t.values[index[i] & 15];
  return v;
}

template <int bits, int count>
inline constexpr int kReach = ((kLanes - 1) * count * bits) / 8 + 4;

template <int bits, int count>
LOWBIT_FN u32 windows(const uint8_t* p) {
  u32 v;
  for (int i = 0; i < kLanes; i++) {
    uint32_t word;
    std::memcpy(&word, p + i * count * bits / 8, 4);
    v[i] = word >> (i * count * bits % 8);
  }
  return v;
}

LOWBIT_END
