// The threads of the CPU backend.
#pragma once

#include "kernels.h"

namespace lowbit::cpu {

// The pool as the calling thread may use it now: all threads when it is free, the caller alone
// while another stream or thread is using it. Hold the lease while the kernel runs.
class Lease {
 public:
  Lease();
  ~Lease();
  Lease(const Lease&) = delete;
  Lease& operator=(const Lease&) = delete;
  Pool pool() const;

 private:
  bool owns_;
};

// Threads that a product may use: MLX_LOWBIT_NUM_THREADS, or the cores this process may run on
// (affinity and cgroup quota), at least 1.
int thread_count();

}  // namespace lowbit::cpu
