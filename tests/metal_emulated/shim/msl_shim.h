// A subset of the Metal Shading Language as C++17 for clang on x86-64. Kernels reach it through
// mslpp.py, which first rewrites the few MSL forms that C++ cannot express. With
// MSL_ADDRESS_SPACES (the type-check build) device, constant and threadgroup are real,
// incompatible address spaces; otherwise they vanish and the code can run.
#pragma once
#include <cmath>
#include <limits>
#include <type_traits>
#include "msl_rt.h"

#define __METAL__ 1
#define METAL_FUNC inline __attribute__((always_inline))
#define kernel
#define thread
#ifdef MSL_ADDRESS_SPACES
#define device __attribute__((address_space(1)))
#define constant const __attribute__((address_space(2)))
#define threadgroup __attribute__((address_space(3)))
#else
#define device
#define constant
#define threadgroup
#endif

// Functions that meet other lanes must be neither inlined (their return address names the call
// site, which is how the scheduler knows that two lanes wait for the same operation) nor moved
// into a branch (convergent).
#define MSL_NOINLINE __attribute__((noinline, convergent))
#define MSL_SITE __builtin_return_address(0)

// ---- types

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef _Float16 half;
typedef __bf16 bfloat;
#define MSL_VECTORS(T)                                \
  typedef T T##2 __attribute__((ext_vector_type(2))); \
  typedef T T##3 __attribute__((ext_vector_type(3))); \
  typedef T T##4 __attribute__((ext_vector_type(4)));
MSL_VECTORS(char)
MSL_VECTORS(uchar)
MSL_VECTORS(short)
MSL_VECTORS(ushort)
MSL_VECTORS(int)
MSL_VECTORS(uint)
MSL_VECTORS(long)
MSL_VECTORS(ulong)
MSL_VECTORS(half)
MSL_VECTORS(bfloat)
MSL_VECTORS(float)
MSL_VECTORS(bool)

template <class To, class From>
inline constexpr To as_type(From v) {
  static_assert(sizeof(To) == sizeof(From));
  return __builtin_bit_cast(To, v);
}

// static_cast arrives here: clang refuses half <-> bfloat, which MSL allows explicitly.
template <class To, class From>
inline constexpr To msl_cast(const From& v) {
  if constexpr ((std::is_same_v<To, bfloat> && std::is_same_v<From, half>) ||
                (std::is_same_v<To, half> && std::is_same_v<From, bfloat>))
    return static_cast<To>(static_cast<float>(v));
  else
    return static_cast<To>(v);
}

// float4(v) arrives here: of a scalar, for all elements, or of a vector of another type.
template <class To, class From>
inline constexpr To msl_vector(const From& v) {
  if constexpr (std::is_arithmetic_v<From> || std::is_same_v<From, half> ||
                std::is_same_v<From, bfloat>)
    return (To)(std::remove_cv_t<std::remove_reference_t<decltype(To{}[0])>>)(v);
  else
    return __builtin_convertvector(v, To);
}

