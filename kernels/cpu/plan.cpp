// The plan table of the CPU: one row an instruction set, best first, and the choice among them.
#include "../host/plan.h"

#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.h"
#include "pool.h"
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace lowbit {

#define LOWBIT_CPU_TARGET(name)  \
  namespace name {               \
  const cpu::Kernels& kernels(); \
  }
#include "targets.def"
#undef LOWBIT_CPU_TARGET

namespace cpu {

namespace {

[[maybe_unused]] bool always() { return true; }

#if defined(__x86_64__)
[[maybe_unused]] bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c");
}
[[maybe_unused]] bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
[[maybe_unused]] bool has_avx512bf16() {
  return has_avx512() && __builtin_cpu_supports("avx512vbmi") &&
         __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
}
[[maybe_unused]] bool has_amx() {
#if defined(__linux__)
  // CPUID says what the processor has (leaf 7: amx-bf16 bit 22, amx-tile bit 24, amx-int8 bit
  // 25 of edx); the kernel must also hand out the tile state, once a process.
  unsigned a = 7, b = 0, c = 0, d = 0;
  asm volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return has_avx512bf16() && (d >> 22 & 1) && (d >> 24 & 1) && (d >> 25 & 1) &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

}  // namespace

// matvec_rows       largest M at which streaming codes through registers beats the alternatives
// panel_bytes       a task's panel of decoded weights, with room in L2 for the packed x beside
// it
//
// Measured 2026-11-22, K = N = 4096, 4-bit, g64, two threads, weights in L3, ms:
//   Xeon with AMX, 2.6 GHz     M = 1 pairs 0.43, float32 lanes 0.40; M = 4 pairs 1.13,
//   tiles 1.05;
//                              M = 16 tiles 1.12, matmul 1.5; M = 64 tiles 3.3, matmul 2.4;
//                              M = 512 panel 64 x 4096 12.2 to 18, 128 x 2048 11.7
//   Zen 4, 3.6 GHz             M = 1 pairs 0.20, float32 lanes 0.35; M = 8 pairs 1.3,
//   matmul 2.0
// Pairs lose to float32 lanes on the Xeon below 8 bits because vdpbf16ps takes 2.1 cycles there
// (on both vector ports), vfmadd 0.5, vpermps and a shift 1 each.
//
// Fixed point takes 15 vector instructions for 128 codes of 4 bits, lanes 25: 7.5 and 12.5
// cycles on the Xeon's two ports. K = N = 4096, bfloat16 x, two cores, best of two rounds in
// turns, ms (Xeon with AMX, 2026-11-22):
//   M = 1   4-bit fixed 0.285, lanes 0.41, pairs 0.43; 3-bit 0.31, 0.43, 0.47;
//           8-bit 0.40, 0.78, 0.60
//   M = 4   4-bit byte tiles 0.78, fixed 0.91; 3-bit 0.72, 0.97; 8-bit 1.08, 1.19
//   M = 8   4-bit byte tiles 0.80, tiles 0.79; 3-bit 0.73, 0.77; 8-bit 0.90, 1.11
// Zen 4, beside other work, best of three rounds in turns:
//   bfloat16 x    M = 1 4-bit pairs 0.20, fixed 0.23; 8-bit pairs 0.39, fixed 0.34
//                 M = 2 8-bit pairs 0.50, fixed 0.55
//   float16 x     M = 1 4-bit lanes 0.33, fixed 0.24; 8-bit lanes 0.65, fixed 0.34
//                 M = 8 4-bit lanes 2.5, fixed 1.7
const Target kTargets[] = {
#if defined(__x86_64__)
    {.name = "amx",
     .supported = has_amx,
     .kernels = amx::kernels,
     .bf16 = Arithmetic::tiles,
     .matvec_rows = 4,
     .matvec_rows_bf16 = 2,
     .matvec_rows_tiles = 32,
     .byte_tiles_from = 3,
     .byte_tile_rows = 8,
     .pairs_bits = 8,
     .fixed_point = true,
     .fixed_rows = 2,
     .fixed_bits = 8,
     .panel_bytes = 512 << 10,
     .row_block = 128},
    {.name = "avx512bf16",
     .supported = has_avx512bf16,
     .kernels = avx512bf16::kernels,
     .bf16 = Arithmetic::bf16_pairs,
     .matvec_rows = 8,
     .matvec_rows_bf16 = 8,
     .matvec_rows_tiles = 0,
     .pairs_bits = 0,
     .fixed_point = true,
     .fixed_rows = 1,
     .fixed_bits = 8,
     .panel_bytes = 512 << 10,
     .row_block = 64},
    {.name = "avx512",
     .supported = has_avx512,
     .kernels = avx512::kernels,
     .bf16 = Arithmetic::f32,
     .matvec_rows = 8,
     .matvec_rows_bf16 = 8,
     .matvec_rows_tiles = 0,
     .pairs_bits = 0,
     .panel_bytes = 512 << 10,
     .row_block = 64},
    {.name = "avx2",
     .supported = has_avx2,
     .kernels = avx2::kernels,
     .bf16 = Arithmetic::f32,
     .matvec_rows = 4,
     .matvec_rows_bf16 = 4,
     .matvec_rows_tiles = 0,
     .pairs_bits = 0,
     .panel_bytes = 256 << 10,
     .row_block = 64},
#endif
#if defined(__aarch64__)
    {.name = "neon",
     .supported = always,
     .kernels = neon::kernels,
     .bf16 = Arithmetic::f32,
     .matvec_rows = 8,
     .matvec_rows_bf16 = 8,
     .matvec_rows_tiles = 0,
     .pairs_bits = 0,
     .panel_bytes = 256 << 10,
     .row_block = 64},
#endif
    {.name = "generic",
     .supported = always,
     .kernels = generic::kernels,
     .bf16 = Arithmetic::f32,
     .matvec_rows = 4,
     .matvec_rows_bf16 = 4,
     .matvec_rows_tiles = 0,
     .pairs_bits = 0,
     .panel_bytes = 256 << 10,
     .row_block = 64},
#if defined(LOWBIT_EMULATED_TARGET)
    // Never chosen by itself: the tile kernels with tiles in plain C++, for tests.
    {.name = "amx_emulated",
     .supported = has_avx512bf16,
     .kernels = amx_emulated::kernels,
     .bf16 = Arithmetic::tiles,
     .matvec_rows = 4,
     .matvec_rows_bf16 = 2,
     .matvec_rows_tiles = 32,
     .byte_tiles_from = 3,
     .byte_tile_rows = 8,
     .pairs_bits = 8,
     .fixed_point = true,
     .fixed_rows = 2,
     .fixed_bits = 8,
     .panel_bytes = 512 << 10,
     .row_block = 128},
#endif
};
const int kTargetCount = int(sizeof(kTargets) / sizeof(kTargets[0]));

const Target* find_target(std::string_view name) {
  for (const Target& t : kTargets)
    if (name == t.name && t.supported()) return &t;
  return nullptr;
}

const Target& target() {
  static const Target& chosen = []() -> const Target& {
    if (const char* name = std::getenv("MLX_LOWBIT_TARGET")) {
      if (const Target* t = find_target(name)) return *t;
      std::fprintf(stderr, "mlx_lowbit: MLX_LOWBIT_TARGET=%s is not available here; ignored\n",
                   name);
    }
    for (const Target& t : kTargets)
      if (t.supported()) return t;
    throw std::runtime_error("no CPU target");  // generic is always supported
  }();
  return chosen;
}

namespace {

// Integer codes and x of 16 bits, of which fixed point keeps 21 or more
// (kernels/cpu/fixed_point.h).
bool fixed_point_holds(const Problem& p) {
  return p.transpose && p.format != Format::dense && kFormats[int(p.format)].affine() &&
         p.dtype != Dtype::f32;
}
bool byte_tiles_take(const Problem& p, const Target& t) {
  return fixed_point_holds(p) && p.M >= t.byte_tiles_from && p.M <= t.byte_tile_rows;
}
bool fixed_point_takes(const Problem& p, const Target& t, bool pairs) {
  return t.fixed_point && fixed_point_holds(p) &&
         (!pairs || (p.M <= t.fixed_rows && kFormats[int(p.format)].bits >= t.fixed_bits));
}

// Tiles multiply bytes, or codes that are exact in bfloat16 and can be looked up: not 6 bits.
bool tiles_take(const Problem& p, const Target& t) {
  return t.bf16 == Arithmetic::tiles && p.transpose && p.format != Format::dense &&
         (byte_tiles_take(p, t) ||
          (kFormats[int(p.format)].bits != 6 && p.M <= t.matvec_rows_tiles));
}

// Pairs look codes up; 5 and 6 bits would have to be computed and rounded.
bool pairs_take(const Problem& p, const Target& t) {
  const int bits = p.format == Format::dense ? 16 : kFormats[int(p.format)].bits;
  return bits >= t.pairs_bits && bits != 5 && bits != 6;
}

}  // namespace

Plan plan(const Problem& p, const Target& t) {
  const bool exact_in_bf16 = p.dtype == Dtype::bf16 || p.quantize_x;
  const bool bf16_weights = p.format != Format::dense || p.dense_dtype == Dtype::bf16;
  Plan plan{};
  plan.arithmetic = exact_in_bf16 && bf16_weights && p.transpose ? t.bf16 : Arithmetic::f32;
  const bool bf16 = plan.arithmetic != Arithmetic::f32;
  const bool pairs = bf16 && pairs_take(p, t);
  plan.kernel = Plan::Kernel::matvec;
  const bool bytes = byte_tiles_take(p, t);
  if (p.transpose && !bytes && p.M <= (pairs ? t.matvec_rows_bf16 : t.matvec_rows)) {
    plan.arithmetic = fixed_point_takes(p, t, pairs) ? Arithmetic::fixed_point
                      : pairs                        ? Arithmetic::bf16_pairs
                                                     : Arithmetic::f32;
  } else if (tiles_take(p, t)) {
    plan.arithmetic = bytes ? Arithmetic::byte_tiles : Arithmetic::tiles;
  } else {
    plan.kernel = Plan::Kernel::matmul;
  }
  const bool wide =
      plan.arithmetic != Arithmetic::bf16_pairs && plan.arithmetic != Arithmetic::tiles;
  plan.row_block = plan.kernel == Plan::Kernel::matvec ? 32 : t.row_block;
  // The longest block of K, whole groups of any format, that keeps a panel within panel_bytes;
  // in float32 also short enough for its sums' rounding. matvec needs it too: it hands extreme
  // x to matmul.
  plan.k_block = t.panel_bytes / (t.row_block * (wide ? 4 : 2)) / 128 * 128;
  if (wide && plan.k_block > 512) plan.k_block = 512;
  plan.m_block = 512;
  return plan;
}

std::string describe(const Problem& p, const Plan& plan, const Target& t, int threads) {
  constexpr const char* arithmetic[] = {
      "float32 lanes", "bfloat16 pairs, float32 sums", "bfloat16 tiles, float32 sums",
      "x in fixed point, float32 sums", "byte tiles, x in fixed point, float32 sums"};
  const bool matvec = plan.kernel == Plan::Kernel::matvec;
  std::string text = "cpu/";
  text += matvec ? "matvec" : "matmul";
  text += std::string(" [") + t.name + "]: ";
  const bool in_parts = plan.arithmetic == Arithmetic::tiles && p.dtype != Dtype::bf16;
  text += in_parts && !p.quantize_x ? "tiles, x in exact parts of 8 bits, float32 sums"
                                    : arithmetic[int(plan.arithmetic)];
  text += ", " + std::to_string(plan.row_block) + " rows a task";
  if (!matvec)
    text += ", panel of " + std::to_string(plan.k_block) + " along K, " +
            std::to_string(plan.m_block) + " rows of x at a time";
  text += ", " + std::to_string(threads) + (threads == 1 ? " thread" : " threads");
  text += p.quantize_x ? ", x quantized first" : "";
  return text;
}

std::string explain(const Problem& p) {
  return describe(p, plan(p, target()), target(), thread_count());
}

}  // namespace cpu
}  // namespace lowbit
