// AMX tiles: eight registers of 16 rows of 64 bytes. A product adds A (16 rows of 32 bfloat16
// along K) times B (16 pairs along K, each with 16 columns) to C (16 x 16 float32).
//
// With LOWBIT_EMULATE_TILES the same names run in plain C++, so that machines without AMX test
// the packing, the loops and the remainders around the tiles.
#pragma once

#include "simd_bf16.h"

LOWBIT_BEGIN

namespace tiles {

#if defined(LOWBIT_EMULATE_TILES)

struct Register {
  alignas(64) float row[16][16];
};
inline thread_local Register registers[8];
inline thread_local size_t row_bytes[8];

inline void configure(int columns = 16) {
  for (int t = 0; t < 8; t++) row_bytes[t] = t == 4 || t == 5 ? 64 : size_t(4 * columns);
}
inline void release() {}
template <int t>
LOWBIT_FN void clear() {
  std::memset(&registers[t], 0, sizeof(Register));
}
template <int t>
LOWBIT_FN void load(const void* p, size_t stride) {
  for (int i = 0; i < 16; i++)
    std::memcpy(registers[t].row[i], static_cast<const char*>(p) + i * stride, row_bytes[t]);
}
template <int t>
LOWBIT_FN void store(void* p, size_t stride) {
  for (int i = 0; i < 16; i++)
    std::memcpy(static_cast<char*>(p) + i * stride, registers[t].row[i], row_bytes[t]);
}
template <int c, int a, int b>
LOWBIT_FN void multiply() {
  for (int m = 0; m < 16; m++) {
    f32 sum = lowbit::load(registers[c].row[m]);
    for (int k = 0; k < 16; k++)
      sum = dot(splat_pair(reinterpret_cast<const bf16*>(&registers[a].row[m][k])),
                load_pairs(reinterpret_cast<const bf16*>(registers[b].row[k])), sum);
    lowbit::store(registers[c].row[m], sum);
  }
}

// Unsigned bytes of A times signed bytes of B, into 32-bit integers, `words` of four along K.
template <int c, int a, int b>
LOWBIT_FN void multiply_bytes(int words) {
  for (int m = 0; m < 16; m++) {
    __m512i sum = _mm512_loadu_si512(registers[c].row[m]);
    for (int k = 0; k < words; k++) {
      int32_t word;
      std::memcpy(&word, &registers[a].row[m][k], 4);
      sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi32(word),
                                _mm512_loadu_si512(registers[b].row[k]));
    }
    _mm512_storeu_si512(registers[c].row[m], sum);
  }
}
inline void configure_bytes(int) { configure(); }

#else

struct alignas(64) Config {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t columns_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

inline void configure(const Config& config) {
  // gcc 12 gives _tile_loadconfig a memory operand that is too small and drops the stores
  // above.
  asm volatile("" ::"r"(&config) : "memory");
  _tile_loadconfig(&config);
}
// For results of `columns` columns: tiles 0 to 3 as C, 4 and 5 as A, 6 and 7 as B.
inline void configure(int columns = 16) {
  Config config;
  for (int t = 0; t < 8; t++)
    if (t != 4 && t != 5) config.columns_bytes[t] = uint16_t(4 * columns);
  configure(config);
}
// For steps of `words` words of four bytes: tiles 0 to 5 as before, 6 as A and 7 as B.
inline void configure_bytes(int words) {
  Config config;
  config.columns_bytes[6] = uint16_t(4 * words);
  config.rows[7] = uint8_t(words);
  configure(config);
}
inline void release() { _tile_release(); }
// Written out, since gcc's macros want literal register numbers.
template <int t>
LOWBIT_FN void clear() {
  asm volatile("tilezero %%tmm%c0" ::"i"(t));
}
template <int t>
LOWBIT_FN void load(const void* p, size_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(t) : "memory");
}
template <int t>
LOWBIT_FN void store(void* p, size_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(t) : "memory");
}
template <int c, int a, int b>
LOWBIT_FN void multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
}
// Unsigned bytes of A times signed bytes of B, into 32-bit integers.
template <int c, int a, int b>
LOWBIT_FN void multiply_bytes(int) {
  asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
}

#endif

}  // namespace tiles

LOWBIT_END
