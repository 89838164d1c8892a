// What a backend owes. Arrays stop here: below `launch` there are pointers and plain structs.
#pragma once

#include <string>

#include "product.h"

namespace lowbit::cpu {

// Schedules the work on the stream of `out`'s primitive; returns at once. Inputs are evaluated
// and, but for a product's x, in row order; outputs are not yet allocated.
void launch(const ProductKind&, const ProductInputs&, mx::array& out, mx::Stream);
void launch_quantize(Format, const mx::array& w, const std::optional<mx::array>& global_scale,
                     std::vector<mx::array>& outputs, mx::Stream);
void launch_dequantize(Format, const mx::array& w, const mx::array& scales,
                       const std::optional<mx::array>& biases,
                       const std::optional<mx::array>& global_scale, mx::array& out,
                       mx::Stream);

}  // namespace lowbit::cpu

namespace lowbit {

// Device memory that a backend holds for results and scratch, in bytes.
struct MemoryUse {
  size_t active, peak, cached;
};

// A GPU backend, as its shared object hands it over. The three launches keep the contract of
// the CPU's above.
struct Backend {
  // LOWBIT_BUILD of the object: the versions and the hash of the headers that both sides were
  // compiled with. Compared before any other member is read, so it stays the first.
  const char* build;
  // Why this build cannot run on that device, or nothing.
  std::string (*refusal)(int device);
  size_t (*total_memory)(int device);
  MemoryUse (*memory_use)(int device);
  void (*launch)(const ProductKind&, const ProductInputs&, mx::array& out, mx::Stream);
  void (*launch_quantize)(Format, const mx::array& w,
                          const std::optional<mx::array>& global_scale,
                          std::vector<mx::array>& outputs, mx::Stream);
  void (*launch_dequantize)(Format, const mx::array& w, const mx::array& scales,
                            const std::optional<mx::array>& biases,
                            const std::optional<mx::array>& global_scale, mx::array& out,
                            mx::Stream);
  // Whether the plan of a product on that device uses tensor cores.
  bool (*on_tensor_cores)(const Problem&, int device);
  // Who multiplies on that device.
  Route (*route)(const Problem&, int device);
  // The plan of a product on that device, in words.
  std::string (*explain)(const Problem&, int device);
};

// The one function that the shared object exports, and its name.
using BackendFunction = const Backend*();
inline constexpr const char* kCudaBackendFunction = "lowbit_cuda_backend";

// Loads the CUDA backend from `path`, once in a process; later calls do nothing. Throws
// std::runtime_error that says what is wrong with the object.
void load_cuda(const std::string& path);
bool cuda_loaded();
// The GPU backend. Throws std::runtime_error when none is loaded.
const Backend& gpu();

}  // namespace lowbit
