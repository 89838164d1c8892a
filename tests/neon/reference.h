// The formats once more, in double and one element at a time: what check.cpp holds the kernels
// to. Nothing here reads kernels/formats but the names and sizes of the formats.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "host/problem.h"

namespace reference {

using lowbit::Dtype;
using lowbit::FormatInfo;

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

struct FloatType {
  int precision, min_exponent;  // significant bits; exponent of the smallest normal
  double largest;
};

inline FloatType float_type(Dtype d) {
  switch (d) {
    case Dtype::f32:
      return {24, -126, std::numeric_limits<float>::max()};
    case Dtype::f16:
      return {11, -14, 65504.0};
    case Dtype::bf16:
      return {8, -126, 255.0 * std::ldexp(1.0, 120)};
  }
  return {};
}

// To the nearest value of the type, ties to even, subnormals kept.
inline double rounded(double x, FloatType t) {
  if (x == 0.0 || !std::isfinite(x)) return x;
  const int exponent = std::max(std::ilogb(x), t.min_exponent) - t.precision + 1;
  const double y = std::ldexp(std::nearbyint(std::ldexp(x, -exponent)), exponent);
  return std::abs(y) > t.largest ? std::copysign(INFINITY, x) : y;
}
inline double rounded(double x, Dtype d) { return rounded(x, float_type(d)); }
inline double f32(double x) { return rounded(x, Dtype::f32); }

inline int bytes_of(Dtype d) { return d == Dtype::f32 ? 4 : 2; }

// Stores a value that the type holds.
inline void put(uint8_t* to, Dtype d, double x) {
  const float f = float(x);
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  if (d == Dtype::f16) {
    const uint32_t sign = bits >> 16 & 0x8000;
    const double a = std::abs(x);
    bits = std::isnan(x) ? 0x7e00
           : a > 65504.0 ? sign | 0x7c00
           : a < std::ldexp(1.0, -14)
               ? sign | uint32_t(std::ldexp(a, 24))
               : sign | uint32_t((std::ilogb(a) + 15) << 10 |
                                 (int(std::ldexp(a, 10 - std::ilogb(a))) & 0x3ff));
  } else if (d == Dtype::bf16) {
    bits >>= 16;
  }
  std::memcpy(to, &bits, size_t(bytes_of(d)));
}

inline double get(const uint8_t* from, Dtype d) {
  uint32_t bits = 0;
  std::memcpy(&bits, from, size_t(bytes_of(d)));
  if (d == Dtype::f16) {
    const int exponent = bits >> 10 & 31, fraction = bits & 0x3ff;
    const double a = exponent == 31 ? (fraction ? kNan : INFINITY)
                     : exponent     ? std::ldexp(1024 + fraction, exponent - 25)
                                    : std::ldexp(fraction, -24);
    return bits & 0x8000 ? -a : a;
  }
  if (d == Dtype::bf16) bits <<= 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

inline double e2m1(uint32_t code) {
  constexpr double values[] = {0, 0.5, 1, 1.5, 2, 3, 4, 6};
  return code & 8 ? -values[code & 7] : values[code & 7];
}
inline double e4m3(uint32_t code) {
  const int exponent = code >> 3 & 15, fraction = code & 7;
  const double a = (code & 0x7f) == 0x7f ? kNan
                   : exponent            ? std::ldexp(8 + fraction, exponent - 10)
                                         : std::ldexp(fraction, -9);
  return code & 0x80 ? -a : a;
}
inline double e8m0(uint32_t byte) {
  return byte == 255 ? double(INFINITY) : std::ldexp(1.0, int(byte) - 127);
}

// Nearest by search; ties to the even code, beyond the largest value the largest.
inline uint32_t to_e4m3(double x) {
  const uint32_t sign = std::signbit(x) ? 0x80 : 0;
  const double a = std::abs(x);
  uint32_t best = 0;
  for (uint32_t c = 1; c < 0x7f; c++) {
    const double closer = std::abs(e4m3(best) - a) - std::abs(e4m3(c) - a);
    if (closer > 0 || (closer == 0 && c % 2 == 0)) best = c;
  }
  return sign | best;
}
// Ties to the smaller magnitude; what becomes zero is +0.
inline uint32_t to_e2m1(double x) {
  uint32_t best = 0;
  for (uint32_t c = 1; c < 8; c++)
    if (std::abs(e2m1(c) - std::abs(x)) < std::abs(e2m1(best) - std::abs(x))) best = c;
  return best && x < 0 ? best | 8 : best;
}

// Codes and scales of a tensor of rows, one value an entry, not packed.
struct Quantized {
  std::vector<uint32_t> codes;
  std::vector<double> scales, biases;  // biases: affine only
  std::vector<uint8_t> scale_bytes;    // else
};

inline double element(const FormatInfo& f, uint32_t code) {
  return f.affine() ? code : f.bits == 4 ? e2m1(code) : e4m3(code);
}
inline double scale_of(const FormatInfo& f, uint8_t byte) {
  return f.mode == "nvfp4" ? e4m3(byte) : e8m0(byte);
}

// mx.quantize of one group: float32 arithmetic for affine, the tensor's type elsewhere.
inline void quantize_group(const FormatInfo& f, Dtype d, const double* w, double global,
                           Quantized& out) {
  const int G = f.group_size;
  if (f.affine()) {
    const double low = *std::min_element(w, w + G), high = *std::max_element(w, w + G);
    const double steps = (1 << f.bits) - 1;
    const bool low_edge = std::abs(low) > std::abs(high);
    double s = std::max(f32(f32(high - low) / steps), double(1e-7f));
    s = low_edge ? s : -s;
    const double edge = low_edge ? low : high, zero_at = std::nearbyint(f32(edge / s));
    if (zero_at != 0) s = f32(edge / zero_at);
    const double b = zero_at != 0 ? edge : 0.0;
    for (int i = 0; i < G; i++)
      out.codes.push_back(
          uint32_t(std::clamp(std::nearbyint(f32(f32(w[i] - b) / s)), 0.0, steps)));
    out.scales.push_back(rounded(s, d));
    out.biases.push_back(rounded(b, d));
    return;
  }
  double most = 0;
  for (int i = 0; i < G; i++) most = std::max(most, std::abs(w[i]));
  const double q = rounded(most / (f.bits == 4 ? 6.0 : 448.0), d);
  if (f.mode == "nvfp4") {
    const double enlarge = global > 0 ? f32(2688.0 / global) : 1.0;
    const uint32_t byte = to_e4m3(f32(q * enlarge));
    out.scale_bytes.push_back(uint8_t(byte));
    for (int i = 0; i < G; i++)
      out.codes.push_back(byte ? to_e2m1(f32(rounded(w[i] / e4m3(byte), d) * enlarge)) : 0);
    return;
  }
  int exponent = 0;
  if (q != 0) {
    const double m = std::frexp(q, &exponent);
    if (m == 0.5) exponent--;
  }
  out.scale_bytes.push_back(uint8_t(exponent + 127));
  for (int i = 0; i < G; i++) {
    const double y = std::ldexp(w[i], -exponent);
    out.codes.push_back(f.bits == 4 ? to_e2m1(y) : to_e4m3(y));
  }
}

inline Quantized quantize(const FormatInfo& f, Dtype d, const std::vector<double>& w,
                          double global) {
  Quantized out;
  for (size_t i = 0; i < w.size(); i += size_t(f.group_size))
    quantize_group(f, d, w.data() + i, global, out);
  return out;
}

inline std::vector<double> decode(const FormatInfo& f, const Quantized& q) {
  std::vector<double> w(q.codes.size());
  for (size_t i = 0; i < w.size(); i++) {
    const size_t g = i / size_t(f.group_size);
    const double e = element(f, q.codes[i]);
    w[i] = f.affine() ? q.scales[g] * e + q.biases[g] : scale_of(f, q.scale_bytes[g]) * e;
  }
  return w;
}

// One little-endian bit stream.
inline std::vector<uint8_t> pack(const std::vector<uint32_t>& codes, int bits) {
  std::vector<uint8_t> bytes(codes.size() * size_t(bits) / 8, 0);
  for (size_t i = 0; i < codes.size(); i++)
    for (int b = 0; b < bits; b++) {
      const size_t at = i * size_t(bits) + size_t(b);
      bytes[at / 8] = uint8_t(bytes[at / 8] | (codes[i] >> b & 1) << at % 8);
    }
  return bytes;
}

}  // namespace reference
