// The CUDA devices of this machine, as this build can use them. No MLX.
#pragma once

#include <cuda_runtime.h>

#include <string>

#include "plan.h"

namespace lowbit::cuda {

// Oldest compute capability with the instructions that the kernels are written in (cp.async,
// bfloat16 mma).
inline constexpr int kOldestCapability = 80;

// Why products cannot run on device `index`, or "" if they can. Asked once a device.
const std::string& refusal(int index);

// Of a device without refusal.
const Device& device(int index);
size_t total_memory(int index);

// Throws std::runtime_error naming the call, unless it succeeded.
void check(cudaError_t, const char* call);

}  // namespace lowbit::cuda
