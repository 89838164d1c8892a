// SIMT on one CPU thread: a fiber for each GPU thread, in a reproducible random order.
//
// A fiber stops only at a SIMD-group operation or a threadgroup barrier. When no fiber can run,
// the scheduler releases the lanes that wait at the same SIMD-group operation; when all wait at
// a barrier, it releases the threadgroup. x86-64 System V only (the fiber switch is assembly).
#include "runtime.h"

#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

asm(R"(
.text
.globl msl_switch
msl_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp,(%rdi); movq %rsi,%rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
)");
extern "C" void msl_switch(void** save_stack_pointer, void* to_stack_pointer);

namespace msl {

Runtime R;

void report(const std::string& message) {
  if (R.n_errors++ < 8) R.errors += message + "\n";
}

// "library+0xoffset" of the call, which llvm-symbolizer turns into a source line (the return
// address is one past it).
std::string where(const void* return_address) {
  Dl_info info;
  char text[600];
  const char* pc = (const char*)return_address - 1;
  if (dladdr(pc, &info) && info.dli_fname)
    snprintf(text, sizeof text, "%s+0x%lx", info.dli_fname,
             (long)(pc - (const char*)info.dli_fbase));
  else
    snprintf(text, sizeof text, "%p", (const void*)pc);
  return text;
}

std::string who(const Fiber& f) {
  const uint32_t* g = f.context.threadgroup_in_grid;
  char text[99];
  snprintf(text, sizeof text, "threadgroup (%u,%u,%u) thread %u", g[0], g[1], g[2],
           f.context.thread_index);
  return text;
}

namespace {

std::map<std::string, MslEntry>& kernels() {
  static std::map<std::string, MslEntry> m;
  return m;
}
std::multimap<int, Constant>& constants() {
  static std::multimap<int, Constant> m;
  return m;
}

void pause_fiber() {
  Fiber* f = R.running;
  msl_switch(&f->stack_pointer, R.main_stack_pointer);
}

void fiber_main() {
  Fiber* f = R.running;
  R.entry(*R.arguments, f->context);
  f->state = State::finished;
  pause_fiber();
  __builtin_trap();
}

}  // namespace
}  // namespace msl

using namespace msl;

thread_local MslContext* msl_current;

extern "C" {

void msl_register_kernel(const char* name, MslEntry entry) { kernels()[name] = entry; }
void msl_register_constant(int index, void* storage, size_t bytes) {
  constants().insert({index, {storage, bytes}});
}

void* msl_exchange(const void* in, size_t bytes, int operation, const void* site,
                   uint32_t* mask) {
  Fiber* f = R.running;
  SimdGroup& group = R.simdgroups[f->context.simdgroup];
  if (bytes > kMslSlotBytes) abort();
  if (bytes) memcpy(group.slots[f->parity][f->context.lane], in, bytes);
  f->site = site;
  f->state = State::at_simd_operation;
  int parity = f->parity;
  pause_fiber();
  f->parity = parity ^ 1;
  if (operation == MSL_OP_SIMDGROUP_BARRIER) f->simdgroup_barriers++;
  *mask = f->mask;
  return group.slots[parity];
}

void msl_threadgroup_barrier(const void* site) {
  Fiber* f = R.running;
  f->site = site;
  f->state = State::at_barrier;
  pause_fiber();
}

void* msl_threadgroup_alloc(size_t bytes, const void* declaration) {
  auto it = R.threadgroup_blocks.find(declaration);
  if (it != R.threadgroup_blocks.end()) return R.threadgroup_memory + it->second;
  size_t offset = (R.threadgroup_used + 127) / 128 * 128;
  R.threadgroup_used = offset + bytes + 128;  // a gap after each block, for the bounds check
  if (R.threadgroup_used > kThreadgroupArena) abort();
  R.threadgroup_bytes += (bytes + 15) / 16 * 16;
  R.threadgroup_bytes_max = std::max(R.threadgroup_bytes_max, R.threadgroup_bytes);
  memset(R.threadgroup_memory + offset, 0xFF, bytes);
  R.threadgroup_blocks[declaration] = offset;
  R.threadgroup_extents.push_back({offset, bytes});
  return R.threadgroup_memory + offset;
}

}  // extern "C"

