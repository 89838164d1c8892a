// Operands on the device, with nothing readable (or only NaN) around them.
#pragma once

#include <algorithm>

#include "stream_queue.h"

namespace lowbit::check {

// Hands out device memory for one case at a time. Exact: every operand is an allocation of its
// very size, so that memcheck sees each byte beyond it. Otherwise operands are slices of one
// block, with NaN on both sides, whose far side is looked at afterwards.
class DeviceMemory {
 public:
  explicit DeviceMemory(bool exact) : exact_(exact) {
    if (!exact) require(cudaMalloc(&block_, kBlock), "cudaMalloc");
  }
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;
  ~DeviceMemory() {
    reset();
    cudaFree(block_);
  }

  // `bytes` bytes of NaN that begin `offset` bytes after an address that is a multiple of 256.
  void* make(size_t bytes, size_t offset, cudaStream_t stream) {
    char* p = nullptr;
    if (exact_) {
      require(cudaMalloc(&p, bytes + offset), "cudaMalloc");
      own_.push_back(p);
      require(cudaMemsetAsync(p, 0xff, bytes + offset, stream), "cudaMemset");
      return p + offset;
    }
    const size_t whole = (bytes + offset + 255) / 256 * 256 + 2 * kBorder;
    if (used_ + whole > kBlock) throw std::runtime_error("a case needs more than the block");
    p = static_cast<char*>(block_) + used_;
    used_ += whole;
    require(cudaMemsetAsync(p, 0xff, whole, stream), "cudaMemset");
    return p + kBorder + offset;
  }

  template <class T>
  T* copy(const std::vector<T>& from, size_t offset, cudaStream_t stream) {
    if (from.empty()) return nullptr;
    const size_t bytes = from.size() * sizeof(T);
    void* p = make(bytes, offset, stream);
    require(cudaMemcpyAsync(p, from.data(), bytes, cudaMemcpyHostToDevice, stream), "copy");
    return static_cast<T*>(p);
  }

  // What make() gave, and false if something was written up to 256 bytes beyond it.
  bool fetch(const void* p, std::vector<uint8_t>& to, cudaStream_t stream) {
    const size_t border = exact_ ? 0 : kBorder, bytes = to.size();
    std::vector<uint8_t> all(bytes + 2 * border);
    require(cudaMemcpyAsync(all.data(), static_cast<const char*>(p) - border, all.size(),
                            cudaMemcpyDeviceToHost, stream),
            "copy");
    require(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
    std::copy_n(all.begin() + long(border), bytes, to.begin());
    const auto untouched = [](uint8_t b) { return b == 0xff; };
    return std::all_of(all.begin(), all.begin() + long(border), untouched) &&
           std::all_of(all.end() - long(border), all.end(), untouched);
  }

  void reset() {
    for (void* p : own_) cudaFree(p);
    own_.clear();
    used_ = 0;
  }

 private:
  static constexpr size_t kBlock = size_t(256) << 20, kBorder = 256;
  bool exact_;
  void* block_ = nullptr;
  size_t used_ = 0;
  std::vector<void*> own_;
};

}  // namespace lowbit::check
