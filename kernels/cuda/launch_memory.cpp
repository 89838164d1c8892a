#include "launch_memory.h"

#include <algorithm>
#include <bit>
#include <deque>
#include <mutex>
#include <stdexcept>
#include <unordered_map>
#include <vector>

#include "device.h"
#include "mlx/backend/cuda/allocator.h"
#include "mlx/memory.h"
#include "mlx/ops.h"

namespace lowbit::cuda {

namespace {

// The struct travels with its memory through the list: MLX's encoder knows a buffer by the
// address of its CudaBuffer.
struct Block : mx::cu::CudaBuffer {
  int home;            // device; CudaBuffer's becomes -1 when the host has read the array
  size_t capacity;     // bytes at `data`; `size` is what was asked for
  uint64_t given = 0;  // when it came back to the list: a count of such events
};

// Eight sizes to a factor of two, so that requests which differ a little share blocks and at
// most an eighth is wasted.
size_t size_class(size_t bytes) {
  constexpr size_t kLeast = 512;
  if (bytes <= kLeast) return kLeast;
  const size_t step = std::max(kLeast, std::bit_floor(bytes - 1) / 8);
  return (bytes + step - 1) / step * step;
}

[[noreturn]] void refuse(size_t bytes, int device, const char* reason) {
  throw std::runtime_error("[lowbit] unable to allocate " + std::to_string(bytes) +
                           " bytes on CUDA device " + std::to_string(device) + ": " + reason);
}

class Pool {
 public:
  explicit Pool(int device) : device_(device) {}

  Block* take(size_t bytes, cudaStream_t stream) {
    const size_t capacity = size_class(bytes);
    Block* block = reuse(capacity);
    if (!block) block = allocate(capacity, stream);
    block->size = bytes;
    block->device = device_;
    return block;
  }

  void give(Block* block) {
    if (block->device < 0) return moved(block);
    std::vector<Block*> old;
    {
      const std::lock_guard lock(mutex_);
      use_.active -= block->capacity;
      use_.cached += block->capacity;
      block->given = ++events_;
      free_[block->capacity].push_back(block);
      while (use_.cached > limit()) old.push_back(oldest());
    }
    for (Block* each : old) release(each);
  }

  // Gives back all that the lists of this package and of MLX hold. Waits, which only a program
  // that is out of memory does.
  void trim() {
    std::vector<Block*> blocks;
    {
      const std::lock_guard lock(mutex_);
      for (auto& [capacity, list] : free_) {
        blocks.insert(blocks.end(), list.begin(), list.end());
        list.clear();
      }
      use_.cached = 0;
    }
    for (Block* block : blocks) release(block);
    mx::clear_cache();
    cudaDeviceSynchronize();
  }

  MemoryUse use() {
    const std::lock_guard lock(mutex_);
    return use_;
  }

  void reset_peak() {
    const std::lock_guard lock(mutex_);
    use_.peak = 0;
  }

 private:
  // What a list may hold back from MLX and others. Above it the oldest blocks go, not the one
  // that came last: else the sizes of a long prompt fill the list, and every token after it
  // pays for cudaMallocAsync and cudaFreeAsync.
  size_t limit() const { return total_memory(device_) / 32; }

  // Out of the list, which is not empty.
  Block* oldest() {
    std::deque<Block*>* from = nullptr;
    for (auto& [capacity, list] : free_)
      if (!list.empty() && (!from || list.front()->given < from->front()->given)) from = &list;
    Block* block = from->front();
    from->pop_front();
    use_.cached -= block->capacity;
    return block;
  }

  void count(size_t capacity) {
    use_.active += capacity;
    use_.peak = std::max(use_.peak, use_.active + mx::get_active_memory());
  }

  Block* reuse(size_t capacity) {
    const std::lock_guard lock(mutex_);
    const auto found = free_.find(capacity);
    if (found == free_.end() || found->second.empty()) return nullptr;
    Block* block = found->second.back();
    found->second.pop_back();
    use_.cached -= capacity;
    count(capacity);
    return block;
  }

