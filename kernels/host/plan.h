// From a problem to how it runs: pure, printable, tested without a device.
#pragma once

#include <string>

#include "problem.h"

namespace lowbit::cpu {

enum class Arithmetic : int { f32, bf16_pairs, tiles, fixed_point, byte_tiles };

// One product on the CPU, as its kernels take it.
struct Plan {
  enum class Kernel : int { matvec, matmul } kernel;
  Arithmetic arithmetic;
  int row_block;    // stored rows a task handles
  int64_t k_block;  // elements of K in a decoded panel (matmul)
  int64_t m_block;  // rows of x packed at a time (matmul)
};

struct Target;

Plan plan(const Problem&, const Target&);

// "matmul, tiles (bfloat16 in, float32 sums), target amx, 2 threads, ...": for explain().
std::string describe(const Problem&, const Plan&, const Target&, int threads);

// The plan of this process for a problem, in words.
std::string explain(const Problem&);

// The target that products run on: the best that this processor supports, or the one named by
// MLX_LOWBIT_TARGET.
const Target& target();
const Target* find_target(std::string_view name);

}  // namespace lowbit::cpu
