// Device memory for results and scratch: MLX's own for large results, and for the rest a free
// list in front of cudaMallocAsync.
//
// MLX's asynchronous allocator is not exported from its library, and what mlx::core::allocator
// hands out is managed memory, which a kernel on the GPU must not write.
//
// Contract of the list. A block goes back to it when the last owner of its Data lets go.
// Whoever takes one gives the Data to the stream's command encoder as a temporary (launch.cpp
// does, for results too): the encoder lets go when the work that it was given by then is done,
// and readers on other streams hold the array until theirs is. So nothing on any stream still
// uses a block of the list, and any stream and thread may take it. Blocks return on whatever
// thread lets go last.
#pragma once

#include <cuda_runtime.h>

#include "../host/backend.h"
#include "mlx/array.h"

namespace lowbit::cuda {

// At least `bytes` of memory of `device`, for work on `stream`, aligned to 256 bytes. The
// calling thread's current device must be `device`. Throws std::runtime_error when there is not
// enough.
mlx::core::allocator::Data take(size_t bytes, int device, cudaStream_t stream);

// From so many bytes on a result has memory of MLX's.
inline constexpr size_t kLarge = 2 << 20;

// Gives `out` memory from MLX's allocator for GPUs, which counts and caches it, and lets an
// operation that reads a result last write its own there. Throws as `take` does.
//
// The way to that allocator which MLX does not hide: a concatenation of no arrays allocates
// its result and launches nothing. It leaves an empty node in the encoder's graph, though: the
// small results of a decode step, which waits for the host, do without. On an H200 (2026-11-30)
// the prompts of a 4-bit decoder of 36 layers took 12.0 GB (2,048 tokens) and 24.6 GB (16 times
// 2,048) so, and 15.3 and 31.3 GB with all results in the list.
void take_of_mlx(mlx::core::array& out, int device, mlx::core::Stream stream);

MemoryUse memory_use(int device);
void reset_peak(int device);

}  // namespace lowbit::cuda