  Block* allocate(size_t capacity, cudaStream_t stream) {
    void* data = nullptr;
    cudaError_t error = cudaMallocAsync(&data, capacity, stream);
    if (error == cudaErrorMemoryAllocation) {
      cudaGetLastError();
      trim();
      error = cudaMallocAsync(&data, capacity, stream);
    }
    if (error != cudaSuccess) {
      cudaGetLastError();
      refuse(capacity, device_, cudaGetErrorString(error));
    }
    auto* block = new Block{{data, capacity, device_}, device_, capacity};
    const std::lock_guard lock(mutex_);
    count(capacity);
    return block;
  }

  // No work uses the block: its memory may go on a stream that has nothing to do with it.
  void release(Block* block) {
    cudaStream_t stream = nullptr;
    int before = -1;
    if (cudaGetDevice(&before) == cudaSuccess && before != device_) cudaSetDevice(device_);
    {
      const std::lock_guard lock(mutex_);
      if (!stream_) cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking);
      stream = stream_;
    }
    // At the end of a process the driver may be gone before the last array: nothing to do then.
    cudaFreeAsync(block->data, stream);
    cudaGetLastError();
    if (before >= 0 && before != device_) cudaSetDevice(before);
    delete block;
  }

  // The host has read the array: MLX moved it to memory of its own kind and freed ours.
  void moved(Block* block) {
    {
      const std::lock_guard lock(mutex_);
      use_.active -= block->capacity;
    }
    cudaPointerAttributes attributes{};
    if (cudaPointerGetAttributes(&attributes, block->data) == cudaSuccess) {
      if (attributes.type == cudaMemoryTypeHost)
        cudaFreeHost(block->data);
      else
        cudaFree(block->data);
    }
    cudaGetLastError();
    delete block;
  }

  const int device_;
  std::mutex mutex_;
  std::unordered_map<size_t, std::deque<Block*>> free_;  // the last to come at the back
  uint64_t events_ = 0;
  MemoryUse use_{};
  cudaStream_t stream_ = nullptr;
};

// Never destroyed: arrays may outlive static objects.
Pool& pool(int device) {
  static std::mutex mutex;
  static auto& pools = *new std::unordered_map<int, Pool*>;
  const std::lock_guard lock(mutex);
  Pool*& found = pools[device];
  if (!found) found = new Pool(device);
  return *found;
}

void give_back(mx::allocator::Buffer buffer) {
  auto* block = static_cast<Block*>(static_cast<mx::cu::CudaBuffer*>(buffer.ptr()));
  if (block) pool(block->home).give(block);
}

mx::Primitive& concatenation(mx::Stream stream) {
  static thread_local std::unordered_map<int, std::shared_ptr<mx::Primitive>> known;
  auto& found = known[stream.index];
  if (!found) {
    const mx::array part({0.0f});
    found = mx::concatenate({part, part}, 0, stream).primitive_ptr();
  }
  return *found;
}

}  // namespace

mx::allocator::Data take(size_t bytes, int device, cudaStream_t stream) {
  mx::cu::CudaBuffer* buffer = pool(device).take(bytes, stream);
  return {mx::allocator::Buffer(buffer), give_back};
}

void take_of_mlx(mx::array& out, int device, mx::Stream stream) {
  std::vector<mx::array> outputs{out};
  try {
    concatenation(stream).eval_gpu({}, outputs);
  } catch (const std::exception&) {
    pool(device).trim();
    try {
      concatenation(stream).eval_gpu({}, outputs);
    } catch (const std::exception& error) {
      refuse(out.nbytes(), device, error.what());
    }
  }
}

MemoryUse memory_use(int device) { return pool(device).use(); }

void reset_peak(int device) { pool(device).reset_peak(); }

}  // namespace lowbit::cuda
