// Number formats by their definitions, for the reference: float64 in and out, nothing of
// kernels/formats, so that a fault in the shared numerics cannot hide here.
#pragma once

#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "host/problem.h"

namespace lowbit::check {

inline constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
inline constexpr double kInf = std::numeric_limits<double>::infinity();

// An IEEE 754 binary format of `exponent` and `mantissa` bits.
struct Ieee {
  int exponent, mantissa;

  int bias() const { return (1 << (exponent - 1)) - 1; }
  int size() const { return (1 + exponent + mantissa) / 8; }

  double decode(uint32_t bits) const {
    const uint32_t m = bits & ((1u << mantissa) - 1);
    const int all = (1 << exponent) - 1, e = int(bits >> mantissa) & all;
    const double sign = bits >> (exponent + mantissa) & 1 ? -1.0 : 1.0;
    if (e == all) return m ? kNan : sign * kInf;
    if (e == 0) return sign * std::ldexp(double(m), 1 - bias() - mantissa);
    return sign * std::ldexp(double(m | 1u << mantissa), e - bias() - mantissa);
  }

  // Nearest, ties to even.
  uint32_t encode(double v) const {
    const uint32_t sign = uint32_t(std::signbit(v)) << (exponent + mantissa);
    const uint32_t inf = ((1u << exponent) - 1) << mantissa;
    if (std::isnan(v)) return sign | inf | 1u << (mantissa - 1);
    if (std::isinf(v)) return sign | inf;
    if (v == 0.0) return sign;
    const int e = std::max(std::ilogb(v), 1 - bias());
    // In steps of 2^(e - mantissa); carries into the exponent by plain addition.
    const auto steps = uint32_t(std::nearbyint(std::ldexp(std::fabs(v), mantissa - e)));
    const uint32_t bits = (uint32_t(e + bias() - 1) << mantissa) + steps;
    return sign | (bits < inf ? bits : inf);
  }

  double round(double v) const { return decode(encode(v)); }
};

inline constexpr Ieee kBinary32{8, 23}, kBinary16{5, 10}, kBrain16{8, 7};

inline const Ieee& ieee(Dtype d) {
  return d == Dtype::f32 ? kBinary32 : d == Dtype::f16 ? kBinary16 : kBrain16;
}

// Unit roundoff, and half the distance between subnormals.
inline double roundoff(Dtype d) { return std::ldexp(1.0, -1 - ieee(d).mantissa); }
inline double underflow(Dtype d) { return std::ldexp(1.0, -ieee(d).bias() - ieee(d).mantissa); }

// Values of all codes of a type of at most 16 bits.
using Table = std::vector<double>;

inline const Table& table16(Dtype d) {
  static const auto make = [](const Ieee& f) {
    Table t(65536);
    for (uint32_t i = 0; i < 65536; i++) t[i] = f.decode(i);
    return t;
  };
  static const Table half = make(kBinary16), brain = make(kBrain16);
  return d == Dtype::f16 ? half : brain;
}

inline const Table& e2m1_values() {
  static const Table t{0, .5, 1, 1.5, 2, 3, 4, 6, -0., -.5, -1, -1.5, -2, -3, -4, -6};
  return t;
}

inline const Table& e4m3_values() {
  static const Table t = [] {
    Table v(256);
    for (int i = 0; i < 256; i++) {
      const int e = i >> 3 & 15, m = i & 7;
      double a = e ? std::ldexp(8.0 + m, e - 10) : std::ldexp(double(m), -9);
      if ((i & 127) == 127) a = kNan;
      v[size_t(i)] = i & 128 ? -a : a;
    }
    return v;
  }();
  return t;
}

inline const Table& e8m0_values() {
  static const Table t = [] {
    Table v(256);
    for (int i = 0; i < 256; i++) v[size_t(i)] = i == 255 ? kInf : std::ldexp(1.0, i - 127);
    return v;
  }();
  return t;
}

// e4m3: nearest, ties to even, saturating at 448 with the sign kept.
inline uint32_t encode_e4m3(double v) {
  const uint32_t sign = std::signbit(v) ? 128 : 0;
  if (std::isnan(v)) return sign | 127;
  const double a = std::fabs(v);
  if (a >= 448.0) return sign | 126;
  if (a == 0.0) return sign;
  const int e = std::max(std::ilogb(a), -6);
  return sign | uint32_t((e + 6) * 8 + int(std::nearbyint(std::ldexp(a, 3 - e))));
}

// e2m1: nearest, ties to the even code, 6 of NaN; the sign is kept, of zero as well.
inline uint32_t encode_e2m1(double v) {
  if (std::isnan(v)) return 7;
  const Table& t = e2m1_values();
  uint32_t code = 0;
  for (; code < 7; code++) {
    const double middle = (t[code] + t[code + 1]) / 2, a = std::fabs(v);
    if (a < middle || (a == middle && code % 2 == 0)) break;
  }
  return code | (std::signbit(v) ? 8u : 0u);
}

inline uint32_t load_bits(const uint8_t* p, int size) {
  uint32_t v = 0;
  std::memcpy(&v, p, size_t(size));
  return v;
}

// Element i of an array of a float dtype.
inline double load_float(const std::vector<uint8_t>& a, Dtype d, int64_t i) {
  const int size = ieee(d).size();
  const uint32_t bits = load_bits(a.data() + i * size, size);
  return d == Dtype::f32 ? double(std::bit_cast<float>(bits)) : table16(d)[bits];
}
inline void store_float(std::vector<uint8_t>& a, Dtype d, int64_t i, double v) {
  const int size = ieee(d).size();
  const uint32_t bits = d == Dtype::f32 ? std::bit_cast<uint32_t>(float(v)) : ieee(d).encode(v);
  std::memcpy(a.data() + i * size, &bits, size_t(size));
}

// Codes of a little-endian bit stream.
inline uint32_t load_code(const uint8_t* stream, int64_t i, int bits) {
  uint32_t code = 0;
  for (int b = 0; b < bits; b++) {
    const int64_t at = i * bits + b;
    code |= uint32_t(stream[at / 8] >> (at % 8) & 1) << b;
  }
  return code;
}
inline void store_code(uint8_t* stream, int64_t i, int bits, uint32_t code) {
  for (int b = 0; b < bits; b++) {
    const int64_t at = i * bits + b;
    const auto bit = uint8_t(1u << (at % 8));
    stream[at / 8] = uint8_t(code >> b & 1 ? stream[at / 8] | bit : stream[at / 8] & ~bit);
  }
}

// Counter-based random numbers.
struct Random {
  uint64_t state;
  explicit Random(uint64_t seed) : state(seed * 0x9e3779b97f4a7c15u + 1) {}
  uint64_t next() {
    uint64_t z = state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
  }
  double uniform() { return double(next() >> 11) * 0x1p-53; }  // [0, 1)
  double normal() {                                            // close enough
    double sum = -2.0;
    for (int i = 0; i < 4; i++) sum += uniform();
    return sum * std::sqrt(3.0);
  }
  int64_t below(int64_t n) { return int64_t(next() % uint64_t(n)); }
};

}  // namespace lowbit::check
