// Device memory for results and scratch: a free list in front of cudaMallocAsync.
//
// MLX's own asynchronous allocator is not exported from its library, and what
// mlx::core::allocator hands out is managed memory, which a kernel on the GPU must not write.
//
// Contract. A block goes back to the list when the last owner of its Data lets go. Whoever
// takes one gives the Data to the stream's command encoder as a temporary (launch.cpp does, for
// results too): the encoder lets go when the work that it was given by then is done, and
// readers on other streams hold the array until theirs is. So nothing on any stream still uses
// a block of the list, and any stream and thread may take it. Blocks return on whatever thread
// lets go last.
#pragma once

#include <cuda_runtime.h>

#include "../host/backend.h"
#include "mlx/allocator.h"

namespace lowbit::cuda {

// At least `bytes` of memory of `device`, for work on `stream`, aligned to 256 bytes. The
// calling thread's current device must be `device`. Throws std::runtime_error when there is not
// enough.
mlx::core::allocator::Data take(size_t bytes, int device, cudaStream_t stream);

MemoryUse memory_use(int device);

}  // namespace lowbit::cuda