namespace metal {

template <class T, int N>
using vec = T __attribute__((ext_vector_type(N)));

using std::bool_constant, std::conditional, std::conditional_t, std::enable_if,
    std::enable_if_t, std::false_type;
using std::integral_constant, std::is_convertible_v, std::is_floating_point_v,
    std::is_integral_v, std::is_same;
using std::is_same_v, std::remove_cv_t, std::remove_reference_t, std::true_type;
template <class T>
struct is_integral : std::is_integral<T> {};

template <class T>
struct msl_remove_address_space {
  using type = std::remove_cv_t<T>;
};
#ifdef MSL_ADDRESS_SPACES
template <class T>
struct msl_remove_address_space<constant T> {
  using type = std::remove_cv_t<T>;
};
template <class T>
struct msl_remove_address_space<device T> {
  using type = std::remove_cv_t<T>;
};
template <class T>
struct msl_remove_address_space<threadgroup T> {
  using type = std::remove_cv_t<T>;
};
#endif
template <class T>
using remove_addrspace_t = typename msl_remove_address_space<T>::type;

template <class T>
struct numeric_limits : std::numeric_limits<T> {};
template <>
struct numeric_limits<half> {
  static constexpr half infinity() { return __builtin_bit_cast(half, (unsigned short)0x7c00); }
  static constexpr half max() { return (half)65504.0f; }
  static constexpr half lowest() { return (half)-65504.0f; }
};
template <>
struct numeric_limits<bfloat> {
  static constexpr bfloat infinity() {
    return __builtin_bit_cast(bfloat, (unsigned short)0x7f80);
  }
  static constexpr bfloat max() { return __builtin_bit_cast(bfloat, (unsigned short)0x7f7f); }
};

// ---- math: computed in float, rounded once to T. Accuracy is the C library's, not a GPU's.

template <class T>
inline constexpr bool msl_is_float =
    std::is_same_v<T, half> || std::is_same_v<T, bfloat> || std::is_same_v<T, float>;
template <class T>
inline constexpr bool msl_is_arithmetic = msl_is_float<T> || std::is_integral_v<T>;
#define MSL_UNARY(name, expression)                             \
  template <class T, class = enable_if_t<msl_is_arithmetic<T>>> \
  inline T name(T value) {                                      \
    float x = (float)value;                                     \
    return (T)(expression);                                     \
  }
MSL_UNARY(sqrt, ::sqrtf(x))
MSL_UNARY(rsqrt, 1.0f / ::sqrtf(x))
MSL_UNARY(exp, ::expf(x))
MSL_UNARY(exp2, ::exp2f(x))
MSL_UNARY(log, ::logf(x))
MSL_UNARY(log2, ::log2f(x))
MSL_UNARY(fabs, ::fabsf(x))
MSL_UNARY(floor, ::floorf(x))
MSL_UNARY(ceil, ::ceilf(x))
MSL_UNARY(round, ::roundf(x))
MSL_UNARY(rint, ::rintf(x))
MSL_UNARY(trunc, ::truncf(x))
MSL_UNARY(sin, ::sinf(x))
MSL_UNARY(cos, ::cosf(x))
MSL_UNARY(tanh, ::tanhf(x))

template <class T>
inline auto dot(T a, T b) {
  auto sum = a[0] * b[0];
  for (unsigned i = 1; i < sizeof(T) / sizeof(a[0]); i++) sum += a[i] * b[i];
  return sum;
}
template <class T>
inline T abs(T x) {
  if constexpr (std::is_unsigned_v<T>)
    return x;
  else
    return x < T(0) ? T(-x) : x;
}
inline float abs(float x) { return ::fabsf(x); }
template <class T>
inline T atan2(T y, T x) {
  return ::atan2f(y, x);
}
template <class T>
inline bool isnan(T x) {
  return (float)x != (float)x;
}
template <class T>
inline bool isinf(T x) {
  return __builtin_isinf((float)x);
}
template <class T>
inline bool isfinite(T x) {
  return __builtin_isfinite((float)x);
}
template <class T>
inline bool signbit(T x) {
  return __builtin_signbit((float)x);
}
template <class T>
inline T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
inline T max(T a, T b) {
  return a < b ? b : a;
}
inline int min(int a, int b) { return b < a ? b : a; }
inline int max(int a, int b) { return a < b ? b : a; }
inline float fmin(float a, float b) { return ::fminf(a, b); }
inline float fmax(float a, float b) { return ::fmaxf(a, b); }
template <class T>
inline T clamp(T x, T a, T b) {
  return min(max(x, a), b);
}
inline float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
template <class T>
inline T select(T a, T b, bool c) {
  return c ? b : a;
}
namespace precise {
using metal::exp, metal::log, metal::sqrt;
}
namespace fast {
using metal::exp, metal::exp2, metal::log, metal::sqrt;
}

// ---- barriers (mem_flags are accepted and ignored: every barrier orders everything)

enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };
inline mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(int(a) | int(b)); }
MSL_NOINLINE inline void threadgroup_barrier(mem_flags) { msl_threadgroup_barrier(MSL_SITE); }
MSL_NOINLINE inline void simdgroup_barrier(mem_flags) {
  uint32_t mask;
  msl_exchange(nullptr, 0, MSL_OP_SIMDGROUP_BARRIER, MSL_SITE, &mask);
}

// ---- SIMD-group functions: every active lane deposits a value, then reads the ones it needs

template <class T>
struct MslLanes {
  char (*slots)[kMslSlotBytes];
  uint32_t mask;
  T operator[](uint lane) const {
    T value;
    __builtin_memcpy(&value, slots[lane & 31], sizeof(T));
    return value;
  }
  bool active(uint lane) const { return lane < 32 && (mask >> lane & 1); }
};

