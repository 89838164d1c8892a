#include <array>
#include <mutex>
#include <optional>
#include <sstream>
#include <stdexcept>

#include "device.h"

namespace lowbit::cuda {

namespace {

// Tells whether this build holds code that a device can run.
__global__ void present() {}

struct Known {
  Device device{};
  size_t memory = 0;
  std::string refusal;
};

std::string version(int v) {
  return std::to_string(v / 1000) + "." + std::to_string(v % 1000 / 10);
}

int attribute(cudaDeviceAttr which, int index) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, index), "cudaDeviceGetAttribute");
  return value;
}

Known inspect(int index) {
  Known known;
  const auto refuse = [&](const auto&... parts) {
    std::ostringstream text;
    (text << ... << parts);
    known.refusal = text.str();
    cudaGetLastError();  // an error of these questions is no error of a later kernel
    return known;
  };
  int driver = 0, runtime = 0, count = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0)
    return refuse("no NVIDIA driver");
  cudaRuntimeGetVersion(&runtime);
  if (const cudaError_t error = cudaGetDeviceCount(&count); error != cudaSuccess) {
    if (error == cudaErrorInsufficientDriver)
      return refuse("the NVIDIA driver supports CUDA ", version(driver),
                    ", this build was made with CUDA ", version(runtime));
    return refuse("no usable NVIDIA GPU: ", cudaGetErrorString(error));
  }
  if (index < 0 || index >= count)
    return refuse("there is no CUDA device ", index, ", this machine has ", count);
  const int capability = attribute(cudaDevAttrComputeCapabilityMajor, index) * 10 +
                         attribute(cudaDevAttrComputeCapabilityMinor, index);
  const auto dotted = [](int c) {
    return std::to_string(c / 10) + "." + std::to_string(c % 10);
  };
  if (capability < kOldestCapability)
    return refuse("compute capability ", dotted(capability), " is below ",
                  dotted(kOldestCapability), ", the oldest with kernels");
  int before = 0;
  check(cudaGetDevice(&before), "cudaGetDevice");
  check(cudaSetDevice(index), "cudaSetDevice");
  cudaFuncAttributes attributes{};
  const cudaError_t error = cudaFuncGetAttributes(&attributes, present);
  size_t free = 0, total = 0;
  const cudaError_t counted = cudaMemGetInfo(&free, &total);
  cudaSetDevice(before);
  if (error != cudaSuccess)
    return refuse("this build has no code for compute capability ", dotted(capability), " (",
                  cudaGetErrorString(error), ")");
  if (!attribute(cudaDevAttrMemoryPoolsSupported, index))
    return refuse("the device has no memory pools (cudaMallocAsync)");
  check(counted, "cudaMemGetInfo");
  known.memory = total;
  known.device = {capability, attribute(cudaDevAttrMultiProcessorCount, index),
                  attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, index)};
  return known;
}

const Known& known(int index) {
  constexpr int kMost = 64;
  static std::mutex mutex;
  static std::array<std::optional<Known>, kMost> devices;
  static const Known none{{}, 0, "no such CUDA device"};
  if (index < 0 || index >= kMost) return none;
  const std::lock_guard lock(mutex);
  if (!devices[size_t(index)]) devices[size_t(index)] = inspect(index);
  return *devices[size_t(index)];
}

}  // namespace

const std::string& refusal(int index) { return known(index).refusal; }
const Device& device(int index) { return known(index).device; }
size_t total_memory(int index) { return known(index).memory; }

void check(cudaError_t error, const char* call) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string("[lowbit] ") + call +
                           " failed: " + cudaGetErrorString(error));
}

}  // namespace lowbit::cuda
