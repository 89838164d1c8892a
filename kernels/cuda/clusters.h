// What the launches of matvec and matmul ask about addresses and about the device.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace lowbit::cuda {

// Whether rows of `row_bytes` from p on all begin at multiples of `bytes`.
inline bool aligned(const void* p, int64_t row_bytes, int bytes) {
  return (reinterpret_cast<uintptr_t>(p) | uint64_t(row_bytes)) % uint64_t(bytes) == 0;
}

// How many clusters of `size` blocks run at once: at most the multiprocessors over `size`,
// fewer where a GPC holds no multiple of it. Asked once for kernels with the same arguments.
template <class Args>
int most_clusters(void (*kernel)(Args), int threads, int shared_bytes, int size,
                  int processors) {
  if (size == 1) return processors;
  static std::atomic<int> known[17];
  if (const int count = known[size].load()) return count;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  cudaLaunchAttribute dimension{};
  dimension.id = cudaLaunchAttributeClusterDimension;
  dimension.val.clusterDim = {unsigned(size), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(size), config.blockDim = dim3(threads);
  config.dynamicSmemBytes = size_t(shared_bytes);
  config.attrs = &dimension, config.numAttrs = 1;
  int count = 0;
  if (cudaOccupancyMaxActiveClusters(&count, kernel, &config) != cudaSuccess || count < 1)
    count = processors / size;
  known[size] = count;
  return count;
}

}  // namespace lowbit::cuda
