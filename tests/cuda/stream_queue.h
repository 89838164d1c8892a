// A Queue over a plain stream: runs the kernels without MLX.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/kernels.h"

namespace lowbit::check {

inline void require(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorName(status) + ", " +
                           cudaGetErrorString(status));
}

class StreamQueue final : public cuda::Queue {
 public:
  StreamQueue() {
    require(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreate");
    const auto attribute = [](cudaDeviceAttr a) {
      int value = 0;
      require(cudaDeviceGetAttribute(&value, a, 0), "cudaDeviceGetAttribute");
      return value;
    };
    device_.capability = attribute(cudaDevAttrComputeCapabilityMajor) * 10 +
                         attribute(cudaDevAttrComputeCapabilityMinor);
    device_.processors = attribute(cudaDevAttrMultiProcessorCount);
    device_.shared_bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  }
  StreamQueue(const StreamQueue&) = delete;
  StreamQueue& operator=(const StreamQueue&) = delete;
  ~StreamQueue() override {
    cudaStreamSynchronize(stream_);
    for (void* p : scratch_) cudaFreeAsync(p, stream_);
    cudaStreamSynchronize(stream_);
    cudaStreamDestroy(stream_);
  }

  // A cluster lies along x.
  void launch(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes, void** args,
              int cluster) override {
    if (shared_bytes > 48 * 1024)
      require(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   int(shared_bytes)),
              "cudaFuncSetAttribute");
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = unsigned(cluster);
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream_;
    config.attrs = &attribute;
    config.numAttrs = cluster > 1 ? 1 : 0;
    require(cudaLaunchKernelExC(&config, kernel, args), "cudaLaunchKernelExC");
  }

  // Filled with NaN, so that what a kernel forgets to write shows.
  void* scratch(size_t bytes) override {
    void* p = nullptr;
    require(cudaMallocAsync(&p, bytes ? bytes : 1, stream_), "cudaMallocAsync");
    scratch_.push_back(p);
    require(cudaMemsetAsync(p, 0xff, bytes, stream_), "cudaMemsetAsync");
    return p;
  }

  const cuda::Device& device() const override { return device_; }
  cudaStream_t stream() const { return stream_; }

  // Everything launched so far is done; its scratch memory is free again.
  void wait() {
    require(cudaStreamSynchronize(stream_), "cudaStreamSynchronize");
    for (void* p : scratch_) require(cudaFreeAsync(p, stream_), "cudaFreeAsync");
    scratch_.clear();
  }

 private:
  cudaStream_t stream_{};
  cuda::Device device_{};
  std::vector<void*> scratch_;
};

}  // namespace lowbit::check
