// What the driver (launch.cpp) and the kernels say to each other: device pointers, plain
// structs and a queue. No MLX: the kernels can be built and run without it.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "plan.h"

namespace lowbit::cuda {

// `matrices` packed matrices [rows, columns], one after the other, with their scales. Rows are
// the stored rows: for transpose=False they run along K of the product.
struct Weights {
  const uint8_t* codes;
  const void* scales;
  const void* biases;  // affine only
  ScaleType scale_type;
  int group_size;
  int64_t matrices, rows, columns, row_bytes;
};

// y[M, N] = alpha * (x[M, K] @ w) + bias, or pairs of such products when `rhs` is set: pair i
// multiplies x matrix lhs[i] with w matrix rhs[i] into y matrix i.
struct Product {
  Format format;
  bool transpose;   // w is [N, K]; otherwise [K, N]
  bool quantize_x;  // x goes through w's format first
  Dtype dtype;      // of x and y
  int64_t M, N, K;
  Weights w;
  const void* x;
  void* y;
  const void* bias;  // [N], for pairs [matrices, N]
  Dtype bias_dtype;
  const float* global_x;  // nvfp4's global scales, on the device; alpha is their product over
  const float* global_w;  // 2688 each. For pairs global_w may have one value a matrix.
  int64_t global_w_count;
  const int64_t* lhs;
  const int64_t* rhs;
  int64_t pairs, x_matrices;
  bool lane_order;  // of x, which then has lane_order_columns(K) columns: lane_order.h
};

// Whoever runs kernels, in order: MLX's command encoder, or a plain stream in the checks.
class Queue {
 public:
  virtual ~Queue() = default;
  // `args`: the address of each kernel parameter; parameters are copied before this returns.
  virtual void launch(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes,
                      void** args, int cluster) = 0;
  // Device memory that lives until what is launched on this queue so far and next is done.
  virtual void* scratch(size_t bytes) = 0;
  virtual const Device& device() const = 0;

  template <class... Parameters, class... Args>
  void run(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
           int cluster, Args... values) {
    launch_with(kernel, grid, block, shared_bytes, cluster, Parameters(values)...);
  }

 private:
  template <class... Parameters>
  void launch_with(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                   int cluster, Parameters... values) {
    void* args[] = {const_cast<void*>(static_cast<const void*>(&values))...};
    launch(reinterpret_cast<const void*>(kernel), grid, block, shared_bytes, args, cluster);
  }
};

// An array that is not in row order: `dims` dimensions, strides in elements.
struct Strided {
  static constexpr int kDims = 10;
  int dims;
  int64_t shape[kDims], strides[kDims];
};
// Its elements in row order.
void copy_rows(const void* from, const Strided&, Dtype, void* to, Queue&);

// A product as plan() says, or as this plan does: x quantized first where it has to be.
void run(const Product&, Queue&);
void run(const Product&, const Plan&, Queue&);

// Products, one function a kernel file. Each takes what plan() hands it and nothing else.
void matvec(const Product&, const Plan&, Queue&);
void skinny(const Product&, const Plan&, Queue&);
void matmul(const Product&, const Plan&, Queue&);
void simt(const Product&, const Plan&, Queue&);

// `groups` groups of w: codes are packed, scales and biases stored; bit for bit mx.quantize.
void quantize(Format, const void* w, Dtype, int64_t groups, const float* global_scale,
              uint8_t* codes, void* scales, void* biases, Queue&);
// `groups` groups of bfloat16 x as a block format holds them, in bfloat16, which it does
// exactly; without the factor of the global scale. out begins at a multiple of 16 bytes.
void round_trip(Format, const void* x, int64_t groups, const float* global_scale, void* out,
                Queue&);
// The same of `rows` rows of K, which come out in lane order.
void round_trip_to_lanes(Format, const void* x, int64_t rows, int64_t K,
                         const float* global_scale, void* out, Queue&);
// The values of rows * columns codes, times global_scale / 2688 if there is one.
void dequantize(Format, const Weights&, const float* global_scale, void* out, Dtype, Queue&);

}  // namespace lowbit::cuda
