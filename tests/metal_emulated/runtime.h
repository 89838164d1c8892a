// What the scheduler (runtime.cpp) and the checks (checks.cpp) of the SIMT runtime share.
#pragma once

#include <map>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "shim/msl_rt.h"

namespace msl {

inline constexpr size_t kStackBytes = 256 << 10;
inline constexpr size_t kThreadgroupArena =
    256 << 10;  // more than a GPU has, so that an oversized kernel is reported, not killed
inline constexpr size_t kThreadgroupLimit = 32 << 10;
inline constexpr size_t kRedZone = 4096;  // between buffers in a checked launch
inline constexpr int kMaxThreads = 1024;

enum class State { ready, at_simd_operation, at_barrier, finished };

struct Fiber {
  void* stack_pointer;
  char* stack;
  State state;
  MslContext context;
  const void* site;             // return address of the operation it waits at
  uint32_t mask;                // lanes of the last rendezvous
  int parity;                   // slots are double-buffered
  uint32_t simdgroup_barriers;  // passed so far: orders accesses inside a SIMD-group
};

struct SimdGroup {
  alignas(64) char slots[2][kMslSimdWidth][kMslSlotBytes];
};

struct Access {
  uint32_t who;    // 0 nobody, else thread id + 1
  uint32_t epoch;  // threadgroup barriers passed when it happened
  uint32_t sync;   // SIMD-group barriers passed << 8 | SIMD-group
};
struct ShadowByte {
  Access write, read;
};

struct Constant {
  void* storage;
  size_t bytes;
};

struct Runtime {
  std::vector<Fiber> fibers;
  std::vector<SimdGroup> simdgroups;
  std::vector<char*> stacks;
  void* main_stack_pointer;
  Fiber* running = nullptr;
  MslEntry entry;
  MslArguments* arguments;
  std::mt19937 random;
  int order;
  bool check = false, strict = false;
  uint32_t epoch, threadgroup_id;

  char* threadgroup_memory = nullptr;
  size_t threadgroup_used, threadgroup_bytes, threadgroup_bytes_max;
  std::map<const void*, size_t> threadgroup_blocks;
  std::vector<std::pair<size_t, size_t>> threadgroup_extents;  // offset, bytes
  std::vector<ShadowByte> threadgroup_shadow;

  char* device_memory =
      nullptr;  // the buffers of a checked launch are copied here, with red zones
  size_t device_bytes = 0;
  std::vector<MslBuffer> device_buffers;
  std::vector<ShadowByte> device_shadow;
  std::vector<long> read_bytes, written_bytes;  // by buffer, of a checked launch

  std::string errors;
  int n_errors;
  long n_simd_operations, n_barriers, n_divergent;
};
extern Runtime R;

// One problem of a launch; the first eight are kept as text.
void report(const std::string& message);
// "library+0xoffset" of a call, which llvm-symbolizer turns into a source line.
std::string where(const void* return_address);
// The threadgroup and thread of a fiber, in words.
std::string who(const Fiber&);

}  // namespace msl
