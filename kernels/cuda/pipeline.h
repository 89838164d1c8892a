// Asynchronous copies from global to shared memory, and the barriers that tell of them.
#pragma once

#include <cstdint>

namespace lowbit::cuda {

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return uint32_t(__cvta_generic_to_shared(p));
}

template <int bytes>
__device__ __forceinline__ void copy_async(uint32_t to, const void* from) {
  if constexpr (bytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(from), "n"(bytes)
                 : "memory");
}

// This thread's place in its warp, asked for where it stands: the compiler keeps what it got at
// a kernel's begin in memory where registers run short.
__device__ __forceinline__ int lane_id() {
  int lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}

// Until all copies of this thread are done.
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}

// The `threads` threads of the block that come to the barrier of this number, 0 to 15: whole
// warps, each lane for itself. `bar.sync`, which wants the lanes together, with __syncwarp
// before it took matvec 0.3 us (4-bit 4096x14336, M = 1: 13.33 us, 13.07 so; H200, 2026-11-23).
template <int threads>
__device__ __forceinline__ void sync_threads(int barrier) {
  asm volatile("barrier.cta.sync %0, %1;" ::"r"(barrier), "n"(threads) : "memory");
}
// The same, and whether any of them says yes: one answer for all.
template <int threads>
__device__ __forceinline__ bool sync_any(int barrier, bool yes) {
  uint32_t any;
  asm volatile(
      "{ .reg .pred p, q;\n"
      "  setp.ne.u32 p, %1, 0;\n"
      "  barrier.cta.red.or.pred q, %2, %3, p;\n"
      "  selp.u32 %0, 1, 0, q; }"
      : "=r"(any)
      : "r"(uint32_t(yes)), "r"(barrier), "n"(threads)
      : "memory");
  return any;
}
// An arrival at such a barrier, without the wait.
template <int threads>
__device__ __forceinline__ void arrive_threads(int barrier) {
  asm volatile("barrier.cta.arrive %0, %1;" ::"r"(barrier), "n"(threads) : "memory");
}

// Arrivals of a warp at a barrier: its first lane's, once all are there. compute-sanitizer's
// racecheck orders only what arriving lanes did themselves, so there all of them arrive.
#ifdef LOWBIT_RACECHECK
inline constexpr int kArrivals = 32;
#else
inline constexpr int kArrivals = 1;
#endif

#if __CUDA_ARCH__ >= 800

// mbarriers, by address in shared memory.
__device__ __forceinline__ void init_barrier(uint32_t bar, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(bar), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void arrive(uint32_t bar) {
  asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(bar)
               : "memory");
}
// One arrival, when this thread's copies so far (copy_async) are done.
__device__ __forceinline__ void arrive_after_copies(uint32_t bar) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(bar) : "memory");
}
// A barrier that is never completed ends the kernel with an error: no defect of ours keeps the
// device busy for ever.
__device__ __forceinline__ void wait_phase(uint32_t bar, uint32_t parity) {
#if __CUDA_ARCH__ >= 900
#define LOWBIT_TEST "try_wait"  // waits a while
  constexpr uint32_t kTries = 1u << 24;
#else
#define LOWBIT_TEST "test_wait"
  constexpr uint32_t kTries = 1u << 30;
#endif
#pragma unroll 1
  for (uint32_t tries = 0; tries < kTries; tries++) {
    uint32_t done;
    asm volatile(
        "{ .reg .pred p;\n"
        "  mbarrier." LOWBIT_TEST
        ".parity.shared.b64 p, [%1], %2;\n"
        "  selp.u32 %0, 1, 0, p; }"
        : "=r"(done)
        : "r"(bar), "r"(parity)
        : "memory");
    if (done) return;
  }
#undef LOWBIT_TEST
  __trap();
}

#endif

#if __CUDA_ARCH__ >= 900

// One arrival, and `bytes` that bulk copies will complete.
__device__ __forceinline__ void arrive_expecting(uint32_t bar, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes)
               : "memory");
}
// The bytes alone.
__device__ __forceinline__ void expect(uint32_t bar, uint32_t bytes) {
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared.b64 [%0], %1;" ::"r"(bar), "r"(bytes)
               : "memory");
}
// What copies tell the L2 cache. Weights that are read once leave it first, so that x, y and
// the text of kernels stay. Without and with, 4096x14336: M = 1 4-bit 12.2 and 11.9 us,
// nvfp4 13.7 and 13.5; M = 16 8-bit 19.9 and 19.4; M = 64 4-bit 21.6 and 20.9, nvfp4 24.1
// and 23.1; 4096x4096 M = 1 4-bit 5.9 and 5.7. What several of matmul's tiles of tokens read
// stays: experts, 4096 tokens, 3-bit 724 and 770. For x nothing is said: evict_normal, which is
// the default by name, took 4-bit M = 64 from 20.9 to 24.0, evict_last was no gain (H200,
// 2026-11-29).
__device__ __forceinline__ uint64_t read_once() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
__device__ __forceinline__ uint64_t read_again() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
// `bytes` in a row, by the copy engine: a multiple of 16, as are both addresses.
__device__ __forceinline__ void copy_bulk(uint32_t to, const void* from, uint32_t bytes,
                                          uint32_t bar, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1], %2, [%3], %4;" ::"r"(to),
      "l"(from), "r"(bytes), "r"(bar), "l"(policy)
      : "memory");
}
// True for one of the warp's threads.
__device__ __forceinline__ bool elect_one() {
  uint32_t mine;
  asm volatile(
      "{ .reg .pred p;\n"
      "  elect.sync _|p, 0xffffffff;\n"
      "  selp.u32 %0, 1, 0, p; }"
      : "=r"(mine));
  return mine;
}
// The lanes of a warp that arrive for it, when all are there. That asks no register for a
// lane's number, which where there were too few came from memory in every unit.
__device__ __forceinline__ bool arrives() {
  __syncwarp();
  return kArrivals > 1 || elect_one();
}
// Initialised barriers are seen by copies and, after cluster_sync, by the cluster.
__device__ __forceinline__ void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

#endif

}  // namespace lowbit::cuda
