// What a backend owes. Arrays stop here: below `launch` there are pointers and plain structs.
#pragma once

#include <stdexcept>
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

// Device memory that a backend holds for results and scratch, in bytes, and MLX does not count.
struct MemoryUse {
  size_t active, cached;
  size_t peak;  // `active` and MLX's own together, the most when the backend took some
};

// A GPU backend, as it hands itself over. The three launches keep the contract of the CPU's
// above.
struct Backend {
  // LOWBIT_BUILD of the object: the versions and the hash of the headers that both sides were
  // compiled with. Compared before any other member is read, so it stays the first.
  const char* build;
  // Why this build cannot run on that device, or nothing.
  std::string (*refusal)(int device);
  size_t (*total_memory)(int device);
  MemoryUse (*memory_use)(int device);
  void (*reset_peak)(int device);
  void (*launch)(const ProductKind&, const ProductInputs&, mx::array& out, mx::Stream);
  void (*launch_quantize)(Format, const mx::array& w,
                          const std::optional<mx::array>& global_scale,
                          std::vector<mx::array>& outputs, mx::Stream);
  void (*launch_dequantize)(Format, const mx::array& w, const mx::array& scales,
                            const std::optional<mx::array>& biases,
                            const std::optional<mx::array>& global_scale, mx::array& out,
                            mx::Stream);
  // CacheStep's (cache_step.h): whether it takes so many heads of queries for one of keys, of
  // so many dims, and its launch, where outputs but y already share the memory of inputs. Null
  // where MLX's own operations serve.
  bool (*takes_cache_step)(int share, int dims, Dtype);
  void (*cache_step)(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs,
                     int offset, float scale, mx::Stream);
  // Compiles what a product, or Quantize (encode) and Dequantize of a dtype, will launch. For
  // backends that compile when they run; elsewhere null. Throws KernelRefused.
  void (*prepare)(const Problem&, int device);
  void (*prepare_elements)(Format, Dtype, bool encode, int device);
  // Whether x may have any strides; otherwise it is put in row order first.
  bool takes_strides;
  // Whether the plan of a product on that device uses tensor cores.
  bool (*on_tensor_cores)(const Problem&, int device);
  // Who multiplies on that device.
  Route (*route)(const Problem&, int device);
  // The plan of a product on that device, in words.
  std::string (*explain)(const Problem&, int device);
};

// What the device's own compiler said of a kernel that it would not compile.
struct KernelRefused : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The one function that the shared object exports, and its name.
using BackendFunction = const Backend*();
inline constexpr const char* kCudaBackendFunction = "lowbit_cuda_backend";
// The Metal backend belongs to the extension where that was built for macOS.
inline constexpr bool kHasMetal =
#ifdef LOWBIT_METAL
    true;
#else
    false;
#endif
const Backend* metal_backend();

// Loads the CUDA backend from `path`, once in a process; later calls do nothing. Throws
// std::runtime_error that says what is wrong with the object.
void load_cuda(const std::string& path);
bool gpu_loaded();
// The GPU backend. Throws std::runtime_error when none is loaded.
const Backend& gpu();

}  // namespace lowbit
