// The stored rows that one thread multiplies with tiles in one go; bfloat16 tiles and byte
// tiles share the order of its work.
//
//   for each     block of K, whose x stays in L1
//     for each   16 of the task's rows
//                  codes -> panel[16][k], in L1
//                  panel times x -> sums of these rows
//
// Panel, block of x, codes in work and codes on their way share the 48 KiB of L1. With blocks
// of 512, all of K before the next 16 rows and x in tiles of 16 columns they did not fit, and
// 16 x 512 codes took 2,900 (mxfp8) and 3,300 cycles (nvfp4) where decoding and products alone
// need 1,700 and 1,500; now 2,150 and 2,000. 4096 x 4096, M = 8, two cores of a Xeon with AMX,
// best of three rounds in turns, 2026-11-23, ms: mxfp8 1.14 -> 0.80, nvfp4 1.08 -> 0.72, 8-bit
// 1.02 -> 0.88, 3 and 4 bits as before; blocks of 128 gain nothing over 256.
#pragma once

#include "arena.h"
#include "groups.h"

LOWBIT_BEGIN

template <class Element>
struct TileTask {
  static constexpr int64_t kBlock = 256;                         // of K
  static constexpr int64_t kLd = kBlock + 64 / sizeof(Element);  // of a panel
  static constexpr int64_t kRows = 128;

  const cpu::Product& p;
  const int threads;
  const int64_t sums_of_16;  // floats
  const int bits = kFormats[int(p.format)].bits;
  const int64_t K = p.w.columns, N = p.w.rows;
  const int64_t room_groups = Groups::padded(K / p.w.group_size);
  // Many, so that a block of x serves many and the rows prefetched are this thread's next.
  const int64_t rows = least(up((N + threads * 4 - 1) / (threads * 4), 16), kRows);

  Element* panels = nullptr;  // per thread: [16][kLd]
  float* scales = nullptr;    // per thread: [row][scale, bias][room_groups]
  float* sums = nullptr;      // per thread: [row / 16][sums_of_16]

  void lay_out(Arena& a) {
    panels = a.take<Element>(threads * 16 * kLd);
    scales = a.take<float>(threads * rows * 2 * room_groups);
    sums = a.take<float>(threads * rows / 16 * sums_of_16);
  }

  // Stored rows [n0, n0 + rows), as many of them as there are; beyond the last row of W it is
  // multiplied again.
  //   decode(from, depth, row, k0, out)       codes [k0, k0 + depth) of a stored row
  //   multiply(panel, scale, sum, k0, depth)  of 16 rows; scales 2 * room_groups apart, biases
  //                                           room_groups behind them
  //   write(sum, n, count)                    stored rows [n, n + count)
  // offset: what codes are decoded less; no scales are read for `folded` ones.
  template <class Decode, class Multiply, class Write>
  void run(int64_t n0, int thread, float offset, bool folded, const Decode& decode,
           const Multiply& multiply, const Write& write) const {
    Element* panel = panels + thread * 16 * kLd;
    float* scale = scales + thread * rows * 2 * room_groups;
    float* sum = sums + thread * rows / 16 * sums_of_16;
    const int64_t count = least(N - n0, rows), padded = up(count, 16);
    const auto stored_row = [&](int64_t n) { return n0 + least(n, count - 1); };
    for (int64_t n = 0; n < padded && !folded; n++) {
      float* s = scale + n * 2 * room_groups;
      Groups{s, p.w.biases ? s + room_groups : nullptr}.read(p.w, stored_row(n), 0,
                                                             K / p.w.group_size, offset);
    }
    std::memset(sum, 0, size_t(padded / 16 * sums_of_16) * sizeof(float));
    for (int64_t k0 = 0; k0 < K; k0 += kBlock) {
      const int64_t depth = least(K - k0, kBlock);
      for (int64_t n = 0; n < padded; n += 16) {
        // What comes next: the rows after these, or the next block of the task's first.
        const int64_t ahead =
            n + 16 < padded ? 16 * p.w.row_bytes : kBlock * bits / 8 - n * p.w.row_bytes;
        for (int64_t i = 0; i < 16; i++) {
          const int64_t row = stored_row(n + i);
          const uint8_t* from = p.w.codes + row * p.w.row_bytes + k0 * bits / 8;
          for (int64_t line = 0; line < depth * bits / 8; line += 64)
            __builtin_prefetch(from + ahead + line);
          decode(from, depth, row, k0, panel + i * kLd);
        }
        multiply(panel, scale + n * 2 * room_groups + k0 / p.w.group_size,
                 sum + n / 16 * sums_of_16, k0, depth);
      }
    }
    for (int64_t n = 0; n < count; n += 16)
      write(sum + n / 16 * sums_of_16, n0 + n, least(count - n, 16));
  }
};

LOWBIT_END
