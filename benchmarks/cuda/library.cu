// The CUDA kernels without MLX, for timing on a stream of someone else's (torch's, so that its
// CUDA graphs capture them). Built as `lowbit_cuda_library`; called through ctypes.
#include <cstdio>
#include <map>

#include "cuda/kernels.h"

namespace {

using namespace lowbit;

// Launches on a given stream; reports failures instead of throwing through C.
class BorrowedQueue final : public cuda::Queue {
 public:
  explicit BorrowedQueue(cudaStream_t stream) : stream_(stream) {
    static const cuda::Device device = [] {
      int current = 0, major = 0, minor = 0;
      cuda::Device d{};
      cudaGetDevice(&current);
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, current);
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, current);
      cudaDeviceGetAttribute(&d.processors, cudaDevAttrMultiProcessorCount, current);
      cudaDeviceGetAttribute(&d.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, current);
      d.capability = 10 * major + minor;
      return d;
    }();
    device_ = &device;
  }

  void launch(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes, void** args,
              int cluster) override {
    static std::map<const void*, size_t> allowed;
    if (shared_bytes > 48 * 1024 && allowed[kernel] < shared_bytes) {
      note(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                int(shared_bytes)));
      allowed[kernel] = shared_bytes;
    }
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {unsigned(cluster), 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = grid, config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes, config.stream = stream_;
    config.attrs = &attribute, config.numAttrs = cluster > 1 ? 1 : 0;
    note(cudaLaunchKernelExC(&config, kernel, args));
  }
  // Freed behind the kernels that are launched next, as captured graphs allow.
  void* scratch(size_t bytes) override {
    void* p = nullptr;
    note(cudaMallocAsync(&p, bytes, stream_));
    if (count_ < kMost) scratch_[count_++] = p;
    return p;
  }
  const cuda::Device& device() const override { return *device_; }
  ~BorrowedQueue() override {
    for (int i = 0; i < count_; i++) note(cudaFreeAsync(scratch_[i], stream_));
  }
  cudaError_t status() const { return status_; }

 private:
  void note(cudaError_t status) {
    if (status_ == cudaSuccess) status_ = status;
  }
  static constexpr int kMost = 16;
  cudaStream_t stream_;
  const cuda::Device* device_;
  cudaError_t status_ = cudaSuccess;
  void* scratch_[kMost];
  int count_ = 0;
};

}  // namespace

// y[M, N] = x[M, K] @ w[N, K]^T, as plan() says. Returns a cudaError_t.
extern "C" int lowbit_product(int format, int dtype, int64_t M, int64_t N, int64_t K,
                              const void* codes, const void* scales, const void* biases,
                              const void* x, void* y, bool quantize_x, void* stream) {
  const FormatInfo& f = kFormats[format];
  cuda::Product p{};
  p.format = Format(format), p.transpose = true, p.quantize_x = quantize_x;
  p.dtype = Dtype(dtype);
  p.M = M, p.N = N, p.K = K;
  p.w = {static_cast<const uint8_t*>(codes),
         scales,
         biases,
         f.affine()           ? ScaleType(dtype)
         : f.group_size == 16 ? ScaleType::e4m3
                              : ScaleType::e8m0,
         f.group_size,
         1,
         N,
         K,
         K * f.bits / 8};
  p.x = x, p.y = y;
  p.pairs = p.x_matrices = 1;
  BorrowedQueue queue(static_cast<cudaStream_t>(stream));
  cuda::run(p, queue);
  return int(queue.status());
}
