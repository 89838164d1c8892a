// One more token in a cache, and its attention, against float64, without MLX and without
// Python.
//
//   nvcc -std=c++20 -O3 -gencode=arch=compute_90a,code=sm_90a -Ikernels
//     tests/cuda/check_cache_step.cu kernels/cuda/cache_step.cu -o check_cache_step
//   ./check_cache_step; compute-sanitizer --tool memcheck ./check_cache_step --quick
//
// Exits 1 on any failure. y is NaN before it is computed, and so is everything of the cache
// that is not to be read, around it, and between the rows of q, k and v.
#include <cstdio>
#include <cstring>

#include "cuda/cache_step.h"
#include "device_memory.h"
#include "numbers.h"

namespace lowbit::check {
namespace {

struct Case {
  Dtype dtype;
  int sequences, heads, share, dims, at;
  int64_t capacity;
  bool rotates;

  std::string text() const {
    char text[128];
    std::snprintf(text, sizeof text, "%s %d x %d x %d heads of %d, %d of %lld%s",
                  dtype == Dtype::bf16 ? "bf16" : "f16", sequences, heads, share, dims, at,
                  (long long)capacity, rotates ? ", rotates" : "");
    return text;
  }
};

std::vector<Case> cases(bool quick) {
  std::vector<Case> all;
  const std::vector<int> places =
      quick ? std::vector<int>{0, 15, 16, 300}
            : std::vector<int>{0, 1, 7, 15, 16, 31, 63, 100, 255, 256, 300, 1000, 2047, 5000};
  for (Dtype dtype : {Dtype::bf16, Dtype::f16})
    for (int dims : {64, 128})
      for (int at : places)
        for (int share : {1, 3, 4, 8})
          for (auto [sequences, heads] : {std::pair{1, 1}, {1, 8}, {3, 2}, {20, 8}}) {
            if (quick && (share + heads) % 3) continue;
            if (sequences == 20 && at > 1000) continue;
            const int64_t capacity = heads == 2 ? at + 1 : (at + share) / 256 * 256 + 256;
            all.push_back({dtype, sequences, heads, share, dims, at, capacity,
                           (at + share + heads) % 2 == 0});
          }
  return all;
}

// Rows of `heads` heads with a gap before each.
struct Rows {
  std::vector<uint8_t> bytes;
  int64_t sequence, head;

