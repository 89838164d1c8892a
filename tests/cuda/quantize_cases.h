// What is quantized and dequantized, and how the results are judged.
#pragma once

#include "cases.h"

namespace lowbit::check {

struct QuantizeCase {
  int id;
  Format format;
  Dtype dtype;
  int64_t groups;
  bool global, offset;

  const FormatInfo& info() const { return kFormats[int(format)]; }
  int64_t rows() const { return groups % 5 == 0 ? 5 : 1; }  // for dequantize
  std::vector<float> globals() const {
    if (!global) return {};
    // Now and then so small that nothing is left of its inverse's usual bounds.
    return {float(std::ldexp(0.5 + 0.1 * (id % 10), id % 7 == 6 ? -40 : id % 7))};
  }
  std::string text() const {
    return "format=" + std::string(info().name) + ",dtype=" + std::string(name(dtype)) +
           ",groups=" + std::to_string(groups) + ",global=" + std::to_string(global) +
           ",offset=" + std::to_string(offset) + ",id=" + std::to_string(id);
  }
};

// Groups of every kind that the rules treat specially, as bits of the dtype.
inline std::vector<uint8_t> make_tensor(const QuantizeCase& c) {
  const FormatInfo& f = c.info();
  const Ieee& t = ieee(c.dtype);
  Random random{uint64_t(c.id) + 1000003};
  std::vector<uint8_t> w(size_t(c.groups * f.group_size * t.size()));
  const int most = c.dtype == Dtype::f16 ? 14 : 127;  // exponents of two stay below
  for (int64_t g = 0; g < c.groups; g++) {
    const int kind = int(random.below(14));
    const int exponent = int(random.below(2 * most)) - most;  // below `most`
    const double constant = random.normal(), step = std::ldexp(1.0, -int(random.below(4)));
    const int64_t hot = random.below(f.group_size);
    for (int64_t i = 0; i < f.group_size; i++) {
      double v = random.normal();
      switch (kind) {
        case 0:
          v = std::nearbyint(v * 4) * step / 2;
          break;  // on and between the grid
        case 1:
          v = 0.0;
          break;
        case 2:
          v = -0.0;
          break;
        case 3:
          v = constant;
          break;
        case 4:
          v = constant * (1 + 1e-3 * v);
          break;
        case 5:
          v = i == hot ? v : 0.0;
          break;
        case 6:
          v = std::ldexp(v, exponent);
          break;
        case 7:
          v = std::ldexp(v, int(random.below(24)) - 12);
          break;  // of all sizes
        case 8:
          v = t.decode(uint32_t(random.below(64)) | uint32_t(random.next() & 1)
                                                        << (8 * t.size() - 1));
          break;
        case 9:
          v = std::ldexp(double(random.below(33) - 16), -2);
          break;
        case 10:
          v = i == hot ? (g % 2 ? kNan : -kInf) : v;
          break;
        case 11:
          v = std::fabs(v);
          break;
        default:
          v *= 0.02;
      }
      store_float(w, c.dtype, g * f.group_size + i, v);
    }
  }
  return w;
}

inline HostWeights empty_weights(const QuantizeCase& c) {
  const FormatInfo& f = c.info();
  HostWeights w;
  w.scale_type = default_scales(f, c.dtype);
  w.codes.resize(size_t(c.groups * f.group_size * f.bits / 8));
  w.scales.resize(size_t(c.groups * size_of(w.scale_type)));
  if (f.affine()) w.biases.resize(w.scales.size());
  return w;
}

// For dequantize: scales of any type that it may meet, every scale byte and code.
inline HostWeights make_weights(const QuantizeCase& c) {
  const FormatInfo& f = c.info();
  Random random{uint64_t(c.id) + 2000003};
  const ScaleType type = f.affine() ? ScaleType(c.id % 3) : default_scales(f, c.dtype);
  HostWeights w = random_weights(f, type, c.groups * f.group_size, random);
  if (f.affine()) return w;
  for (uint8_t& b : w.codes) b = uint8_t(random.next());
  for (uint8_t& s : w.scales) s = uint8_t(random.next());
  return w;
}

inline std::string compare_encoded(const QuantizeCase& c, const std::vector<uint8_t>& tensor,
                                   const HostWeights& got) {
  const FormatInfo& f = c.info();
  std::vector<float> w(size_t(f.group_size));
  const int size = size_of(got.scale_type);
  for (int64_t g = 0; g < c.groups; g++) {
    for (int i = 0; i < f.group_size; i++)
      w[size_t(i)] = float(load_float(tensor, c.dtype, g * f.group_size + i));
    const EncodedGroup want =
        encode_group(f, c.dtype, w.data(), c.global ? c.globals()[0] : 0.0f);
    const std::string at = "group " + std::to_string(g) + ": ";
    if (!want.finite) {
      std::vector<double> value(size_t(f.group_size));
      decode(f, got, g * f.group_size, f.group_size, value.data(), nullptr);
      for (double v : value)
        if (!std::isnan(v)) return at + "not finite, but decodes to " + std::to_string(v);
      continue;
    }
    const uint32_t scale = load_bits(got.scales.data() + g * size, size);
    if (scale != want.scale)
      return at + "scale " + std::to_string(scale) + ", expected " + std::to_string(want.scale);
    if (f.affine()) {
      const uint32_t bias = load_bits(got.biases.data() + g * size, size);
      if (bias != want.bias)
        return at + "bias " + std::to_string(bias) + ", expected " + std::to_string(want.bias);
    }
    for (int i = 0; i < f.group_size; i++) {
      const uint32_t code = load_code(got.codes.data(), g * f.group_size + i, f.bits);
      if (code != want.codes[i])
        return at + "code " + std::to_string(i) + " of " + std::to_string(w[size_t(i)]) +
               " is " + std::to_string(code) + ", expected " + std::to_string(want.codes[i]);
    }
  }
  return "";
}

// worst: the largest error as a part of what is allowed, which for block formats without a
// global scale is none.
inline std::string compare_decoded(const QuantizeCase& c, const HostWeights& source,
                                   const std::vector<uint8_t>& got, double& worst) {
  const FormatInfo& f = c.info();
  const int64_t count = c.groups * f.group_size;
  std::vector<double> value(static_cast<size_t>(count)), reach(value.size());
  decode(f, source, 0, count, value.data(), reach.data());
  const double alpha = c.global ? double(c.globals()[0]) / 2688.0 : 1.0;
  const bool exact = !f.affine() && !c.global;
  for (int64_t i = 0; i < count; i++) {
    const double want = value[size_t(i)] * alpha, y = load_float(got, c.dtype, i);
    const double rounded = ieee(c.dtype).round(want);
    bool right = std::isnan(want) ? std::isnan(y) : y == rounded;
    if (!right && !exact && std::isfinite(rounded)) {
      const double limit = roundoff(c.dtype) * std::fabs(want) + underflow(c.dtype) +
                           0x1p-22 * reach[size_t(i)] * alpha;
      worst = std::max(worst, std::fabs(y - want) / limit);
      right = std::fabs(y - want) <= limit;
    }
    if (!right)
      return "element " + std::to_string(i) + " is " + std::to_string(y) + ", expected " +
             std::to_string(rounded);
  }
  return "";
}

inline std::vector<QuantizeCase> quantize_cases(bool quick) {
  std::vector<QuantizeCase> cases;
  for (const FormatInfo& f : kFormats)
    for (Dtype dtype : {Dtype::f32, Dtype::f16, Dtype::bf16})
      for (int64_t groups : {1, 2, 3, 5, 30, 31, 33, 64, 100, 257, 1500}) {
        if (quick && groups != 1 && groups != 31 && groups != 100) continue;
        for (int global = 0; global < (f.mode == "nvfp4" ? 2 : 1); global++) {
          const int id = int(cases.size());
          cases.push_back({id, f.format, dtype, groups, global == 1, id % 3 == 2});
        }
      }
  return cases;
}

}  // namespace lowbit::check
