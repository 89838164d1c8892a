// What the host and the kernels say to each other: this file is read by both, as C++ and as the
// Metal Shading Language. Buffer indices, function constants and the constant structs.
#pragma once

#if defined(__METAL_VERSION__)
#include <metal_stdlib>
#define LOWBIT_INT64 long
#else
#include <cstdint>
#define LOWBIT_INT64 int64_t
#endif

namespace lowbit {
namespace metal_args {

// Buffers of every product. Absent ones are not bound; the function constants say so.
enum Buffer : int {
  kArgs = 0,     // ProductArgs
  kX = 1,        // [x_matrices, M, K] in row order
  kW = 2,        // words of the packed matrices, [matrices, N, K * bits / 32]
  kScales = 3,   // [matrices, N, K / group size]
  kBiases = 4,   // affine: as the scales
  kBias = 5,     // [N]; of pairs [matrices, N]
  kGlobalX = 6,  // float, one
  kGlobalW = 7,  // float, one; of pairs one or [matrices]
  kLhs = 8,      // long [pairs], into x's matrices
  kRhs = 9,      // long [pairs], into w's
  kY = 10,       // [pairs or 1, M, N] in row order
  kGroups = 11,  // what `group` wrote: see GroupArgs
};

// Function constants. Types are numbers of lowbit::Dtype and lowbit::ScaleType.
enum Constant : int {
  kYType = 0,       // int: Dtype of y
  kScaleType = 1,   // int: ScaleType of scales and biases (affine)
  kBiasType = 2,    // int: Dtype of bias, or -1 for none
  kHasGlobalX = 3,  // bool
  kHasGlobalW = 4,  // bool
  kGather = 5,      // bool: pairs of matrices of x and w
  kGrouped = 6,     // bool: rows of pairs were put in order by `group` (matmul)
};

// y[M, N] = alpha * (x[M, K] @ w^T) + bias, or `pairs` of such products: pair i multiplies x
// matrix lhs[i] with w matrix rhs[i] into y matrix i. A pair whose index is out of range gives
// NaN. Sizes of one matrix fit an int; offsets into stacks need LOWBIT_INT64.
struct ProductArgs {
  int M, N, K;
  int pairs;  // 1 without gather
  int x_matrices, w_matrices;
  int global_w_count;  // 0, 1 or w_matrices
};

// Rows of all pairs, sorted by matrix of w: `order` [rows] (row of all pairs, pair * M + m),
// then `starts` [w_matrices + 2]: where each matrix's rows begin; the last group holds the rows
// of pairs whose rhs is out of range. All int.
struct GroupArgs {
  int M, pairs, w_matrices;
};

// quantize, dequantize and the round trip of x: `groups` groups of elements.
struct QuantizeArgs {
  LOWBIT_INT64 groups;
};
enum QuantizeBuffer : int {
  kQArgs = 0,
  kQValues = 1,  // floats of T: what is encoded, or what decoding writes
  kQCodes = 2,   // words
  kQScales = 3,
  kQBiases = 4,
  kQGlobal = 5,  // float, one (nvfp4)
};

}  // namespace metal_args
}  // namespace lowbit