  Rows(const Case& c, int heads, Random& random) {
    head = c.dims + 8, sequence = heads * head + 24;
    bytes.assign(size_t(c.sequences * sequence) * 2, 0xff);
    for (int s = 0; s < c.sequences; s++)
      for (int h = 0; h < heads; h++)
        for (int d = 0; d < c.dims; d++)
          store_float(bytes, c.dtype, at(s, h) + d, 2 * random.normal());
  }
  int64_t at(int s, int h) const { return s * sequence + h * head; }
};

std::vector<double> row_of(const Case& c, const Rows& rows, int s, int h,
                           const std::vector<float>& periods) {
  std::vector<double> x(size_t(c.dims));
  for (int d = 0; d < c.dims; d++)
    x[size_t(d)] = load_float(rows.bytes, c.dtype, rows.at(s, h) + d);
  for (int d = 0; d < c.dims / 2 && !periods.empty(); d++) {
    const double theta = c.at / double(periods[size_t(d)]);
    const double low = x[size_t(d)], high = x[size_t(d + c.dims / 2)];
    x[size_t(d)] = ieee(c.dtype).round(low * std::cos(theta) - high * std::sin(theta));
    x[size_t(d + c.dims / 2)] =
        ieee(c.dtype).round(low * std::sin(theta) + high * std::cos(theta));
  }
  return x;
}

// What is wrong, or nothing; `error` as a part of what is allowed.
std::string check(const Case& c, StreamQueue& queue, DeviceMemory& memory, double& error) {
  Random random(uint64_t(c.at * 131 + c.share * 17 + c.sequences * 7 + c.heads + c.dims));
  const int pairs = c.sequences * c.heads;
  const Rows q(c, c.heads * c.share, random), k(c, c.heads, random), v(c, c.heads, random);
  std::vector<float> periods;
  for (int d = 0; d < c.dims / 2 && c.rotates; d++)
    periods.push_back(float(std::pow(10000.0, 2.0 * d / c.dims)));
  std::vector<uint8_t> keys(size_t(pairs * c.capacity * c.dims) * 2, 0xff), values = keys;
  for (int pair = 0; pair < pairs; pair++)
    for (int64_t i = pair * c.capacity * c.dims, n = i + int64_t(c.at) * c.dims; i < n; i++) {
      store_float(keys, c.dtype, i, random.normal());
      store_float(values, c.dtype, i, random.normal());
    }

  const cudaStream_t stream = queue.stream();
  std::vector<uint8_t> y(size_t(pairs * c.share * c.dims) * 2), keys_after(keys.size()),
      values_after(values.size());
  const auto rows = [&](const Rows& r) {
    return cuda::HeadRows{memory.copy(r.bytes, 2, stream), r.sequence, r.head};
  };
  cuda::CacheStep p{};
  p.dtype = c.dtype, p.sequences = c.sequences, p.heads = c.heads, p.share = c.share;
  p.dims = c.dims, p.at = c.at, p.capacity = c.capacity;
  p.q = rows(q), p.k = rows(k), p.v = rows(v);
  p.keys = memory.copy(keys, 0, stream), p.values = memory.copy(values, 0, stream);
  p.y = memory.make(y.size(), 0, stream);
  p.periods = memory.copy(periods, 0, stream);
  p.scale = float(1 / std::sqrt(double(c.dims)));
  cuda::cache_step(p, queue);
  require(cudaGetLastError(), "launch");
  const bool inside = memory.fetch(p.y, y, stream) & memory.fetch(p.keys, keys_after, stream) &
                      memory.fetch(p.values, values_after, stream);
  queue.wait();
  memory.reset();
  if (!inside) return "wrote beyond a result";

  double error2 = 0.0, want2 = 0.0;
  for (int pair = 0; pair < pairs; pair++) {
    const int s = pair / c.heads, h = pair % c.heads;
    const int64_t base = pair * c.capacity * c.dims, end = base + int64_t(c.at) * c.dims;
    const std::vector<double> new_k = row_of(c, k, s, h, periods),
                              new_v = row_of(c, v, s, h, {});
    for (int d = 0; d < c.dims; d++) {
      store_float(values, c.dtype, end + d, new_v[size_t(d)]);
      // A rotation in float32 may round a few the other way.
      const double got = load_float(keys_after, c.dtype, end + d), want = new_k[size_t(d)];
      if (!(std::fabs(got - want) <= 2 * roundoff(c.dtype) * std::fabs(want) + 0x1p-9))
        return "wrote " + std::to_string(got) + " as a key, expected " + std::to_string(want);
      store_float(keys, c.dtype, end + d, got);
    }
    for (int n = 0; n < c.share; n++) {
      const std::vector<double> row = row_of(c, q, s, h * c.share + n, periods);
      std::vector<double> weight(size_t(c.at + 1)), want(size_t(c.dims));
      double sum = 0.0;
      for (int token = 0; token <= c.at; token++) {
        double score = 0.0;
        for (int d = 0; d < c.dims; d++)
          score +=
              row[size_t(d)] *
              (token == c.at ? new_k[size_t(d)]
                             : load_float(keys, c.dtype, base + int64_t(token) * c.dims + d));
        sum += weight[size_t(token)] = std::exp(score * double(p.scale));
      }
      for (int token = 0; token <= c.at; token++)
        for (int d = 0; d < c.dims; d++)
          want[size_t(d)] += weight[size_t(token)] / sum *
                             load_float(values, c.dtype, base + int64_t(token) * c.dims + d);
      for (int d = 0; d < c.dims; d++) {
        const double got = load_float(y, c.dtype, (int64_t(pair) * c.share + n) * c.dims + d);
        if (!std::isfinite(got)) return "y is not finite";
        error2 += (got - want[size_t(d)]) * (got - want[size_t(d)]);
        want2 += want[size_t(d)] * want[size_t(d)];
      }
    }
  }
  if (keys != keys_after || values != values_after) return "another row of the cache changed";
  error = std::sqrt(error2 / want2) / (2 * roundoff(c.dtype));
  return error <= 1.0 ? "" : "error is " + std::to_string(error) + " of the bound";
}

int run(bool quick) {
  StreamQueue queue;
  DeviceMemory memory(quick);
  int failures = 0, count = 0;
  double worst = 0.0;
  for (const Case& c : cases(quick)) {
    double error = 0.0;
    const std::string wrong = check(c, queue, memory, error);
    count++, worst = std::max(worst, error);
    if (!wrong.empty() && failures++ < 20)
      std::printf("FAILED %s: %s\n", c.text().c_str(), wrong.c_str());
  }
  std::printf("cache_step %d cases, %d failed; worst error %.3f of the bound\n", count,
              failures, worst);
  return failures ? 1 : 0;
}

}  // namespace
}  // namespace lowbit::check

int main(int argc, char** argv) {
  try {
    return lowbit::check::run(argc > 1 && !std::strcmp(argv[1], "--quick"));
  } catch (const std::exception& e) {
    std::fprintf(stderr, "FAILED %s\n", e.what());
    return 1;
  }
}
