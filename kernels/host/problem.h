// What a product is, without pointers: the plan functions take this and nothing else.
#pragma once

#include <cstdint>
#include <string_view>

namespace lowbit {

enum class Format : int {
#define FORMAT(name, type, mode, bits, group, judged) name,
#include "../formats/formats.def"
#undef FORMAT
  dense,  // unquantized rows of `Dtype`
};

struct FormatInfo {
  Format format;
  std::string_view name, mode;
  int bits, group_size;
  bool judged;
  constexpr bool affine() const { return mode == "affine"; }
};

inline constexpr FormatInfo kFormats[] = {
#define FORMAT(name, type, mode, bits, group, judged) \
  {Format::name, #name, #mode, bits, group, judged},
#include "../formats/formats.def"
#undef FORMAT
};
inline constexpr int kFormatCount = int(sizeof(kFormats) / sizeof(kFormats[0]));

enum class Dtype : int { f32, f16, bf16 };
enum class ScaleType : int { f32, f16, bf16, e8m0, e4m3 };

constexpr std::string_view name(Dtype d) {
  constexpr std::string_view names[] = {"float32", "float16", "bfloat16"};
  return names[int(d)];
}

struct Problem {
  Format format;                    // of w
  Dtype dtype;                      // of x and y
  Dtype dense_dtype;                // of w when format is dense
  int64_t M, N, K;                  // y[M, N] = x[M, K] @ w; for gather, the rows of one expert
  bool transpose;                   // w is [N, K]; otherwise [K, N]
  bool quantize_x;                  // qqmm: x is first quantized in w's format
  bool gather = false;              // pairs of matrices of x and w
  int64_t pairs = 0, matrices = 0;  // of a gather; matrices of w
};

// Who multiplies. Two-byte results that a GPU has no tensor-core kernel of ours for are left to
// MLX: its matmul (cuBLAS) over decoded operands is several times faster than plain float32
// arithmetic, and rounding weights once to the type of the result is within that type's bound;
// with x quantized both operands are exact.
enum class Route : int {
  kernel,   // ours
  decoded,  // MLX's matmul, after weights (and a quantized x) are decoded
  scaled,   // MLX's product of operands with block scales
};

}  // namespace lowbit