namespace msl {
namespace {

void start_fibers() {
  for (Fiber& f : R.fibers) {
    f.state = State::ready;
    f.parity = 0;
    f.simdgroup_barriers = 0;
    void** sp = (void**)(f.stack + kStackBytes);
    *--sp = nullptr;            // keeps the stack aligned as after a call
    *--sp = (void*)fiber_main;  // popped by `ret` in msl_switch
    for (int k = 0; k < 6; k++) *--sp = nullptr;
    f.stack_pointer = sp;
  }
}

// Releases, in each SIMD-group (or only in `only`), the lanes that wait at one operation.
bool release_simd_operations(int only) {
  bool released = false;
  for (size_t s = 0; s < R.simdgroups.size(); s++) {
    if (only >= 0 && (int)s != only) continue;
    size_t first = s * kMslSimdWidth, last = std::min(R.fibers.size(), first + kMslSimdWidth);
    const void* site = nullptr;
    uint32_t mask = 0;
    bool divergent = false;
    for (size_t i = first; i < last; i++) {
      Fiber& f = R.fibers[i];
      if (f.state == State::at_simd_operation) {
        if (!site) site = f.site;
        if (f.site == site)
          mask |= 1u << (i - first);
        else
          divergent = true;
      } else if (f.state != State::finished) {
        divergent = true;
      }
    }
    if (!mask) continue;
    R.n_simd_operations++;
    if (divergent) {
      R.n_divergent++;
      if (R.strict)
        report("DIVERGENT SIMD-group operation, threadgroup " +
               std::to_string(R.threadgroup_id) + " SIMD-group " + std::to_string(s) + " at " +
               where(site));
    }
    for (size_t i = first; i < last; i++)
      if (mask >> (i - first) & 1) R.fibers[i].mask = mask, R.fibers[i].state = State::ready;
    released = true;
  }
  return released;
}

void run_threadgroup() {
  const size_t n = R.fibers.size(), n_simdgroups = R.simdgroups.size();
  R.threadgroup_used = R.threadgroup_bytes = 0;
  R.threadgroup_blocks.clear();
  R.threadgroup_extents.clear();
  std::fill(R.threadgroup_shadow.begin(), R.threadgroup_shadow.end(), ShadowByte{});
  R.epoch++;
  start_fibers();

  std::vector<int> lanes(n), groups(n_simdgroups);
  for (size_t i = 0; i < n; i++) lanes[i] = (int)i;
  for (size_t i = 0; i < n_simdgroups; i++) groups[i] = (int)i;
  auto shuffle = [&] {
    if (R.order == 1) std::reverse(lanes.begin(), lanes.end());
    if (R.order >= 2) std::shuffle(lanes.begin(), lanes.end(), R.random);
  };
  auto shuffle_groups = [&] {
    if (R.order == 4) std::shuffle(groups.begin(), groups.end(), R.random);
  };
  shuffle();
  shuffle_groups();

  for (;;) {
    int only = -1;  // order 4: the SIMD-group that runs now
    if (R.order == 4)
      for (int s : groups) {
        size_t first = size_t(s) * kMslSimdWidth, last = std::min(n, first + kMslSimdWidth);
        bool can_run = false;
        for (size_t i = first; i < last; i++)
          can_run |= R.fibers[i].state == State::ready ||
                     R.fibers[i].state == State::at_simd_operation;
        if (can_run) {
          only = s;
          break;
        }
      }

    bool ran = false;
    for (int i : lanes) {
      Fiber& f = R.fibers[i];
      if (f.state != State::ready || (only >= 0 && i / kMslSimdWidth != only)) continue;
      ran = true;
      R.running = &f;
      msl_current = &f.context;
      msl_switch(&R.main_stack_pointer, f.stack_pointer);
      R.running = nullptr;
    }
    if (release_simd_operations(only)) {
      if (R.order >= 3) shuffle();
      continue;
    }

    const void* site = nullptr;
    size_t waiting = 0, finished = 0;
    bool different_sites = false;
    for (Fiber& f : R.fibers) {
      finished += f.state == State::finished;
      if (f.state != State::at_barrier) continue;
      waiting++;
      if (!site) site = f.site;
      different_sites |= site != f.site;
    }
    if (finished == n) return;
    if (waiting + finished == n) {
      if (finished)
        report("BARRIER not reached by " + std::to_string(finished) +
               " finished threads, threadgroup " + std::to_string(R.threadgroup_id) + " at " +
               where(site));
      if (different_sites)
        report("BARRIER: threads wait at different calls, one at " + where(site));
      R.n_barriers++;
      R.epoch++;
      for (Fiber& f : R.fibers)
        if (f.state == State::at_barrier) f.state = State::ready;
      shuffle();
      shuffle_groups();
      continue;
    }
    if (only >= 0) continue;  // this SIMD-group is at the barrier; the next one runs
    if (!ran) return report("DEADLOCK in threadgroup " + std::to_string(R.threadgroup_id));
  }
}

void copy_buffers_into_arena(MslBuffer* buffers, int n, std::vector<char>& storage,
                             MslArguments& arguments) {
  auto padded = [](size_t bytes) { return (bytes + 255) / 256 * 256 + kRedZone; };
  size_t total = kRedZone;
  for (int i = 0; i < n; i++) total += padded(buffers[i].bytes);
  storage.assign(total + 256, (char)0xFF);
  R.device_memory = (char*)(((size_t)storage.data() + 255) / 256 * 256);
  R.device_bytes = total;
  R.device_shadow.assign(total, ShadowByte{});
  size_t offset = kRedZone;
  for (int i = 0; i < n; i++) {
    arguments.buffer[i] = {R.device_memory + offset, buffers[i].bytes};
    memcpy(R.device_memory + offset, buffers[i].data, buffers[i].bytes);
    R.device_buffers.push_back(arguments.buffer[i]);
    offset += padded(buffers[i].bytes);
  }
}

}  // namespace
}  // namespace msl