template <class T>
inline __attribute__((always_inline)) MslLanes<T> msl_gather(const T& value, const void* site) {
  static_assert(sizeof(T) <= kMslSlotBytes);
  MslLanes<T> lanes;
  lanes.slots =
      (char(*)[kMslSlotBytes])msl_exchange(&value, sizeof(T), MSL_OP_DATA, site, &lanes.mask);
  return lanes;
}

// A lane index outside the SIMD-group gives back the lane's own value (undefined in MSL).
#define MSL_SHUFFLE(name, source)             \
  template <class T>                          \
  MSL_NOINLINE T name(T value, ushort d) {    \
    auto lanes = msl_gather(value, MSL_SITE); \
    uint l = msl_current->lane, s = (source); \
    return s < 32 ? lanes[s] : value;         \
  }
MSL_SHUFFLE(simd_shuffle, d)
MSL_SHUFFLE(simd_broadcast, d)
MSL_SHUFFLE(simd_shuffle_down, l + d)
MSL_SHUFFLE(simd_shuffle_up, l - d)
MSL_SHUFFLE(simd_shuffle_xor, l ^ d)
MSL_SHUFFLE(simd_shuffle_rotate_down, (l + d) & 31)
MSL_SHUFFLE(simd_shuffle_rotate_up, (l - d) & 31)
MSL_SHUFFLE(quad_shuffle, (l & ~3u) | (d & 3))
MSL_SHUFFLE(quad_shuffle_xor, l ^ d)
MSL_SHUFFLE(quad_broadcast, (l & ~3u) | (d & 3))

template <class T>
MSL_NOINLINE T simd_shuffle_and_fill_up(T value, T fill, ushort d) {
  auto lanes = msl_gather(value, MSL_SITE);
  uint l = msl_current->lane;
  return l >= d ? lanes[l - d] : fill;
}
template <class T>
MSL_NOINLINE T simd_shuffle_and_fill_down(T value, T fill, ushort d) {
  auto lanes = msl_gather(value, MSL_SITE);
  uint l = msl_current->lane;
  return l + d < 32 ? lanes[l + d] : fill;
}

// Reductions go through the lanes in order. A GPU's order is not documented: compare with a
// tolerance.
template <class T, class F>
inline T msl_reduce(const MslLanes<T>& lanes, uint begin, uint end, F combine) {
  T result{};
  bool first = true;
  for (uint i = begin; i < end; i++) {
    if (!lanes.active(i)) continue;
    T value = lanes[i];
    result = first ? value : T(combine(result, value));
    first = false;
  }
  return result;
}
#define MSL_REDUCTION(name, expression)                                                 \
  template <class T>                                                                    \
  MSL_NOINLINE T simd_##name(T value) {                                                 \
    auto lanes = msl_gather(value, MSL_SITE);                                           \
    return msl_reduce(lanes, 0, 32, [](T a, T b) { return T(expression); });            \
  }                                                                                     \
  template <class T>                                                                    \
  MSL_NOINLINE T quad_##name(T value) {                                                 \
    auto lanes = msl_gather(value, MSL_SITE);                                           \
    uint first = msl_current->lane & ~3u;                                               \
    return msl_reduce(lanes, first, first + 4, [](T a, T b) { return T(expression); }); \
  }
MSL_REDUCTION(sum, a + b)
MSL_REDUCTION(product, a* b)
MSL_REDUCTION(max, a < b ? b : a)
MSL_REDUCTION(min, b < a ? b : a)
MSL_REDUCTION(or, a | b)
MSL_REDUCTION(and, a& b)
MSL_REDUCTION(xor, a ^ b)

#define MSL_PREFIX(name, end, expression)                      \
  template <class T>                                           \
  MSL_NOINLINE T name(T value) {                               \
    auto lanes = msl_gather(value, MSL_SITE);                  \
    return msl_reduce(lanes, 0, msl_current->lane + end,       \
                      [](T a, T b) { return T(expression); }); \
  }
MSL_PREFIX(simd_prefix_inclusive_sum, 1, a + b)
MSL_PREFIX(simd_prefix_exclusive_sum, 0, a + b)
MSL_PREFIX(simd_prefix_inclusive_product, 1, a* b)

MSL_NOINLINE inline bool simd_any(bool value) {
  auto lanes = msl_gather(value, MSL_SITE);
  return msl_reduce(lanes, 0, 32, [](bool a, bool b) { return a || b; });
}
MSL_NOINLINE inline bool simd_all(bool value) {
  auto lanes = msl_gather(value, MSL_SITE);
  return msl_reduce(lanes, 0, 32, [](bool a, bool b) { return a && b; });
}

