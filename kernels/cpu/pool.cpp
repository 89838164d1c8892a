#include "pool.h"

#include <pthread.h>
#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <new>
#include <thread>
#include <vector>
#if defined(__linux__)
#include <sched.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace lowbit::cpu {

namespace {

// Idle workers spin this long before they sleep: the gap between two products of one token is
// tens of microseconds, a wake-up costs about as much.
constexpr int kSpins = 20000;

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

int quota_cores() {
  long quota = 0, period = 0;
  if (std::FILE* f = std::fopen("/sys/fs/cgroup/cpu.max", "r")) {
    const int fields = std::fscanf(f, "%ld %ld", &quota, &period);
    std::fclose(f);
    if (fields == 2 && period > 0) return int((quota + period - 1) / period);
  }
  return 0;
}

int count_threads() {
  if (const char* text = std::getenv("MLX_LOWBIT_NUM_THREADS")) {
    const int n = std::atoi(text);
    if (n > 0) return n < 256 ? n : 256;
  }
  int n = int(std::thread::hardware_concurrency());
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) n = CPU_COUNT(&set);
  if (const int quota = quota_cores(); quota > 0 && quota < n) n = quota;
#endif
  return n < 1 ? 1 : n;
}

struct Job {
  int64_t count = 0;
  void (*task)(void*, int64_t, int) = nullptr;
  void* context = nullptr;
};

class Workers {
 public:
  explicit Workers(int threads) {
    for (int i = 1; i < threads; i++) std::thread([this, i] { work(i); }).detach();
    total_ = threads;
  }
  int threads() const { return total_; }

  void run(const Job& job) {
    if (total_ == 1 || job.count <= 1) {
      for (int64_t i = 0; i < job.count; i++) job.task(job.context, i, 0);
      return;
    }
    job_ = job;
    next_.store(0, std::memory_order_relaxed);
    busy_.store(total_ - 1, std::memory_order_relaxed);
    {
      // The lock orders the new generation before a sleeper's last look at it.
      std::lock_guard lock(mutex_);
      generation_.fetch_add(1, std::memory_order_release);
    }
    if (asleep_.load(std::memory_order_acquire) > 0) wake_.notify_all();
    take_tasks(0);
    for (int spins = 0; busy_.load(std::memory_order_acquire) != 0; spins++) {
      if (spins < kSpins)
        pause();
      else
        std::this_thread::yield();
    }
  }

 private:
  void take_tasks(int thread) {
    for (;;) {
      const int64_t i = next_.fetch_add(1, std::memory_order_relaxed);
      if (i >= job_.count) return;
      job_.task(job_.context, i, thread);
    }
  }

  void work(int thread) {
    uint64_t seen = 0;
    for (;;) {
      for (int spins = 0; generation_.load(std::memory_order_acquire) == seen; spins++) {
        if (spins < kSpins) {
          pause();
          continue;
        }
        std::unique_lock lock(mutex_);
        asleep_.fetch_add(1, std::memory_order_acq_rel);
        wake_.wait(lock, [&] { return generation_.load(std::memory_order_acquire) != seen; });
        asleep_.fetch_sub(1, std::memory_order_acq_rel);
      }
      seen++;
      take_tasks(thread);
      busy_.fetch_sub(1, std::memory_order_release);
    }
  }

  int total_ = 1;
  Job job_;
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<int> busy_{0};
  alignas(64) std::atomic<uint64_t> generation_{0};
  std::atomic<int> asleep_{0};
  std::mutex mutex_;
  std::condition_variable wake_;
};

// Never destroyed: detached workers may outlive every static object. A forked child has no
// workers, so it forgets the parent's and starts its own at first use.
Workers* workers = nullptr;
std::atomic_flag in_use = ATOMIC_FLAG_INIT;

Workers& all_workers() {
  static const bool registered = [] {
    pthread_atfork(nullptr, nullptr, [] {
      workers = nullptr;
      in_use.clear();
    });
    return true;
  }();
  (void)registered;
  if (!workers) workers = new Workers(thread_count());
  return *workers;
}

// Scratch memory of the calling thread; kept between calls up to a limit, since fresh pages
// cost more than most products.
struct Scratch {
  static constexpr size_t kKeep = size_t(256) << 20;
  void* memory = nullptr;
  size_t size = 0;
  void* get(size_t bytes) {
    if (bytes > size) {
      drop();
      size = (bytes + 4095) / 4096 * 4096;
      memory = ::operator new(size, std::align_val_t(64));
    }
    return memory;
  }
  void drop() {
    if (memory) ::operator delete(memory, std::align_val_t(64));
    memory = nullptr;
    size = 0;
  }
  ~Scratch() { drop(); }
};
thread_local Scratch scratch;

}  // namespace

int thread_count() {
  static const int n = count_threads();
  return n;
}

Lease::Lease() : owns_(!in_use.test_and_set(std::memory_order_acquire)) {}

Lease::~Lease() {
  if (scratch.size > Scratch::kKeep) scratch.drop();
  if (owns_) in_use.clear(std::memory_order_release);
}

Pool Lease::pool() const {
  const auto memory = [](size_t bytes) { return scratch.get(bytes); };
  if (!owns_)
    return {[](int64_t count, void (*task)(void*, int64_t, int), void* context) {
              for (int64_t i = 0; i < count; i++) task(context, i, 0);
            },
            1, memory};
  return {[](int64_t count, void (*task)(void*, int64_t, int), void* context) {
            all_workers().run({count, task, context});
          },
          all_workers().threads(), memory};
}

}  // namespace lowbit::cpu
