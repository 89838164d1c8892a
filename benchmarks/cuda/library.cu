// The CUDA kernels without MLX, for timing on a stream of someone else's (torch's, so that its
// CUDA graphs capture them). Built as `lowbit_cuda_library`; called through ctypes.
#include <algorithm>
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
  // From memory that stays, since calls follow each other on one stream. It grows at a first
  // call, which no graph captures; what it outgrows is left to those who have it.
  void* scratch(size_t bytes) override {
    static char* block = nullptr;
    static size_t size = 0;
    bytes = (bytes + 255) / 256 * 256;
    if (used_ + bytes > size) {
      size = std::max(2 * size, 2 * bytes), used_ = 0;
      note(cudaMalloc(&block, size));
    }
    used_ += bytes;
    return block + used_ - bytes;
  }
  const cuda::Device& device() const override { return *device_; }
  cudaError_t status() const { return status_; }

 private:
  void note(cudaError_t status) {
    if (status_ == cudaSuccess) status_ = status;
  }
  cudaStream_t stream_;
  const cuda::Device* device_;
  cudaError_t status_ = cudaSuccess;
  size_t used_ = 0;
};

// One matrix or several.
cuda::Weights weights(const FormatInfo& f, Dtype dtype, int64_t matrices, int64_t N, int64_t K,
                      const void* codes, const void* scales, const void* biases) {
  const ScaleType type = f.affine()           ? ScaleType(int(dtype))
                         : f.group_size == 16 ? ScaleType::e4m3
                                              : ScaleType::e8m0;
  return {static_cast<const uint8_t*>(codes),
          scales,
          biases,
          type,
          f.group_size,
          matrices,
          N,
          K,
          K * f.bits / 8};
}

int run(const cuda::Product& p, void* stream) {
  BorrowedQueue queue(static_cast<cudaStream_t>(stream));
  cuda::run(p, queue);
  return int(queue.status());
}

}  // namespace

// y[M, N] = x[M, K] @ w[N, K]^T, as plan() says. Returns a cudaError_t.
extern "C" int lowbit_product(int format, int dtype, int64_t M, int64_t N, int64_t K,
                              const void* codes, const void* scales, const void* biases,
                              const void* x, void* y, bool quantize_x, void* stream) {
  cuda::Product p{};
  p.format = Format(format), p.transpose = true, p.quantize_x = quantize_x;
  p.dtype = Dtype(dtype);
  p.M = M, p.N = N, p.K = K;
  p.w = weights(kFormats[format], p.dtype, 1, N, K, codes, scales, biases);
  p.x = x, p.y = y;
  p.pairs = p.x_matrices = 1;
  return run(p, stream);
}

// y[pairs, N]: row lhs[i] of x[rows, K] times matrix rhs[i] of w[matrices, N, K], transposed.
extern "C" int lowbit_gather_product(int format, int dtype, int64_t pairs, int64_t rows,
                                     int64_t matrices, int64_t N, int64_t K, const void* codes,
                                     const void* scales, const void* biases, const void* x,
                                     const int64_t* lhs, const int64_t* rhs, void* y,
                                     bool quantize_x, void* stream) {
  cuda::Product p{};
  p.format = Format(format), p.transpose = true, p.quantize_x = quantize_x;
  p.dtype = Dtype(dtype);
  p.M = 1, p.N = N, p.K = K;
  p.w = weights(kFormats[format], p.dtype, matrices, N, K, codes, scales, biases);
  p.x = x, p.y = y, p.lhs = lhs, p.rhs = rhs;
  p.pairs = pairs, p.x_matrices = rows;
  return run(p, stream);
}

// w[groups * group size] to codes, scales and biases, or back.
extern "C" int lowbit_quantize(int format, int dtype, int64_t groups, void* w, void* codes,
                               void* scales, void* biases, bool back, void* stream) {
  BorrowedQueue queue(static_cast<cudaStream_t>(stream));
  const Dtype type = Dtype(dtype);
  const int64_t count = groups * kFormats[format].group_size;
  if (back)
    cuda::dequantize(Format(format),
                     weights(kFormats[format], type, 1, 1, count, codes, scales, biases),
                     nullptr, w, type, queue);
  else
    cuda::quantize(Format(format), w, type, groups, nullptr, static_cast<uint8_t*>(codes),
                   scales, biases, queue);
  return int(queue.status());
}
