#include "backend.h"

#include <dlfcn.h>

#include <atomic>
#include <mutex>
#include <stdexcept>

namespace lowbit {

namespace {

const Backend* of_extension() {
#ifdef LOWBIT_METAL
  return metal_backend();
#else
  return nullptr;
#endif
}

std::atomic<const Backend*> loaded{of_extension()};

}  // namespace

void load_cuda(const std::string& path) {
  static std::mutex mutex;
  const std::lock_guard lock(mutex);
  if (loaded) return;
  // Never closed again: kernels and the deleters of arrays live in it.
  void* object = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!object) throw std::runtime_error(std::string("the loader said: ") + dlerror());
  const auto function = reinterpret_cast<BackendFunction*>(dlsym(object, kCudaBackendFunction));
  if (!function)
    throw std::runtime_error(path + " is no CUDA part of mlx_lowbit: it has no function " +
                             kCudaBackendFunction);
  const Backend* backend = function();
  if (std::string(LOWBIT_BUILD) != backend->build)
    throw std::runtime_error(path + " belongs to another build of mlx_lowbit: expected \"" +
                             LOWBIT_BUILD + "\", got \"" + backend->build + "\"");
  loaded = backend;
}

bool gpu_loaded() { return loaded != nullptr; }

const Backend& gpu() {
  const Backend* backend = loaded;
  if (!backend)
    throw std::runtime_error("[lowbit] this process has no GPU kernels of mlx_lowbit loaded");
  return *backend;
}

}  // namespace lowbit
