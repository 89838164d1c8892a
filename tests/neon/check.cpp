// Every target of the build against the double reference: products with remainders in M, N and
// K, quantize, dequantize and the round trip of activations, for every format and dtype. No
// MLX, no Python: it also runs cross-compiled, under an emulator.
//
//   check [TARGET ...]    the targets to judge; all that this processor supports by default
//
// Operands end where unreadable memory begins and results start as NaN, so that a read beyond
// an array ends the program and an element that nobody writes is seen.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <string>

#include "cpu/kernels.h"
#include "cpu/pool.h"
#include "reference.h"

using namespace lowbit;
using reference::bytes_of;
using reference::Quantized;

namespace {

uint64_t state = 20240229;
uint64_t draw() {  // splitmix64
  uint64_t z = state += 0x9e3779b97f4a7c15u;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
  z = (z ^ z >> 27) * 0x94d049bb133111ebu;
  return z ^ z >> 31;
}
int between(int low, int high) { return low + int(draw() % uint64_t(high - low + 1)); }
double uniform() { return double(draw() >> 11) * 0x1p-53 * 2.0 - 1.0; }

// Bytes that end at a page nobody may touch.
class Guarded {
 public:
  explicit Guarded(size_t size) {
    const size_t page = size_t(sysconf(_SC_PAGESIZE));
    length_ = (size + page - 1) / page * page + page;
    base_ = static_cast<uint8_t*>(
        mmap(nullptr, length_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED || mprotect(base_ + length_ - page, page, PROT_NONE) != 0) {
      std::perror("check: mmap");
      std::exit(2);
    }
    data_ = base_ + length_ - page - size;
    std::memset(data_, 0xff, size);  // NaN in every float type
  }
  explicit Guarded(const std::vector<uint8_t>& bytes) : Guarded(bytes.size()) {
    std::copy(bytes.begin(), bytes.end(), data_);
  }
  Guarded(const std::vector<double>& values, Dtype d)
      : Guarded(values.size() * size_t(bytes_of(d))) {
    for (size_t i = 0; i < values.size(); i++)
      reference::put(data_ + i * size_t(bytes_of(d)), d, values[i]);
  }
  ~Guarded() { munmap(base_, length_); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  uint8_t* data() const { return data_; }
  double at(int64_t i, Dtype d) const { return reference::get(data_ + i * bytes_of(d), d); }

 private:
  uint8_t *base_, *data_;
  size_t length_;
};

struct Tally {
  const cpu::Target* target;
  int64_t checks = 0, failures = 0;
  template <class What>
  void expect(bool good, What&& what) {
    checks++;
    if (good || failures++ >= 8) return;
    std::printf("FAILED %s: %s\n", target->name, std::string(what()).c_str());
  }
};

bool same(double a, double b) { return a == b || (std::isnan(a) && std::isnan(b)); }

constexpr Dtype kDtypes[] = {Dtype::f32, Dtype::f16, Dtype::bf16};

ScaleType scale_type(const FormatInfo& f, Dtype d) {
  return f.affine() ? ScaleType(int(d)) : f.mode == "nvfp4" ? ScaleType::e4m3 : ScaleType::e8m0;
}

// Random bits. `exact`: values with few significant bits, so that products with small integers
// are exact in float32 in any order, and in bfloat16 pairs.
Quantized random_weight(const FormatInfo& f, Dtype d, int64_t count, bool exact) {
  Quantized q;
  const int top = (1 << f.bits) - 1;
  for (int64_t i = 0; i < count; i++) {
    uint32_t code = uint32_t(between(0, top));
    if (f.mode == "mxfp8" && exact)  // multiples of 1/4 up to 15, of either sign
      code = reference::to_e4m3(between(-15, 15) * (between(0, 1) ? 1.0 : 0.25));
    if (f.mode == "mxfp8" && (code & 0x7f) == 0x7f) code ^= 1;
    q.codes.push_back(code);
  }
  for (int64_t g = 0; g < count / f.group_size; g++) {
    if (f.affine()) {
      const double sign = between(0, 1) ? 1.0 : -1.0;
      const double s = exact ? sign * std::ldexp(1.0, between(-2, 0))
                             : reference::rounded(sign * (0.2 + std::abs(uniform())) / top, d);
      q.scales.push_back(s);
      q.biases.push_back(exact ? -s * between(0, top)
                               : reference::rounded(-s * top * (0.5 + 0.3 * uniform()), d));
    } else if (f.mode == "nvfp4") {
      q.scale_bytes.push_back(uint8_t(between(exact ? 0x28 : 0x08, 0x3f) | between(0, 1) << 7));
    } else {
      q.scale_bytes.push_back(uint8_t(127 + between(-3, 1) - (exact || f.bits == 4 ? 0 : 7)));
    }
  }
  return q;
}

// A product, its operands in guarded memory, and for each result the true value and the
// allowance.
struct Case {
  const FormatInfo* format;  // null: dense weights
  Dtype dtype;
  int64_t M, N, K;
  bool transpose, quantize_x, exact;

  std::string name() const {
    return (format ? std::string(format->name) : "dense") + " " +
           std::string(lowbit::name(dtype)) + " M=" + std::to_string(M) +
           " N=" + std::to_string(N) + " K=" + std::to_string(K) +
           (transpose ? "" : " transpose=False") + (quantize_x ? " qqmm" : "") +
           (exact ? " exact" : "");
  }
};

void check_product(const Case& c, std::vector<Tally>& tallies) {
  const int64_t rows = c.transpose ? c.N : c.K, columns = c.transpose ? c.K : c.N;
  const bool nvfp4 = c.format && c.format->mode == "nvfp4";
  std::vector<double> x(size_t(c.M * c.K)), bias(size_t(c.N)), w;
  for (double& v : x) v = c.exact ? between(-4, 4) : reference::rounded(uniform() * 2, c.dtype);
  for (double& v : bias) v = between(-64, 64);
  Quantized q;
  if (c.format) {
    q = random_weight(*c.format, c.dtype, rows * columns, c.exact);
    w = reference::decode(*c.format, q);
  } else {
    for (int64_t i = 0; i < rows * columns; i++)
      w.push_back(c.exact ? between(-16, 16) : reference::rounded(uniform(), c.dtype));
  }
  const Guarded codes =
      c.format ? Guarded(reference::pack(q.codes, c.format->bits)) : Guarded(w, c.dtype);
  const Guarded scales =
      c.format && c.format->affine() ? Guarded(q.scales, c.dtype) : Guarded(q.scale_bytes);
  const Guarded biases(q.biases, c.dtype), x_memory(x, c.dtype), bias_memory(bias, Dtype::f32);
  const double alpha = nvfp4 ? 0.5 : 1.0;

  if (c.quantize_x)
    x = reference::decode(*c.format, reference::quantize(*c.format, c.dtype, x, 0));
  std::vector<double> want(size_t(c.M * c.N)), slack(want.size());
  // Rounding of a weight to bfloat16 first, and of float32 partial sums. Codes and biases enter
  // apart, so the magnitudes that are summed are bounded by the group's largest value.
  const double unit = std::ldexp(1.0, -reference::float_type(c.dtype).precision);
  const double weight_unit = c.dtype == Dtype::bf16 && !c.quantize_x ? 0x1p-9 : 0.0;
  for (int64_t m = 0; m < c.M; m++)
    for (int64_t n = 0; n < c.N; n++) {
      double sum = 0, sizes = 0, squares = 0;
      for (int64_t k = 0; k < c.K; k++) {
        const double a = x[size_t(m * c.K + k)];
        const double b = w[size_t(c.transpose ? n * c.K + k : k * c.N + n)];
        sum += a * b, sizes += std::abs(a) * (std::abs(b) + 1.0), squares += a * b * a * b;
      }
      const double y = alpha * sum + bias[size_t(n)];
      want[size_t(m * c.N + n)] = y;
      slack[size_t(m * c.N + n)] = unit * std::abs(y) +
                                   8 * 0x1p-24 * (sizes + std::abs(bias[size_t(n)])) +
                                   8 * weight_unit * std::sqrt(squares);
    }

  cpu::Product p{};
  p.format = c.format ? c.format->format : Format::dense;
  p.dense_dtype = c.dtype;
  p.transpose = c.transpose;
  const int64_t row_bytes =
      c.format ? columns * c.format->bits / 8 : columns * bytes_of(c.dtype);
  p.w = {codes.data(),
         codes.data() + rows * row_bytes,
         c.format ? scales.data() : nullptr,
         c.format && c.format->affine() ? biases.data() : nullptr,
         c.format ? scale_type(*c.format, c.dtype) : ScaleType::f32,
         c.format ? c.format->group_size : 0,
         rows,
         columns,
         row_bytes};
  std::vector<int64_t> reversed;  // results go to their rows backwards, as gather may ask
  for (int64_t m = c.M; m-- > 0;) reversed.push_back(m);
  p.x = {x_memory.data(),
         c.dtype,
         c.K,
         reversed.data(),
         c.M,
         c.quantize_x ? p.format : Format::dense,
         0.0f};
  const Problem problem{p.format, c.dtype, c.dtype, c.M, c.N, c.K, c.transpose, c.quantize_x};
  for (Tally& tally : tallies) {
    const Guarded y(size_t(c.M * c.N * bytes_of(c.dtype)));
    p.y = {y.data(),           c.dtype,    c.N,         reversed.data(),
           bias_memory.data(), Dtype::f32, float(alpha)};
    const cpu::Plan plan = cpu::plan(problem, *tally.target);
    const cpu::Kernels& kernels = tally.target->kernels();
    {
      const cpu::Lease lease;
      (plan.kernel == cpu::Plan::Kernel::matvec ? kernels.matvec : kernels.matmul)(
          p, plan, lease.pool());
    }
    for (size_t i = 0; i < want.size(); i++) {
      const double got = y.at(int64_t(i), c.dtype);
      const double exact = reference::rounded(want[i], c.dtype);
      const bool good =
          c.exact ? got == exact : std::abs(got - want[i]) <= slack[i] || same(got, exact);
      tally.expect(good, [&] {
        return c.name() + " [" + std::to_string(i / size_t(c.N)) + "," +
               std::to_string(i % size_t(c.N)) + "]: got " + std::to_string(got) +
               ", expected " + std::to_string(want[i]);
      });
    }
  }
}

// Groups of every kind: ordinary, of one sign, with an outlier, zero, constant, tiny, huge.
std::vector<double> tensor(const FormatInfo& f, Dtype d, int groups) {
  std::vector<double> w;
  for (int g = 0; g < groups; g++) {
    const double size = g % 9 == 5   ? 0x1p-10
                        : g % 9 == 6 ? 1000.0
                                     : 1.0,
                 shift = g % 9 == 1 ? 3 : 0;
    for (int i = 0; i < f.group_size; i++) {
      double v = g % 9 == 2 ? 0.0 : g % 9 == 3 ? -1.25 : size * (uniform() + shift);
      if (g % 9 == 4) v = 0.25 * between(-24, 24);  // ties
      if (g % 9 == 7 && i == 3) v = -60.0;
      w.push_back(reference::rounded(v, d));
    }
  }
  return w;
}

void check_quantize(const FormatInfo& f, Dtype d, double global, std::vector<Tally>& tallies) {
  constexpr int kGroups = 150;  // more than the 128 that a piece of 2048 elements can hold
  const std::vector<double> w = tensor(f, d, kGroups);
  const Quantized want = reference::quantize(f, d, w, global);
  const std::vector<uint8_t> packed = reference::pack(want.codes, f.bits);
  const Guarded source(w, d);
  const std::string name = std::string(f.name) + " " + std::string(lowbit::name(d)) +
                           (global > 0 ? " with a global scale" : "");
  for (Tally& tally : tallies) {
    const cpu::Kernels& kernels = tally.target->kernels();
    const Guarded codes(packed.size()), biases(size_t(kGroups * bytes_of(d)));
    const Guarded scales(size_t(kGroups * (f.affine() ? bytes_of(d) : 1)));
    kernels.quantize(f.format, source.data(), d, kGroups, float(global), codes.data(),
                     scales.data(), f.affine() ? biases.data() : nullptr);
    for (size_t i = 0; i < packed.size(); i++)
      tally.expect(codes.data()[i] == packed[i],
                   [&] { return "quantize " + name + ": byte of codes " + std::to_string(i); });
    for (int g = 0; g < kGroups; g++) {
      const bool good = f.affine() ? scales.at(g, d) == want.scales[size_t(g)] &&
                                         biases.at(g, d) == want.biases[size_t(g)]
                                   : scales.data()[g] == want.scale_bytes[size_t(g)];
      tally.expect(good, [&] {
        return "quantize " + name + ": scale or bias of group " + std::to_string(g);
      });
    }
    // The same row through the round trip of activations. Affine has none: it is not offered.
    if (f.affine()) continue;
    const std::vector<double> values = reference::decode(f, want);
    const Guarded row(w, Dtype::f32);
    kernels.round_trip(f.format, d, reinterpret_cast<float*>(row.data()), int64_t(w.size()),
                       float(global));
    for (size_t i = 0; i < values.size(); i++)
      tally.expect(row.at(int64_t(i), Dtype::f32) == values[i],
                   [&] { return "round trip " + name + ": element " + std::to_string(i); });
  }
}

void check_dequantize(const FormatInfo& f, Dtype d, std::vector<Tally>& tallies) {
  const int64_t rows = 7, columns = f.group_size * 5;
  Quantized q = random_weight(f, d, rows * columns, false);
  const std::vector<double> want = reference::decode(f, q);
  const Guarded codes(reference::pack(q.codes, f.bits)), biases(q.biases, d);
  const Guarded scales = f.affine() ? Guarded(q.scales, d) : Guarded(q.scale_bytes);
  const int64_t row_bytes = columns * f.bits / 8;
  const cpu::Matrix w{codes.data(),
                      codes.data() + rows * row_bytes,
                      scales.data(),
                      f.affine() ? biases.data() : nullptr,
                      scale_type(f, d),
                      f.group_size,
                      rows,
                      columns,
                      row_bytes};
  const double unit = std::ldexp(1.0, -reference::float_type(d).precision);
  for (Tally& tally : tallies) {
    const Guarded out(size_t(rows * columns * bytes_of(d)));
    // In two calls, as two threads would.
    tally.target->kernels().dequantize(f.format, w, 0, 3, 1.0f, out.data(), d);
    tally.target->kernels().dequantize(f.format, w, 3, rows, 1.0f,
                                       out.data() + 3 * columns * bytes_of(d), d);
    for (size_t i = 0; i < want.size(); i++) {
      const double got = out.at(int64_t(i), d);
      // Affine: one rounding to float32 of each of product and sum, and one to the dtype.
      const double scaled = f.affine() ? want[i] - q.biases[i / size_t(f.group_size)] : 0.0;
      const double slack =
          unit * std::abs(want[i]) + 2 * 0x1p-24 * (std::abs(scaled) + std::abs(want[i]));
      tally.expect(
          f.affine() ? std::abs(got - want[i]) <= slack : got == reference::rounded(want[i], d),
          [&] {
            return "dequantize " + std::string(f.name) + " " + std::string(lowbit::name(d)) +
                   ": element " + std::to_string(i) + ", got " + std::to_string(got) +
                   ", expected " + std::to_string(want[i]);
          });
    }
  }
}

void check_products(const FormatInfo* f, Dtype d, std::vector<Tally>& tallies) {
  const int step = f ? f->group_size : 1;
  const auto columns = [&] { return int64_t(f ? step * between(1, 9) : between(1, 300)); };
  // Exact: every M up to 9, then those around the blocks of the kernels.
  for (const int M : {1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 17, 33, 65})
    check_product({f, d, M, between(1, 70), columns(), true, false, true}, tallies);
  for (const int M : {1, 3, 18})
    check_product({f, d, M, step * between(1, 3), between(1, 90), false, false, true}, tallies);
  for (const int M : {1, 2, 5, 8, 16, 40})
    check_product({f, d, M, between(1, 40), columns(), true, false, false}, tallies);
  check_product({f, d, 4, step * between(1, 3), between(1, 90), false, false, false}, tallies);
  check_product({f, d, 3, 5, f ? step * (1152 / step) : 1151, true, false, false}, tallies);
  if (f && (f->mode == "mxfp8" || f->mode == "nvfp4"))
    for (const int M : {1, 2, 7, 20})
      check_product({f, d, M, between(1, 40), columns(), true, true, false}, tallies);
}

bool chosen(const char* name, int argc, char** argv) {
  for (int i = 1; i < argc; i++)
    if (std::string(argv[i]) == name) return true;
  return argc == 1;
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<Tally> tallies;
  for (int i = 0; i < cpu::kTargetCount; i++)
    if (cpu::kTargets[i].supported() && chosen(cpu::kTargets[i].name, argc, argv))
      tallies.push_back({&cpu::kTargets[i]});
  if (tallies.empty() || (argc > 1 && int(tallies.size()) != argc - 1)) {
    std::printf("check: this build has here:");
    for (int i = 0; i < cpu::kTargetCount; i++)
      if (cpu::kTargets[i].supported()) std::printf(" %s", cpu::kTargets[i].name);
    std::printf("\n");
    return 2;
  }
  for (const FormatInfo& f : kFormats)
    for (const Dtype d : kDtypes) {
      check_products(&f, d, tallies);
      check_dequantize(f, d, tallies);
      check_quantize(f, d, 0, tallies);
      if (f.mode == "nvfp4") check_quantize(f, d, 70.0, tallies);
    }
  for (const Dtype d : kDtypes) check_products(nullptr, d, tallies);
  int64_t failures = 0;
  for (const Tally& t : tallies) {
    std::printf("%-14s %lld values checked, %lld wrong\n", t.target->name,
                static_cast<long long>(t.checks), static_cast<long long>(t.failures));
    failures += t.failures;
  }
  return failures ? 1 : 0;
}
