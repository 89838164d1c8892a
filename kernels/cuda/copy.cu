// Rows of x from any strides, for products that want them one after the other.
#include "kernels.h"

namespace lowbit::cuda {

namespace {

template <class T>
__global__ void copy_kernel(const T* from, const __grid_constant__ Strided a, int64_t size,
                            T* to) {
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < size;
       i += int64_t(gridDim.x) * blockDim.x) {
    int64_t rest = i, at = 0;
    for (int d = a.dims - 1; d >= 0; d--) {
      at += rest % a.shape[d] * a.strides[d];
      rest /= a.shape[d];
    }
    to[i] = from[at];
  }
}

}  // namespace

void copy_rows(const void* from, const Strided& a, Dtype dtype, void* to, Queue& queue) {
  int64_t size = 1;
  for (int d = 0; d < a.dims; d++) size *= a.shape[d];
  const int64_t blocks = (size + 255) / 256, most = 8 * queue.device().processors;
  const dim3 grid(unsigned(blocks < most ? blocks : most));
  if (dtype == Dtype::f32)
    queue.run(copy_kernel<uint32_t>, grid, dim3(256), 0, 1, static_cast<const uint32_t*>(from),
              a, size, static_cast<uint32_t*>(to));
  else
    queue.run(copy_kernel<uint16_t>, grid, dim3(256), 0, 1, static_cast<const uint16_t*>(from),
              a, size, static_cast<uint16_t*>(to));
}

}  // namespace lowbit::cuda
