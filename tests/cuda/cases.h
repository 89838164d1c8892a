// What is multiplied: cases, their operands and their expected results.
#pragma once

#include <algorithm>
#include <optional>
#include <string>

#include "reference.h"

namespace lowbit::check {

struct Case {
  int id;  // seeds the operands
  Format format;
  Dtype dtype;
  bool transpose, quantize_x;
  int64_t M, N, K;
  int64_t pairs, x_matrices, w_matrices;  // pairs > 0: gather
  ScaleType scale_type;
  std::optional<Dtype> bias;
  bool global_x, global_w;
  bool specials;          // a NaN in one row of x, an infinity in another
  bool offset;            // operands begin one element after an aligned address
  bool in_order;          // pair i is row i of x, by matrix of w
  int x_exponent = 0;     // x is multiplied by 2^x_exponent
  bool nan_code = false;  // one of w
  // Scales, and biases, of w are multiplied by 2^scale_exponent: of one group, or if it is
  // negative of all.
  int scale_exponent = 0;

  const FormatInfo& info() const { return kFormats[int(format)]; }
  int64_t stored_rows() const { return transpose ? N : K; }
  int64_t stored_columns() const { return transpose ? K : N; }
  int64_t y_rows() const { return pairs ? pairs * M : M; }

  std::string text() const {
    const auto number = [](const char* key, int64_t v) {
      return std::string(",") + key + "=" + std::to_string(v);
    };
    return "format=" + std::string(info().name) + ",dtype=" + std::string(name(dtype)) +
           number("transpose", transpose) + number("quantize_x", quantize_x) + number("M", M) +
           number("N", N) + number("K", K) + number("pairs", pairs) +
           number("scales", int(scale_type)) + number("bias", bias ? int(*bias) : -1) +
           number("global", global_w) + number("specials", specials) +
           number("offset", offset) + number("in_order", in_order) +
           number("x_exponent", x_exponent) + number("nan_code", nan_code) +
           number("scale_exponent", scale_exponent) + number("id", id);
  }
};

struct Operands {
  HostWeights w;
  std::vector<uint8_t> x, bias;
  std::vector<float> global_x, global_w;
  std::vector<int64_t> lhs, rhs;
};

inline ScaleType default_scales(const FormatInfo& f, Dtype dtype) {
  if (f.affine()) return ScaleType(int(dtype));
  return f.mode == "nvfp4" ? ScaleType::e4m3 : ScaleType::e8m0;
}

// Random codes and scales: any code but NaN, values of either sign around zero.
inline HostWeights random_weights(const FormatInfo& f, ScaleType type, int64_t elements,
                                  Random& random) {
  HostWeights w;
  w.scale_type = type;
  w.codes.resize(size_t(elements * f.bits / 8));
  for (uint8_t& b : w.codes) b = uint8_t(random.next());
  const int64_t groups = elements / f.group_size;
  w.scales.resize(size_t(groups * size_of(type)));
  if (f.affine()) {
    w.biases.resize(w.scales.size());
    const int steps = (1 << f.bits) - 1;
    for (int64_t g = 0; g < groups; g++) {
      const double range = 0.1 + 0.4 * random.uniform(), at = 0.3 + 0.4 * random.uniform();
      const double sign = random.next() & 1 ? -1.0 : 1.0;
      store_float(w.scales, Dtype(int(type)), g, sign * range / steps);
      store_float(w.biases, Dtype(int(type)), g, -sign * range * at);
    }
    return w;
  }
  if (f.bits == 8)
    for (uint8_t& b : w.codes) b = (b & 127) == 127 ? uint8_t(b - 1) : b;
  for (uint8_t& s : w.scales) {
    if (type == ScaleType::e4m3)  // 0, or from 2^-5 to 1/2
      s = random.below(50) == 0 ? 0 : uint8_t(0x10 + random.below(0x21));
    else
      s = uint8_t((f.bits == 8 ? 112 : 119) + random.below(7));
  }
  return w;
}

inline void scale_groups(const FormatInfo& f, HostWeights& w, int exponent, Random& random) {
  const int64_t groups = int64_t(w.scales.size()) / size_of(w.scale_type);
  const int64_t first = exponent > 0 ? random.below(groups) : 0;
  for (int64_t g = first; g < (exponent > 0 ? first + 1 : groups); g++) {
    if (!f.affine()) {
      w.scales[size_t(g)] = uint8_t(w.scales[size_t(g)] + exponent);
      continue;
    }
    const auto type = Dtype(int(w.scale_type));
    for (auto* values : {&w.scales, &w.biases})
      store_float(*values, type, g, std::ldexp(load_float(*values, type, g), exponent));
  }
}

inline Operands make_operands(const Case& c) {
  Random random{uint64_t(c.id)};
  Operands o;
  const int64_t x_matrices = c.pairs ? c.x_matrices : 1, matrices = c.pairs ? c.w_matrices : 1;
  o.w = random_weights(c.info(), c.scale_type, matrices * c.N * c.K, random);
  const int64_t x_rows = x_matrices * c.M;
  o.x.resize(size_t(x_rows * c.K * ieee(c.dtype).size()));
  for (int64_t i = 0; i < x_rows * c.K; i++)
    store_float(o.x, c.dtype, i, std::ldexp(random.normal(), c.x_exponent));
  if (c.scale_exponent) scale_groups(c.info(), o.w, c.scale_exponent, random);
  if (c.nan_code) o.w.codes[size_t(random.below(int64_t(o.w.codes.size())))] |= 127;
  if (c.specials) {
    store_float(o.x, c.dtype, random.below(c.K), kInf);
    store_float(o.x, c.dtype, (x_rows - 1) * c.K + random.below(c.K), kNan);
  }
  if (c.bias) {
    o.bias.resize(size_t(matrices * c.N * ieee(*c.bias).size()));
    for (int64_t i = 0; i < matrices * c.N; i++)
      store_float(o.bias, *c.bias, i, random.normal());
  }
  const auto global = [&] { return float(2688.0 * (0.5 + random.uniform())); };
  if (c.global_x) o.global_x.push_back(global());
  if (c.global_w)
    for (int64_t i = 0; i < (c.id % 2 ? matrices : 1); i++) o.global_w.push_back(global());
  for (int64_t i = 0; i < c.pairs; i++) {
    o.lhs.push_back(c.in_order ? i : random.below(c.x_matrices));
    o.rhs.push_back(random.below(c.w_matrices));
  }
  if (c.in_order) {
    std::sort(o.rhs.begin(), o.rhs.end());
  } else if (c.pairs > 4) {  // indices that no matrix has
    o.rhs[1] = c.w_matrices;
    o.rhs[2] = -1;
    o.lhs[3] = c.x_matrices;
    o.lhs[4] = -(int64_t(1) << 40);
  }
  return o;
}

// Every element of y, row-major; value NaN for pairs with invalid indices.
inline std::vector<Sums> expected(const Case& c, const Operands& o) {
  const FormatInfo& f = c.info();
  const int64_t matrices = c.pairs ? c.w_matrices : 1, size = c.N * c.K;
  std::vector<double> w(size_t(matrices * size)), reach(w.size());
  decode(f, o.w, 0, matrices * size, w.data(), reach.data());
  if (!c.transpose) {
    const auto turn = [&](std::vector<double>& a) {
      std::vector<double> t(a.size());
      for (int64_t e = 0; e < matrices; e++)
        for (int64_t k = 0; k < c.K; k++)
          for (int64_t n = 0; n < c.N; n++)
            t[size_t(e * size + n * c.K + k)] = a[size_t(e * size + k * c.N + n)];
      a.swap(t);
    };
    turn(w), turn(reach);
  }
  const int64_t x_rows = (c.pairs ? c.x_matrices : 1) * c.M;
  std::vector<double> x(size_t(x_rows * c.K));
  for (size_t i = 0; i < x.size(); i++) x[i] = load_float(o.x, c.dtype, int64_t(i));
  if (c.quantize_x)
    for (int64_t r = 0; r < x_rows; r++)
      round_trip(f, c.dtype, x.data() + r * c.K, c.K, c.global_x ? o.global_x[0] : 0.0f);

  std::vector<Sums> y(size_t(c.y_rows() * c.N), Sums{kNan, 0.0, 0.0});
  for (int64_t row = 0; row < c.y_rows(); row++) {
    const int64_t lhs = c.pairs ? o.lhs[size_t(row / c.M)] : 0;
    const int64_t rhs = c.pairs ? o.rhs[size_t(row / c.M)] : 0;
    if (lhs < 0 || rhs < 0 || (c.pairs && (lhs >= c.x_matrices || rhs >= c.w_matrices)))
      continue;
    double alpha = 1.0;
    if (c.global_x) alpha *= double(o.global_x[0]) / 2688.0;
    if (c.global_w)
      alpha *= double(o.global_w[o.global_w.size() > 1 ? size_t(rhs) : 0]) / 2688.0;
    const double* xr = x.data() + (lhs * c.M + row % c.M) * c.K;
    for (int64_t n = 0; n < c.N; n++) {
      const int64_t at = rhs * size + n * c.K;
      Sums s = dot(xr, w.data() + at, reach.data() + at, c.K);
      s.value *= alpha, s.rms2 *= alpha * alpha, s.worst *= std::fabs(alpha);
      if (c.bias) {
        const double b = load_float(o.bias, *c.bias, rhs * c.N + n);
        s.value += b, s.rms2 += b * b, s.worst += std::fabs(b);
      }
      y[size_t(row * c.N + n)] = s;
    }
  }
  return y;
}

// Shapes with remainders against every tile that a kernel may use; K is rounded up to whole
// groups (N where w is stored [K, N]).
struct Shape {
  int64_t M, N, K;
};
inline constexpr Shape kShapes[] = {
    {1, 64, 512},      {1, 1, 32},     {1, 300, 4128},   {2, 65, 96},     {3, 200, 1056},
    {4, 72, 640},      {5, 129, 160},  {7, 16, 2080},    {8, 64, 4096},   {9, 17, 16},
    {13, 33, 224},     {16, 96, 2048}, {17, 257, 416},   {24, 100, 1504}, {31, 48, 288},
    {32, 128, 1024},   {33, 40, 544},  {64, 64, 64},     {65, 130, 352},  {100, 72, 1248},
    {128, 256, 512},   {129, 136, 48}, {200, 300, 1000}, {256, 64, 320},  {300, 200, 480},
    {14, 200, 4160},   {9, 40, 8192},  {31, 36, 9216},   {1, 40, 9472},   {40, 200, 12288},
    {100, 136, 12288},
};
// Blocks of many rows, and several of them one after another (132 multiprocessors).
inline constexpr Shape kTallShapes[] = {
    {10, 4300, 512}, {16, 12700, 1024}, {9, 14800, 512}, {20, 8500, 512}, {1, 9000, 320}};
// Three tiles of matmul to a block, of an even number of units that is no multiple of three
// turns of its warps of scales, with a ring of six stages (8 bits).
inline constexpr Shape kManyTiles = {33, 34000, 1024};
inline constexpr Shape kQuickShapes[] = {
    {1, 65, 288},  {6, 40, 1056}, {12, 136, 1536}, {5, 33, 1024},   {20, 40, 2048},
    {25, 72, 864}, {70, 72, 288}, {70, 136, 1536}, {40, 40, 12288},
};

struct GatherShape {
  int64_t pairs, M, x_matrices, w_matrices, N, K;
  bool in_order = false;
};
inline constexpr GatherShape kGatherShapes[] = {
    {1, 1, 1, 3, 64, 512},
    {24, 1, 3, 8, 72, 288},
    {9, 1, 9, 5, 33, 1056},
    {40, 1, 40, 4, 96, 96},
    {6, 20, 6, 5, 40, 160},
    {7, 70, 3, 4, 130, 352},
    {90, 1, 90, 7, 40, 320, true},
    {48, 1, 12, 30, 72, 288},
    {140, 1, 140, 80, 40, 320, true},
    {20, 3, 6, 5, 40, 160},
    {30, 1, 4, 9, 400, 320},
    {32, 1, 4, 3, 200, 4096},
    {700, 1, 700, 2, 136, 160, true},
    {5000, 1, 1500, 17, 24, 96},
    {4500, 1, 4500, 16, 24, 64, true},
};

// Every case that some kernel is asked for; ids are stable for a given selection.
inline std::vector<Case> product_cases(bool quick) {
  std::vector<Case> cases;
  const auto round_up = [](int64_t n, int64_t to) { return (n + to - 1) / to * to; };
  const auto add = [&](Format format, Dtype dtype, bool transpose, bool quantize_x, Shape s,
                       const GatherShape* g, bool specials) {
    const FormatInfo& f = kFormats[int(format)];
    const int id = int(cases.size());
    Case c{id, format, dtype,    transpose,   quantize_x,      s.M, s.N, s.K, 0, 1, 1, {}, {},
           {}, {},     specials, id % 5 == 4, g && g->in_order};
    (transpose ? c.K : c.N) = round_up(transpose ? s.K : s.N, f.group_size);
    if (!transpose && s.K > 32) c.K += id % 7;
    if (g) c.pairs = g->pairs, c.x_matrices = g->x_matrices, c.w_matrices = g->w_matrices;
    c.scale_type = default_scales(f, id % 11 == 10 ? Dtype(id % 3) : dtype);
    const int bias = id % 4;  // none, none, one of either type that x allows, any
    if (bias == 2) c.bias = id % 8 == 2 ? Dtype::f32 : dtype;
    if (bias == 3) c.bias = Dtype(id % 3);
    c.global_x = c.global_w = f.mode == "nvfp4" && id % 3 != 0;
    if (!quantize_x) c.global_x = false;
    cases.push_back(c);
  };
  if (quick) {  // dtypes take turns
    int turn = 0;
    for (const FormatInfo& f : kFormats)
      for (int way = 0; way < (f.affine() ? 2 : 3); way++) {
        for (const Shape& s : kQuickShapes)
          add(f.format, Dtype(turn++ % 3), way != 1, way == 2, s, nullptr, false);
        for (int i : {1, 3, 7, 9})  // pair by pair, and in tiles of 8 and of 4 rows
          add(f.format, Dtype(turn++ % 3), way != 1, way == 2, {1, 40, 160}, &kGatherShapes[i],
              false);
        turn++;
      }
    return cases;
  }
  for (const FormatInfo& f : kFormats)
    for (Dtype dtype : {Dtype::f32, Dtype::f16, Dtype::bf16})
      for (int way = 0; way < (f.affine() ? 2 : 3); way++) {  // [N, K], [K, N], qqmm
        const auto add_shape = [&](Shape s, const GatherShape* g, bool specials) {
          add(f.format, dtype, way != 1, way == 2, s, g, specials);
        };
        for (const Shape& s : kShapes) add_shape(s, nullptr, false);
        add_shape({3, 40, 288}, nullptr, true);
        add_shape({70, 72, 160}, nullptr, true);
        for (const GatherShape& g : kGatherShapes) add_shape({g.M, g.N, g.K}, &g, false);
      }
  for (const FormatInfo& f : kFormats)
    for (Dtype dtype : {Dtype::f16, Dtype::bf16})
      for (const Shape& s : kTallShapes)
        if (f.judged) add(f.format, dtype, true, false, s, nullptr, false);
  for (const FormatInfo& f : kFormats)
    if (f.judged && f.bits == 8)
      add(f.format, Dtype::bf16, true, false, kManyTiles, nullptr, false);
  // Scales that are beyond what the decoder of tensor cores carries.
  for (const FormatInfo& f : kFormats)
    for (bool quantize_x : {false, true})
      for (const Shape& s : {Shape{3, 40, 288}, Shape{12, 136, 1536}, Shape{40, 136, 672},
                             Shape{70, 72, 768}, Shape{40, 136, 12288}})
        for (int exponent : {56, -100}) {
          if (default_scales(f, Dtype::bf16) == ScaleType::e4m3) continue;
          if (quantize_x && f.affine()) continue;
          add(f.format, Dtype::bf16, true, quantize_x, s, nullptr, false);
          cases.back().scale_exponent = exponent, cases.back().bias.reset();
          cases.back().scale_type = default_scales(f, Dtype::bf16);
        }
  for (const FormatInfo& f : kFormats)
    for (int64_t M : {1, 4, 8, 14}) {
      const Shape s{M, 40, 288};
      for (int exponent : {-100, -60, 60, 110}) {
        if (M > 8 && exponent < -60) continue;  // matmul's weights are 2^32 times too small
        add(f.format, Dtype::bf16, true, false, s, nullptr, false);
        cases.back().x_exponent = exponent, cases.back().bias.reset();
      }
      if (!f.affine() && M <= 8)
        for (int exponent : {-60, 60, 110}) {
          add(f.format, Dtype::bf16, true, true, s, nullptr, false);
          cases.back().x_exponent = exponent, cases.back().bias.reset();
        }
      // matmul takes codes for finite ones: groups with a NaN have a scale of their own.
      if (f.affine() || f.bits != 8 || M > 8) continue;
      for (Dtype dtype : {Dtype::f32, Dtype::f16, Dtype::bf16}) {
        add(f.format, dtype, true, false, s, nullptr, false);
        cases.back().nan_code = true;
      }
    }
  return cases;
}

}  // namespace lowbit::check
