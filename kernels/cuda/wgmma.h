// Hopper's warpgroup matrix multiply (wgmma): A in registers, B in shared memory, sums in
// float32 registers of the four warps that issue it together. Compiles to nothing but for
// sm_90a.
#pragma once

#include "half.h"

// The instructions of sm_90a are there.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define LOWBIT_HOPPER 1
#else
#define LOWBIT_HOPPER 0
#endif

namespace lowbit::cuda {

#if LOWBIT_HOPPER

// B as wgmma reads it: rows of 128 bytes (64 elements along K), 8 rows to a swizzle atom of
// 1024 bytes, as a tensor copy with 128-byte swizzle leaves them. A step of 16 along K adds
// kDescriptorStep.
__device__ __forceinline__ uint64_t b_descriptor(uint32_t address) {
  constexpr uint64_t kSwizzle128 = uint64_t(1) << 62, kAtomStride = uint64_t(1024 / 16) << 32;
  return kSwizzle128 | kAtomStride | uint64_t(1) << 16 | uint64_t((address & 0x3ffffu) >> 4);
}
inline constexpr uint64_t kDescriptorStep = 32 / 16;

// Before the first multiply, and after registers that one will read were written.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Until at most `groups` committed groups are under way.
template <int groups>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(groups) : "memory");
}

// Keeps the compiler from giving registers that a multiply under way reads to anything else.
__device__ __forceinline__ void keep_alive(uint32_t (&a)[4]) {
  asm volatile("" : "+r"(a[0]), "+r"(a[1]), "+r"(a[2]), "+r"(a[3])::"memory");
}
// The same for sums: nothing moves across.
template <int n>
__device__ __forceinline__ void keep_alive(float (&d)[n]) {
#pragma unroll
  for (int i = 0; i < n; i++) asm volatile("" : "+f"(d[i])::"memory");
}

// d[64 x N] += a[64 x 16] * b[N x 16]^T. Warp w of the four holds rows 16w to 16w+15, lane
// (g, c) = (lane / 4, lane % 4) of it
//   a[0..3]            two consecutive elements each: rows g, g+8, g, g+8 at k = 2c, 2c, 2c+8,
//   2c+8 d[4j], d[4j+1]     row g, columns 8j+2c and 8j+2c+1;  d[4j+2], d[4j+3] row g+8
template <class T, int N>
struct Wgmma;

#define LOWBIT_D8(i)                                                                          \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])

#define LOWBIT_WGMMA_16(T, type)                                                      \
  template <>                                                                         \
  struct Wgmma<T, 16> {                                                               \
    static __device__ __forceinline__ void run(float (&d)[8], const uint32_t (&a)[4], \
                                               uint64_t b) {                          \
      asm volatile("wgmma.mma_async.sync.aligned.m64n16k16.f32." type "." type        \
                   " {%0,%1,%2,%3,%4,%5,%6,%7},{%8,%9,%10,%11},%12,1,1,1,0;"          \
                   : LOWBIT_D8(0)                                                     \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));             \
    }                                                                                 \
  };

#define LOWBIT_WGMMA_32(T, type)                                                       \
  template <>                                                                          \
  struct Wgmma<T, 32> {                                                                \
    static __device__ __forceinline__ void run(float (&d)[16], const uint32_t (&a)[4], \
                                               uint64_t b) {                           \
      asm volatile("wgmma.mma_async.sync.aligned.m64n32k16.f32." type "." type         \
                   " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15},"         \
                   "{%16,%17,%18,%19},%20,1,1,1,0;"                                    \
                   : LOWBIT_D8(0), LOWBIT_D8(8)                                        \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));              \
    }                                                                                  \
  };

#define LOWBIT_WGMMA_64(T, type)                                                            \
  template <>                                                                               \
  struct Wgmma<T, 64> {                                                                     \
    static __device__ __forceinline__ void run(float (&d)[32], const uint32_t (&a)[4],      \
                                               uint64_t b) {                                \
      asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type              \
                   " {"                                                                     \
                   "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19," \
                   "%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"                        \
                   "},{%32,%33,%34,%35},%36,1,1,1,0;"                                       \
                   : LOWBIT_D8(0), LOWBIT_D8(8), LOWBIT_D8(16), LOWBIT_D8(24)               \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                   \
    }                                                                                       \
  };

#define LOWBIT_WGMMA_128(T, type)                                                             \
  template <>                                                                                 \
  struct Wgmma<T, 128> {                                                                      \
    static __device__ __forceinline__ void run(float (&d)[64], const uint32_t (&a)[4],        \
                                               uint64_t b) {                                  \
      asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type               \
                   " {"                                                                       \
                   "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,"   \
                   "%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37," \
                   "%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55," \
                   "%56,%57,%58,%59,%60,%61,%62,%63"                                          \
                   "},{%64,%65,%66,%67},%68,1,1,1,0;"                                         \
                   : LOWBIT_D8(0), LOWBIT_D8(8), LOWBIT_D8(16), LOWBIT_D8(24), LOWBIT_D8(32), \
                     LOWBIT_D8(40), LOWBIT_D8(48), LOWBIT_D8(56)                              \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                     \
    }                                                                                         \
  };

#define LOWBIT_WGMMA_256(T, type)                                                             \
  template <>                                                                                 \
  struct Wgmma<T, 256> {                                                                      \
    static __device__ __forceinline__ void run(float (&d)[128], const uint32_t (&a)[4],       \
                                               uint64_t b) {                                  \
      asm volatile("wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type               \
                   " {"                                                                       \
                   "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,"   \
                   "%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37," \
                   "%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55," \
                   "%56,%57,%58,%59,%60,%61,%62,%63,%64,%65,%66,%67,%68,%69,%70,%71,%72,%73," \
                   "%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91," \
                   "%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107," \
                   "%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,"   \
                   "%122,%123,%124,%125,%126,%127"                                            \
                   "},{%128,%129,%130,%131},%132,1,1,1,0;"                                    \
                   : LOWBIT_D8(0), LOWBIT_D8(8), LOWBIT_D8(16), LOWBIT_D8(24), LOWBIT_D8(32), \
                     LOWBIT_D8(40), LOWBIT_D8(48), LOWBIT_D8(56), LOWBIT_D8(64),              \
                     LOWBIT_D8(72), LOWBIT_D8(80), LOWBIT_D8(88), LOWBIT_D8(96),              \
                     LOWBIT_D8(104), LOWBIT_D8(112), LOWBIT_D8(120)                           \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                     \
    }                                                                                         \
  };

LOWBIT_WGMMA_16(bf16, "bf16")
LOWBIT_WGMMA_16(f16, "f16")
LOWBIT_WGMMA_32(bf16, "bf16")
LOWBIT_WGMMA_32(f16, "f16")
LOWBIT_WGMMA_64(bf16, "bf16")
LOWBIT_WGMMA_64(f16, "f16")
LOWBIT_WGMMA_128(bf16, "bf16")
LOWBIT_WGMMA_128(f16, "f16")
LOWBIT_WGMMA_256(bf16, "bf16")
LOWBIT_WGMMA_256(f16, "f16")

#undef LOWBIT_WGMMA_16
#undef LOWBIT_WGMMA_32
#undef LOWBIT_WGMMA_64
#undef LOWBIT_WGMMA_128
#undef LOWBIT_WGMMA_256
#undef LOWBIT_D8

// Registers move between warpgroups: what one gives back others can claim.
template <int count>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
}
template <int count>
__device__ __forceinline__ void claim_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
}

#endif  // LOWBIT_HOPPER

}  // namespace lowbit::cuda
