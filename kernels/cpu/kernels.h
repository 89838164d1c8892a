// What the driver (launch.cpp) and the kernels of one instruction set say to each other. Raw
// pointers and plain structs; compiled once without target flags and once per target.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../host/plan.h"

namespace lowbit::cpu {

// One [N, K] matrix of packed codes with its scales (or a dense one). Rows are the stored rows:
// for transpose=False they run along K of the product.
struct Matrix {
  const uint8_t* codes;
  const uint8_t* end;  // one past the last byte that may be read
  const void* scales;
  const void* biases;
  ScaleType scale_type;
  int group_size;
  int64_t rows, columns;  // stored rows, elements of a row
  int64_t row_bytes;
};

// Rows of activations; row i is x + index[i] * stride elements (i itself without an index).
struct Activations {
  const void* x;
  Dtype dtype;
  int64_t stride;
  const int64_t* index;
  int64_t count;
  Format quantize;     // round-trip through this format first; Format::dense: leave as it is
  float global_scale;  // nvfp4's global scale of x, or 0
};

// Row i of the result is y + index[i] * stride; y = alpha * sum + bias.
struct Result {
  void* y;
  Dtype dtype;
  int64_t stride;
  const int64_t* index;
  const void* bias;
  Dtype bias_dtype;
  float alpha;
};

// parallel_for of the thread pool: task(context, i, thread) for i in [0, count).
struct Pool {
  void (*run)(int64_t count, void (*task)(void*, int64_t, int), void* context);
  int threads;
  void* (*scratch)(size_t bytes);  // 64-byte aligned, owned by the caller until it asks again
};

template <class F>
void parallel_for(const Pool& pool, int64_t count, const F& f) {
  pool.run(
      count, [](void* c, int64_t i, int thread) { (*static_cast<const F*>(c))(i, thread); },
      const_cast<void*>(static_cast<const void*>(&f)));
}

struct Product {
  Format format;
  Dtype dense_dtype;  // of w when format is dense
  Matrix w;
  Activations x;
  Result y;
  bool transpose;
};

using ProductFn = void (*)(const Product&, const Plan&, const Pool&);

// Everything one instruction set offers.
struct Kernels {
  ProductFn matvec, matmul;
  // Quantizes `groups` groups of `w`; codes are packed, scales and biases stored.
  void (*quantize)(Format, const void* w, Dtype, int64_t groups, float global_scale,
                   uint8_t* codes, void* scales, void* biases);
  // Decodes rows [begin, end) of `w`, times alpha, to dtype.
  void (*dequantize)(Format, const Matrix& w, int64_t begin, int64_t end, float alpha,
                     void* out, Dtype);
  // Row <- decode(encode(row)), `columns` elements, without the global factor.
  void (*round_trip)(Format, Dtype, float* row, int64_t columns, float global_scale);
};

// One instruction set, with its row of the plan table (plan.cpp).
struct Target {
  const char* name;
  bool (*supported)();
  const Kernels& (*kernels)();
  Arithmetic bf16;              // arithmetic for bfloat16 and quantized x
  int64_t matvec_rows;          // largest M for matvec in float32 arithmetic
  int64_t matvec_rows_bf16;     // and in bfloat16 pairs
  int64_t matvec_rows_tiles;    // and with tiles, for the formats whose codes tiles take
  int64_t byte_tiles_from = 0;  // x rows from which integer codes go to byte tiles,
  int64_t byte_tile_rows = 0;   // and up to which
  int pairs_bits;               // narrowest codes for which pairs beat float32 lanes
  bool fixed_point = false;     // 16-bit x may meet integer codes in fixed point: beats lanes
  int64_t fixed_rows = 0;       // and pairs, up to this M,
  int fixed_bits = 0;           // from these codes on
  int64_t panel_bytes;          // of decoded weights a matmul task keeps at hand
  int row_block;                // rows of that panel
};

extern const Target kTargets[];
extern const int kTargetCount;

}  // namespace lowbit::cpu
