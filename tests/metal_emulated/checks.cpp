// Races, bounds and traffic: what a `check` build tells of every access.
//
// Its kernels are compiled with -fsanitize=thread, but linked with the __tsan_* callbacks below
// instead of the sanitizer's runtime. Each access to threadgroup memory or to a buffer lands in
// record_access(), which keeps the last writer and the last reader of every byte. Two accesses
// of different threads, one of them a write, are a race unless a barrier lies between them.
#include <cstdlib>
#include <cstring>

#include "runtime.h"

namespace msl {
namespace {

std::string nearest_buffer(const char* address) {
  long best = 1l << 60;
  size_t index = 0;
  for (size_t i = 0; i < R.device_buffers.size(); i++) {
    long delta = address - ((char*)R.device_buffers[i].data + R.device_buffers[i].bytes);
    if (labs(delta) < labs(best)) best = delta, index = i;
  }
  return "buffer " + std::to_string(index) + ", " + std::to_string(best) +
         " bytes from its end";
}

}  // namespace

void record_access(const void* pointer, size_t bytes, bool write, const void* pc) {
  if (!R.check || !R.running) return;
  Fiber* f = R.running;
  const char* address = (const char*)pointer;
  const bool in_threadgroup_memory =
      (size_t)(address - R.threadgroup_memory) < kThreadgroupArena;
  ShadowByte* shadow;
  uint32_t id;
  if (in_threadgroup_memory) {
    size_t offset = address - R.threadgroup_memory;
    bool inside = false;
    for (auto& [start, length] : R.threadgroup_extents)
      inside |= offset >= start && offset + bytes <= start + length;
    if (!inside)
      return report("OUT OF BOUNDS threadgroup access by " + who(*f) + " at " + where(pc));
    shadow = &R.threadgroup_shadow[offset];
    id = f->context.thread_index + 1;
  } else if ((size_t)(address - R.device_memory) < R.device_bytes) {
    size_t index = 0;
    for (; index < R.device_buffers.size(); index++) {
      const MslBuffer& b = R.device_buffers[index];
      if (address >= (char*)b.data && address + bytes <= (char*)b.data + b.bytes) break;
    }
    if (index == R.device_buffers.size())
      return report(std::string("OUT OF BOUNDS device ") + (write ? "write" : "read") + " (" +
                    nearest_buffer(address) + ") by " + who(*f) + " at " + where(pc));
    (write ? R.written_bytes : R.read_bytes)[index] += (long)bytes;
    shadow = &R.device_shadow[address - R.device_memory];
    id = R.threadgroup_id * kMaxThreads + f->context.thread_index + 1;
  } else {
    return;  // the fiber's own stack, constants
  }

  const uint32_t simdgroup = f->context.simdgroup & 255;
  const Access now = {id, R.epoch, f->simdgroup_barriers << 8 | simdgroup};
  auto ordered = [&](const Access& before) {
    if (!before.who || before.who == id) return true;
    if (!in_threadgroup_memory && (before.who - 1) / kMaxThreads != R.threadgroup_id)
      return false;
    if (before.epoch != R.epoch) return true;
    return (before.sync & 255) == simdgroup && before.sync != now.sync;
  };
  auto race = [&](const char* kind, const Access& before) {
    report(std::string("RACE ") + kind +
           (in_threadgroup_memory ? " in threadgroup memory by " : " in device memory by ") +
           who(*f) + " against thread " + std::to_string((before.who - 1) % kMaxThreads) +
           " at " + where(pc));
  };
  for (size_t i = 0; i < bytes; i++) {
    ShadowByte& b = shadow[i];
    if (!ordered(b.write)) return race(write ? "write/write" : "write/read", b.write);
    if (write && !ordered(b.read)) return race("read/write", b.read);
    (write ? b.write : b.read) = now;
  }
}

}  // namespace msl

using msl::record_access;

#define PC __builtin_return_address(0)
#define TSAN_CALLBACKS(n)                                                               \
  extern "C" void __tsan_read##n(void* a) { record_access(a, n, false, PC); }           \
  extern "C" void __tsan_write##n(void* a) { record_access(a, n, true, PC); }           \
  extern "C" void __tsan_unaligned_read##n(void* a) { record_access(a, n, false, PC); } \
  extern "C" void __tsan_unaligned_write##n(void* a) { record_access(a, n, true, PC); } \
  extern "C" void __tsan_read_write##n(void* a) {                                       \
    record_access(a, n, false, PC), record_access(a, n, true, PC);                      \
  }                                                                                     \
  extern "C" void __tsan_unaligned_read_write##n(void* a) {                             \
    record_access(a, n, false, PC), record_access(a, n, true, PC);                      \
  }
TSAN_CALLBACKS(1)
TSAN_CALLBACKS(2)
TSAN_CALLBACKS(4)
TSAN_CALLBACKS(8)
TSAN_CALLBACKS(16)

extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_read_range(void* a, size_t n) { record_access(a, n, false, PC); }
void __tsan_write_range(void* a, size_t n) { record_access(a, n, true, PC); }
void* __tsan_memset(void* d, int v, size_t n) {
  record_access(d, n, true, PC);
  return memset(d, v, n);
}
void* __tsan_memcpy(void* d, const void* s, size_t n) {
  record_access(s, n, false, PC), record_access(d, n, true, PC);
  return memcpy(d, s, n);
}
void* __tsan_memmove(void* d, const void* s, size_t n) {
  record_access(s, n, false, PC), record_access(d, n, true, PC);
  return memmove(d, s, n);
}
}