using namespace msl;

// What arithmetic.py adds to.
extern "C" {
long msl_arithmetic = 0;
}

extern "C" int msl_list_kernels(char* out, int out_bytes) {
  std::string names;
  for (auto& [name, entry] : kernels()) names += name + "\n";
  snprintf(out, out_bytes, "%s", names.c_str());
  return (int)kernels().size();
}

extern "C" int msl_set_constant(int index, const void* value, int bytes) {
  int count = 0;
  for (auto [it, end] = constants().equal_range(index); it != end; ++it, ++count)
    memcpy(it->second.storage, value, std::min((size_t)bytes, it->second.bytes));
  return count;
}

extern "C" int msl_launch(const char* name, MslBuffer* buffers, int n_buffers,
                          const uint32_t* threadgroups, const uint32_t* threads, int order,
                          int seed, int check, int strict, char* errors, int error_bytes,
                          long* stats, long* traffic) {
  auto kernel = kernels().find(name);
  if (kernel == kernels().end()) return -1;
  const uint32_t n = threads[0] * threads[1] * threads[2];
  const uint32_t n_threadgroups = threadgroups[0] * threadgroups[1] * threadgroups[2];

  R.entry = kernel->second;
  R.order = order;
  R.random.seed(seed);
  R.check = check;
  R.strict = strict;
  R.epoch = 1;
  R.errors.clear();
  R.n_errors = 0;
  R.n_simd_operations = R.n_barriers = R.n_divergent = 0;
  R.threadgroup_bytes_max = 0;
  if (n > kMaxThreads) report("more than 1024 threads per threadgroup: " + std::to_string(n));

  const int rw = PROT_READ | PROT_WRITE, anonymous = MAP_PRIVATE | MAP_ANONYMOUS;
  if (!R.threadgroup_memory)
    R.threadgroup_memory = (char*)mmap(nullptr, kThreadgroupArena, rw, anonymous, -1, 0);
  while (R.stacks.size() < n)
    R.stacks.push_back((char*)mmap(nullptr, kStackBytes, rw, anonymous | MAP_NORESERVE, -1, 0));
  R.threadgroup_shadow.assign(check ? kThreadgroupArena : 0, ShadowByte{});

  MslArguments arguments{};
  R.arguments = &arguments;
  R.device_buffers.clear();
  R.read_bytes.assign(n_buffers, 0);
  R.written_bytes.assign(n_buffers, 0);
  std::vector<char> storage;
  if (check)
    copy_buffers_into_arena(buffers, n_buffers, storage, arguments);
  else
    std::copy(buffers, buffers + n_buffers, arguments.buffer);

  R.fibers.assign(n, Fiber{});
  R.simdgroups.resize((n + kMslSimdWidth - 1) / kMslSimdWidth);
  for (uint32_t i = 0; i < n; i++) {
    Fiber& f = R.fibers[i];
    f.stack = R.stacks[i];
    MslContext& c = f.context;
    c.thread_index = i;
    c.lane = i % kMslSimdWidth;
    c.simdgroup = i / kMslSimdWidth;
    c.simdgroups = (uint32_t)R.simdgroups.size();
    c.quad_lane = i % 4;
    c.quad = i / 4;
    const uint32_t position[3] = {i % threads[0], i / threads[0] % threads[1],
                                  i / threads[0] / threads[1]};
    for (int k = 0; k < 3; k++) {
      c.thread_in_threadgroup[k] = position[k];
      c.threads_per_threadgroup[k] = threads[k];
      c.threadgroups_per_grid[k] = threadgroups[k];
      c.threads_per_grid[k] = threadgroups[k] * threads[k];
    }
  }

  std::vector<uint32_t> sequence(n_threadgroups);
  for (uint32_t i = 0; i < n_threadgroups; i++) sequence[i] = i;
  if (order == 1) std::reverse(sequence.begin(), sequence.end());
  if (order >= 2) std::shuffle(sequence.begin(), sequence.end(), R.random);
  for (uint32_t g : sequence) {
    const uint32_t position[3] = {g % threadgroups[0], g / threadgroups[0] % threadgroups[1],
                                  g / threadgroups[0] / threadgroups[1]};
    R.threadgroup_id = g;
    for (Fiber& f : R.fibers)
      for (int k = 0; k < 3; k++) {
        f.context.threadgroup_in_grid[k] = position[k];
        f.context.thread_in_grid[k] =
            position[k] * threads[k] + f.context.thread_in_threadgroup[k];
      }
    run_threadgroup();
  }

  if (R.threadgroup_bytes_max > kThreadgroupLimit)
    report("more than 32 KiB of threadgroup memory: " +
           std::to_string(R.threadgroup_bytes_max));
  if (check)
    for (int i = 0; i < n_buffers; i++)
      memcpy(buffers[i].data, arguments.buffer[i].data, buffers[i].bytes);
  R.device_memory = nullptr;
  R.device_bytes = 0;
  snprintf(errors, error_bytes, "%s", R.errors.c_str());
  stats[0] = R.n_simd_operations;
  stats[1] = R.n_barriers;
  stats[2] = R.n_divergent;
  stats[3] = (long)R.threadgroup_bytes_max;
  for (int i = 0; i < n_buffers; i++) {
    traffic[2 * i] = R.read_bytes[i];
    traffic[2 * i + 1] = R.written_bytes[i];
  }
  return R.n_errors;
}