// ---- simdgroup_matrix: lane l holds the elements (row, column) and (row, column + 1) of
// msl_first_element(l). The layout is the one that MLX's Metal kernels rely on; Apple documents
// none. Products are accumulated in float, k ascending, and rounded once to the destination
// type.

template <class T, int R, int C>
struct simdgroup_matrix {
  static_assert(R == 8 && C == 8);
  vec<T, 2> e;
  simdgroup_matrix() = default;
  explicit simdgroup_matrix(T value) : e(value) {}
  vec<T, 2>& thread_elements() { return e; }
  const vec<T, 2>& thread_elements() const { return e; }
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;

inline void msl_first_element(uint lane, uint& row, uint& column) {
  uint quad = lane / 4;
  row = (quad & 4) + (lane / 2) % 4;
  column = (quad & 2) * 2 + (lane % 2) * 2;
}
inline uint msl_lane_of(uint row, uint column) {
  return ((row & 4) << 2) | ((column & 4) << 1) | ((row & 3) << 1) | ((column >> 1) & 1);
}

template <class D, class A, class B, class C>
MSL_NOINLINE void simdgroup_multiply_accumulate(simdgroup_matrix<D, 8, 8>& d,
                                                const simdgroup_matrix<A, 8, 8>& a,
                                                const simdgroup_matrix<B, 8, 8>& b,
                                                const simdgroup_matrix<C, 8, 8>& c) {
  struct Operands {
    vec<A, 2> a;
    vec<B, 2> b;
  } mine{a.e, b.e};
  auto lanes = msl_gather(mine, MSL_SITE);
  uint row, column;
  msl_first_element(msl_current->lane, row, column);
  float s0 = (float)c.e[0], s1 = (float)c.e[1];
  for (uint k = 0; k < 8; k += 2) {
    auto a_pair = lanes[msl_lane_of(row, k)].a;
    auto b_even = lanes[msl_lane_of(k, column)].b;
    auto b_odd = lanes[msl_lane_of(k + 1, column)].b;
    s0 += (float)a_pair[0] * (float)b_even[0];
    s0 += (float)a_pair[1] * (float)b_odd[0];
    s1 += (float)a_pair[0] * (float)b_even[1];
    s1 += (float)a_pair[1] * (float)b_odd[1];
  }
  d.e[0] = (D)s0;
  d.e[1] = (D)s1;
}

template <class T, class P>
inline void simdgroup_load(simdgroup_matrix<T, 8, 8>& d, P source, ulong elements_per_row = 8,
                           ulong2 origin = ulong2{0, 0}, bool transpose = false) {
  uint row, column;
  msl_first_element(msl_current->lane, row, column);
  for (uint i = 0; i < 2; i++) {
    ulong r = transpose ? column + i : row, c = transpose ? row : column + i;
    d.e[i] = source[(r + origin.y) * elements_per_row + c + origin.x];
  }
}
template <class T, class P>
inline void simdgroup_store(const simdgroup_matrix<T, 8, 8>& s, P destination,
                            ulong elements_per_row = 8, ulong2 origin = ulong2{0, 0},
                            bool transpose = false) {
  uint row, column;
  msl_first_element(msl_current->lane, row, column);
  for (uint i = 0; i < 2; i++) {
    ulong r = transpose ? column + i : row, c = transpose ? row : column + i;
    destination[(r + origin.y) * elements_per_row + c + origin.x] = s.e[i];
  }
}

}  // namespace metal

// ---- forms that mslpp.py writes

// `threadgroup T name[n][m];` as a reference into the threadgroup's memory.
#define MSL_THREADGROUP_ARRAY(T, name, ...)                              \
  static const char name##_declaration = 0;                              \
  typedef T name##_element;                                              \
  threadgroup name##_element(&name) __VA_ARGS__ =                        \
      *(threadgroup name##_element(*) __VA_ARGS__)msl_threadgroup_alloc( \
          sizeof(name##_element __VA_ARGS__), &name##_declaration)

// A struct copied from device to threadgroup memory in one assignment.
template <class T>
inline __attribute__((always_inline)) void msl_copy_to_threadgroup(threadgroup T* to,
                                                                   const device T* from) {
  auto d = (threadgroup unsigned char*)to;
  auto s = (const device unsigned char*)from;
  for (unsigned i = 0; i < sizeof(T); i++) d[i] = s[i];
}

#define double msl_has_no_double
