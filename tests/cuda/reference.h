// Encoding by the rules of mx.quantize on a GPU and products in float64, from the packed bits.
#pragma once

#include <algorithm>

#include "numbers.h"

namespace lowbit::check {

// One packed matrix [rows, columns] (or several, one after the other) on the host.
struct HostWeights {
  std::vector<uint8_t> codes, scales, biases;
  ScaleType scale_type;
};

inline bool is_bytes(ScaleType s) { return s == ScaleType::e8m0 || s == ScaleType::e4m3; }
inline int size_of(ScaleType s) { return is_bytes(s) ? 1 : ieee(Dtype(int(s))).size(); }

inline double load_scale(const std::vector<uint8_t>& a, ScaleType s, int64_t i) {
  if (s == ScaleType::e8m0) return e8m0_values()[a[size_t(i)]];
  if (s == ScaleType::e4m3) return e4m3_values()[a[size_t(i)]];
  return load_float(a, Dtype(int(s)), i);
}

inline double element_value(const FormatInfo& f, uint32_t code) {
  if (f.affine()) return double(code);
  return f.bits == 8 ? e4m3_values()[code] : e2m1_values()[code];
}

// `count` values from element `first` (start of a group) on; reach: what the terms of a value
// may come to, |scale| * (2^bits - 1) + |bias| where a kernel may take them apart.
inline void decode(const FormatInfo& f, const HostWeights& w, int64_t first, int64_t count,
                   double* value, double* reach) {
  const uint8_t* stream = w.codes.data();
  for (int64_t i = first; i < first + count; i++, value++) {
    const int64_t group = i / f.group_size;
    const double s = load_scale(w.scales, w.scale_type, group);
    *value = s * element_value(f, load_code(stream, i, f.bits));
    double most = std::fabs(*value);
    if (f.affine()) {
      const double b = load_scale(w.biases, w.scale_type, group);
      *value += b;
      most = std::fabs(s) * double((1 << f.bits) - 1) + std::fabs(b);
    }
    if (reach) *reach++ = most;
  }
}

// One group as mx.quantize stores it. Scale and bias are bits of the dtype, or a scale byte.
struct EncodedGroup {
  uint32_t scale = 0, bias = 0;
  bool finite = true;  // else only "decodes to NaN" is promised
  uint32_t codes[128] = {};
};

inline void encode_affine(const FormatInfo& f, Dtype dtype, const float* w, EncodedGroup& out) {
  const float steps = float((1 << f.bits) - 1);
  const float low = *std::min_element(w, w + f.group_size);
  const float high = std::max(*std::max_element(w, w + f.group_size), 0.0f);
  const bool low_edge = std::fabs(low) > std::fabs(high);
  float scale = std::max((high - low) / steps, 1e-7f), bias = 0.0f;
  if (!low_edge) scale = -scale;
  const float edge = low_edge ? low : high, to_zero = std::round(edge / scale);
  if (to_zero != 0.0f) scale = edge / to_zero, bias = edge;
  out.scale = ieee(dtype).encode(double(scale));
  out.bias = ieee(dtype).encode(double(bias));
  for (int i = 0; i < f.group_size; i++)
    out.codes[i] = uint32_t(std::clamp(std::round((w[i] - bias) / scale), 0.0f, float(steps)));
}

inline void encode_blocks(const FormatInfo& f, const float* w, float global,
                          EncodedGroup& out) {
  float most = 0.0f;
  for (int i = 0; i < f.group_size; i++) most = std::max(most, std::fabs(w[i]));
  const float q = most / (f.bits == 8 ? 448.0f : 6.0f);
  if (f.mode == "nvfp4") {
    const float enlarge = global > 0.0f ? 2688.0f / global : 1.0f;
    out.scale = encode_e4m3(double(q * enlarge));
    const float factor = enlarge / float(e4m3_values()[out.scale]);
    for (int i = 0; i < f.group_size; i++) out.codes[i] = encode_e2m1(double(w[i] * factor));
    return;
  }
  int n = -127;
  if (q != 0.0f) {
    const double mantissa = std::frexp(double(q), &n);
    if (mantissa == 0.5) n--;
  }
  n = std::max(n, -127);
  out.scale = uint32_t(n + 127);
  for (int i = 0; i < f.group_size; i++) {
    const double y = std::ldexp(double(w[i]), -n);
    out.codes[i] = f.bits == 8 ? encode_e4m3(y) : encode_e2m1(y);
  }
}

inline EncodedGroup encode_group(const FormatInfo& f, Dtype dtype, const float* w,
                                 float global) {
  EncodedGroup out;
  for (int i = 0; i < f.group_size; i++) out.finite &= std::isfinite(w[i]);
  if (!out.finite) return out;
  if (f.affine())
    encode_affine(f, dtype, w, out);
  else
    encode_blocks(f, w, global, out);
  return out;
}

// Row <- decode(encode(row)) without the global factor; a group with NaN or infinity: NaN.
inline void round_trip(const FormatInfo& f, Dtype dtype, double* row, int64_t count,
                       float global) {
  std::vector<float> w(size_t(f.group_size));
  const Table& scales = f.mode == "nvfp4" ? e4m3_values() : e8m0_values();
  for (int64_t k = 0; k < count; k += f.group_size) {
    for (int i = 0; i < f.group_size; i++) w[size_t(i)] = float(row[k + i]);
    const EncodedGroup g = encode_group(f, dtype, w.data(), global);
    for (int i = 0; i < f.group_size; i++)
      row[k + i] = g.finite ? scales[g.scale] * element_value(f, g.codes[i]) : kNan;
  }
}

// y[M, N] = x[M, K] @ w[N, K]^T with its error measures: rms, the size of a sum whose terms
// have random signs, and worst, the sum of the magnitudes of all that is added.
struct Sums {
  double value, rms2, worst;
};

inline Sums dot(const double* x, const double* w, const double* reach, int64_t K) {
  constexpr int kLanes = 8;  // independent sums, which compilers turn into vectors
  double v[kLanes] = {}, r[kLanes] = {}, m[kLanes] = {};
  int64_t k = 0;
  const auto add = [&](int lane, int64_t at) {
    const double term = x[at] * w[at];
    v[lane] += term;
    r[lane] += term * term;
    m[lane] += std::fabs(x[at]) * reach[at];
  };
  for (; k + kLanes <= K; k += kLanes)
    for (int i = 0; i < kLanes; i++) add(i, k + i);
  for (; k < K; k++) add(0, k);
  Sums s{};
  for (int i = 0; i < kLanes; i++) s.value += v[i], s.rms2 += r[i], s.worst += m[i];
  return s;
}

}  // namespace lowbit::check
