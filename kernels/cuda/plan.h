// From a problem to how it runs on an NVIDIA GPU: pure, printable, tested without a device.
#pragma once

#include <string>

#include "../host/problem.h"

namespace lowbit::cuda {

// What a plan may know of a device.
struct Device {
  int capability;    // 90 for compute capability 9.0
  int processors;    // streaming multiprocessors
  int shared_bytes;  // shared memory a block may opt in to
};

struct Plan {
  enum class Kernel : int {
    matvec,  // weights stream once, tokens on the n side of mma.sync
    skinny,  // up to 32 tokens, all rows of a block along K together
    matmul,  // wgmma, weights decoded in registers
    simt,    // float32 arithmetic on the CUDA cores: every case the others leave
  } kernel;
  int tokens;   // rows of x in a tile
  int rows;     // stored rows of w in a tile
  int stages;   // of the shared memory ring
  int split_k;  // blocks of a cluster that share a tile, each with a part of K
};

// Whether rows of x can be sorted by matrix on the device (group.h).
constexpr bool groups(int64_t rows, int64_t matrices) {
  return rows > 0 && rows < (1 << 30) && matrices > 0 && matrices <= 6000;
}

Plan plan(const Problem&, const Device&);
// For addresses that skinny's copies cannot take, which a plan knows nothing of.
Plan plan_without_skinny(const Problem&, const Device&);
// It takes some rows of x, and weights that float16 holds, to make decoding worth it. Block
// scales are for cuBLASLt to multiply from compute capability 10 on, which takes no rows that
// are not whole vectors.
Route route(const Problem&, const Device&);
std::string describe(const Problem&, const Plan&, const Device&);

}  // namespace lowbit::cuda
