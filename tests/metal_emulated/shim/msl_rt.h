// Interface between emulated kernels and the SIMT runtime (runtime.cpp): one fiber per GPU
// thread, which runs until it needs the other threads (a SIMD-group operation or a threadgroup
// barrier).
#pragma once
#include <cstddef>
#include <cstdint>

// What one GPU thread knows of its place.
struct MslContext {
  uint32_t thread_in_threadgroup[3];    // offset 0
  uint32_t thread_in_grid[3];           // 12
  uint32_t threadgroup_in_grid[3];      // 24
  uint32_t threads_per_threadgroup[3];  // 36
  uint32_t threads_per_grid[3];         // 48
  uint32_t threadgroups_per_grid[3];    // 60
  uint32_t thread_index;                // 72, in the threadgroup
  uint32_t lane;                        // 76, in the SIMD-group
  uint32_t simdgroup;                   // 80
  uint32_t simdgroups;                  // 84
  uint32_t quad_lane;                   // 88
  uint32_t quad;                        // 92
};
static_assert(offsetof(MslContext, thread_index) == 72 && sizeof(MslContext) == 96);

struct MslBuffer {
  void* data;
  size_t bytes;
};
struct MslArguments {
  MslBuffer buffer[32];  // by [[buffer(n)]]
};
typedef void (*MslEntry)(MslArguments&, MslContext&);

enum MslOperation : int { MSL_OP_DATA = 1, MSL_OP_SIMDGROUP_BARRIER = 2 };
constexpr int kMslSimdWidth = 32, kMslSlotBytes = 64;

extern "C" {
extern thread_local MslContext* msl_current;
// Deposits `bytes` (at most kMslSlotBytes) and waits for every active lane of the SIMD-group at
// the same call site. Returns the [32][64] slots of that rendezvous and the mask of lanes which
// took part.
__attribute__((convergent)) void* msl_exchange(const void* in, size_t bytes, int operation,
                                               const void* site, uint32_t* mask);
__attribute__((convergent)) void msl_threadgroup_barrier(const void* site);
// Threadgroup memory: one block per (threadgroup, declaration), filled with 0xFF (NaN) at first
// use.
void* msl_threadgroup_alloc(size_t bytes, const void* declaration);

void msl_register_kernel(const char* name, MslEntry entry);
void msl_register_constant(int index, void* storage, size_t bytes);

// Called by the host side (emulator.py).
int msl_list_kernels(char* out, int out_bytes);
int msl_set_constant(int index, const void* value,
                     int bytes);  // returns how many constants took the value
// order: 0 lanes in order, 1 reversed, 2 shuffled at every threadgroup barrier, 3 at every
// rendezvous,
//        4 greedy: one random SIMD-group runs as far as it can before any other.
// check: count races and out-of-bounds accesses (the library must be a `check` build).
// strict: count SIMD-group operations that some live lane of the SIMD-group does not reach.
// stats: SIMD-group operations, threadgroup barriers, divergent operations, bytes of
// threadgroup memory. traffic: of each buffer the bytes that all threads read, then wrote
// (check only). Returns the number of problems found, -1 for an unknown kernel; `errors` gets
// the first eight as text.
int msl_launch(const char* name, MslBuffer* buffers, int n_buffers,
               const uint32_t* threadgroups, const uint32_t* threads, int order, int seed,
               int check, int strict, char* errors, int error_bytes, long* stats,
               long* traffic);
}
