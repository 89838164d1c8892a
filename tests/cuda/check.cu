// The CUDA kernels against a float64 reference, without MLX and without Python.
//
//   nvcc -std=c++20 -O3 -gencode=arch=compute_90a,code=sm_90a -Ikernels
//     tests/cuda/check.cu, those of kernels/cuda/ that are to be checked, -o check
//   ./check; compute-sanitizer --tool memcheck ./check --quick
//
// For --tool racecheck, kernels are compiled with -DLOWBIT_RACECHECK: one lane arrives at a
// barrier for its warp, after __syncwarp, and racecheck orders what that lane wrote but not
// what the others did (of the 256 words that 8 rows of a fragment read, it reported all but
// those written by lane 0). With the definition every lane arrives. Clusters are checked by
// --plan kernel=matmul,tokens=64,rows=256,split_k=2.
//
// Kernels that are not linked are left out, and said to be. Exits 1 on any failure. Results are
// NaN before they are computed, and so is everything around operands.
#include <atomic>
#include <chrono>
#include <cstdio>
#include <functional>
#include <mutex>
#include <thread>

#include "cases.h"
#include "cuda/matmul_rules.h"
#include "cuda/matvec_rules.h"
#include "cuda/skinny_rules.h"
#include "device_memory.h"
#include "encoders.h"
#include "options.h"
#include "quantize_cases.h"
#include "stream_queue.h"

namespace lowbit::cuda {
// Null when the file that defines it is not linked.
__attribute__((weak)) void simt(const Product&, const Plan&, Queue&);
__attribute__((weak)) void matvec(const Product&, const Plan&, Queue&);
__attribute__((weak)) void skinny(const Product&, const Plan&, Queue&);
__attribute__((weak)) void matmul(const Product&, const Plan&, Queue&);
__attribute__((weak)) void quantize(Format, const void*, Dtype, int64_t, const float*, uint8_t*,
                                    void*, void*, Queue&);
__attribute__((weak)) void dequantize(Format, const Weights&, const float*, void*, Dtype,
                                      Queue&);
__attribute__((weak)) void run(const Product&, Queue&);
__attribute__((weak)) void run(const Product&, const Plan&, Queue&);
}  // namespace lowbit::cuda

namespace lowbit::check {
namespace {

Problem problem_of(const Case& c) {
  return {c.format, c.dtype, c.dtype, c.M, c.N, c.K, c.transpose, c.quantize_x, c.pairs > 0};
}

struct ProductKernel {
  const char* name;
  void (*run)(const cuda::Product&, const cuda::Plan&, cuda::Queue&);
  cuda::Plan (*plan)(const Problem&, const cuda::Device&);
  bool exact;        // weights stay float32, infinities keep their sign
  size_t alignment;  // of x and codes, in bytes, that run() sees to
  bool (*takes)(const Case&, const cuda::Device&);
};

// Operands as MLX's ops promote them.
bool promoted(const Case& c) {
  return c.scale_type == default_scales(c.info(), c.dtype) &&
         (!c.bias || *c.bias == Dtype::f32 || *c.bias == c.dtype);
}
// What the tensor-core kernels are asked for.
bool takes_pairs(const Case& c) { return c.transpose && c.dtype != Dtype::f32 && promoted(c); }

using Run = decltype(ProductKernel::run);
// Quantizes x where asked for, and runs the plan that it is given.
const Run kRun = static_cast<Run>(cuda::run);
// As MLX's ops run a product: whichever kernel it is.
Run run_as_planned() {
  if (!kRun) return nullptr;
  return [](const cuda::Product& p, const cuda::Plan&, cuda::Queue& q) { cuda::run(p, q); };
}
// Quantized x comes in lane order. Where run.cpp is not linked there is none.
Run run_matmul() { return cuda::matmul && kRun ? kRun : cuda::matmul; }

cuda::Plan plain_plan(const Problem&, const cuda::Device&) {
  return {cuda::Plan::Kernel::simt, 0, 0, 0, 0};
}

// Every tiling of matmul takes its turn: for shapes that are quick to check its plan prefers
// few tokens. `run` has plans as they are.
cuda::Plan any_matmul_plan(const Problem& p, const cuda::Device& device) {
  const int64_t turn = p.M + p.N + p.K / 32 + 7 * int64_t(p.format), units = (p.K + 127) / 128;
  const auto& t = cuda::kMatmulTilings[turn % std::size(cuda::kMatmulTilings)];
  cuda::Plan plan{cuda::Plan::Kernel::matmul, t.tokens, turn % 2 ? 256 : 128, 8, 1};
  const int64_t tiles = (p.M + plan.tokens - 1) / plan.tokens * ((p.N + 127) / 128);
  const bool two_clusters = t.tokens <= 128 && tiles * 4 <= device.processors / 2;
  for (int split = two_clusters ? 4 : cuda::kMostClusterSplit; split > 1; split--)
    if (turn / 2 % 4 >= split - 1 && cuda::splits(units, split)) {
      plan.split_k = split;
      break;
    }
  return plan;
}

const ProductKernel kKernels[] = {
    {"simt", cuda::simt, plain_plan, true, 1,
     [](const Case&, const cuda::Device&) { return true; }},
    {"matvec", cuda::matvec, cuda::matvec_plan, false, 1,
     [](const Case& c, const cuda::Device& device) {
       return takes_pairs(c) && cuda::matvec_supports(problem_of(c), device);
     }},
    {"skinny", cuda::skinny, cuda::skinny_plan, false, 16,
     [](const Case& c, const cuda::Device& device) {
       return takes_pairs(c) && !c.pairs && !c.offset &&
              cuda::skinny_supports(problem_of(c), device);
     }},
    {"matmul", run_matmul(), any_matmul_plan, false, 16,
     [](const Case& c, const cuda::Device& device) {
       Problem p = problem_of(c);
       if (p.quantize_x && (c.dtype != Dtype::bf16 || !kRun)) return false;
       p.quantize_x = false;
       return takes_pairs(c) && !c.pairs && cuda::matmul_supports(p, device);
     }},
    {"run", run_as_planned(), plain_plan, false, 1,
     [](const Case& c, const cuda::Device&) {
       return c.dtype == Dtype::f32 || (c.pairs > 0 && promoted(c)) || takes_pairs(c);
     }},
};

// What one kind of check came to.
struct Tally {
  std::mutex mutex;
  int64_t cases = 0, failures = 0;
  double norm = 0.0, element = 0.0;  // worst error as a part of what is allowed
  std::string norm_at, element_at;

  void add(double n, double e, const std::string& failure, const std::string& text) {
    const std::lock_guard lock(mutex);
    cases++;
    if (n > norm) norm = n, norm_at = text;
    if (e > element) element = e, element_at = text;
    if (failure.empty()) return;
    if (failures++ < 20) std::printf("FAILED %s: %s\n", text.c_str(), failure.c_str());
  }
  bool report(const char* name) const {
    std::printf("%-10s %6lld cases, %lld failed; worst error %.3f of the bound (%s)", name,
                (long long)cases, (long long)failures, norm, norm_at.c_str());
    if (element > 0.0) std::printf(", of an element %.3f (%s)", element, element_at.c_str());
    std::printf("\n");
    return failures == 0;
  }
};

void parallel(unsigned threads, int64_t count, const std::function<void(int64_t)>& f) {
  std::atomic<int64_t> next{0};
  std::vector<std::thread> team;
  std::mutex mutex;
  std::exception_ptr error;
  for (unsigned t = 0; t < threads; t++)
    team.emplace_back([&] {
      try {
        for (int64_t i; (i = next++) < count;) f(i);
      } catch (...) {
        next = count;
        const std::lock_guard lock(mutex);
        if (!error) error = std::current_exception();
      }
    });
  for (std::thread& t : team) t.join();
  if (error) std::rethrow_exception(error);
}

// The device, for one case at a time.
struct Bench {
  StreamQueue queue;
  DeviceMemory memory;
  std::mutex mutex;
  const Options& options;
  explicit Bench(const Options& o) : memory(o.exact), options(o) {}

  cuda::Plan plan_of(const ProductKernel& kernel, const Case& c) const {
    cuda::Plan p = kernel.plan(problem_of(c), queue.device());
    options.override(p);
    return p;
  }

  // The bits of y; `failure` says what went wrong.
  std::vector<uint8_t> run(const ProductKernel& kernel, const Case& c, const Operands& o,
                           std::string& failure) {
    const std::lock_guard lock(mutex);
    const cudaStream_t s = queue.stream();
    const size_t dtype_size = size_t(ieee(c.dtype).size());
    const auto off = [&](size_t element) { return c.offset ? element : 0; };
    const size_t scale_offset = off(size_t(size_of(c.scale_type)));
    // x and codes only as far out of line as the kernel takes them.
    const auto off_aligned = [&](size_t element) {
      return off((element + kernel.alignment - 1) / kernel.alignment * kernel.alignment);
    };
    cuda::Product p{};
    p.format = c.format, p.transpose = c.transpose, p.quantize_x = c.quantize_x;
    p.dtype = c.dtype, p.M = c.M, p.N = c.N, p.K = c.K;
    const FormatInfo& f = c.info();
    p.w = {memory.copy(o.w.codes, off_aligned(4), s),
           memory.copy(o.w.scales, scale_offset, s),
           memory.copy(o.w.biases, scale_offset, s),
           c.scale_type,
           f.group_size,
           c.pairs ? c.w_matrices : 1,
           c.stored_rows(),
           c.stored_columns(),
           c.stored_columns() * f.bits / 8};
    p.x = memory.copy(o.x, off_aligned(dtype_size), s);
    std::vector<uint8_t> y(size_t(c.y_rows() * c.N) * dtype_size);
    p.y = memory.make(y.size(), 0, s);
    p.bias = memory.copy(o.bias, c.bias ? off(size_t(ieee(*c.bias).size())) : 0, s);
    p.bias_dtype = c.bias.value_or(Dtype::f32);
    p.global_x = memory.copy(o.global_x, 0, s);
    p.global_w = memory.copy(o.global_w, 0, s);
    p.global_w_count = int64_t(o.global_w.size());
    p.lhs = memory.copy(o.lhs, 0, s);
    p.rhs = memory.copy(o.rhs, 0, s);
    p.pairs = c.pairs;
    p.x_matrices = c.pairs ? c.x_matrices : 1;
    kernel.run(p, plan_of(kernel, c), queue);
    require(cudaGetLastError(), "launch");
    if (!memory.fetch(p.y, y, s)) failure = "wrote beyond y";
    queue.wait();
    memory.reset();
    return y;
  }
};

void compare(const ProductKernel& kernel, const Case& c, const std::vector<Sums>& want,
             const std::vector<uint8_t>& bits, std::string failure, Tally& tally) {
  const double unit = roundoff(c.dtype), least = underflow(c.dtype);
  const double per_term = double(c.K + 8) * 0x1p-24 + (kernel.exact ? 0.0 : unit);
  double error2 = 0.0, want2 = 0.0, rms2 = 0.0, element = 0.0;
  int64_t finite = 0;
  for (size_t i = 0; i < want.size() && failure.empty(); i++) {
    const double got = load_float(bits, c.dtype, int64_t(i)), w = want[i].value;
    const auto fail = [&] {
      failure = "element " + std::to_string(i) + " is " + std::to_string(got) + ", expected " +
                std::to_string(w);
    };
    if (!std::isfinite(w)) {
      const bool right = std::isnan(w) || !kernel.exact ? !std::isfinite(got) : got == w;
      if (!right || (std::isnan(w) && kernel.exact && !std::isnan(got))) fail();
      continue;
    }
    const double error = std::fabs(got - w);
    const double limit = unit * 1.001 * std::fabs(w) + per_term * want[i].worst + least;
    if (!(error <= limit)) fail();
    element = std::max(element, error / limit);
    error2 += error * error, want2 += w * w, rms2 += want[i].rms2;
    finite++;
  }
  double tolerance = unit;
  if (c.dtype == Dtype::f32)
    tolerance = 1e-6 * std::sqrt(double(std::max<int64_t>(c.K, 2048)) / 2048);
  if (finite < 32) tolerance *= 2;  // too few roundings to average out
  const double allowed =
      tolerance * std::sqrt(std::max(want2, rms2)) + least * std::sqrt(double(finite));
  const double norm = finite ? std::sqrt(error2) / allowed : 0.0;
  if (failure.empty() && norm > 1.0)
    failure = "error is " + std::to_string(norm) + " of the bound";
  tally.add(norm, element, failure, c.text());
}

bool check_products(Bench& bench, unsigned threads) {
  const std::vector<Case> cases = product_cases(bench.options.quick);
  Tally tallies[std::size(kKernels)];
  const auto wants = [&](const ProductKernel& k, const Case& c) {
    return k.run && bench.options.selects(k.name) && k.takes(c, bench.queue.device());
  };
  parallel(threads, int64_t(cases.size()), [&](int64_t i) {
    const Case& c = cases[size_t(i)];
    if (!bench.options.keeps(c.text())) return;
    bool any = false;
    for (const ProductKernel& k : kKernels) any |= wants(k, c);
    if (!any) return;
    const Operands operands = make_operands(c);
    const std::vector<Sums> want = expected(c, operands);
    for (size_t k = 0; k < std::size(kKernels); k++) {
      if (!wants(kKernels[k], c)) continue;
      std::string failure;
      if (bench.options.verbose) std::printf("%s %s\n", kKernels[k].name, c.text().c_str());
      const std::vector<uint8_t> y = bench.run(kKernels[k], c, operands, failure);
      compare(kKernels[k], c, want, y, failure, tallies[k]);
    }
  });
  bool good = true;
  for (size_t k = 0; k < std::size(kKernels); k++) {
    if (!bench.options.selects(kKernels[k].name)) continue;
    if (!kKernels[k].run) {
      std::printf("%-10s not linked\n", kKernels[k].name);
      good &= bench.options.selected.empty();
      continue;
    }
    good &= tallies[k].report(kKernels[k].name) && tallies[k].cases > 0;
  }
  return good;
}

// quantize: bit for bit. dequantize: one rounding of the exact value.
bool check_quantize(Bench& bench, unsigned threads) {
  if (!bench.options.selects("quantize")) return true;
  if (!cuda::quantize || !cuda::dequantize) {
    std::printf("%-10s not linked\n", "quantize");
    return bench.options.selected.empty();
  }
  const std::vector<QuantizeCase> cases = quantize_cases(bench.options.quick);
  Tally encoded, decoded;
  parallel(threads, int64_t(cases.size()), [&](int64_t i) {
    const QuantizeCase& c = cases[size_t(i)];
    if (!bench.options.keeps(c.text())) return;
    const FormatInfo& f = c.info();
    const std::vector<uint8_t> w = make_tensor(c);
    HostWeights got = empty_weights(c);
    const HostWeights source = make_weights(c);
    std::vector<uint8_t> values(size_t(c.groups * f.group_size * ieee(c.dtype).size()));
    bool inside = true;
    {
      const std::lock_guard lock(bench.mutex);
      const cudaStream_t s = bench.queue.stream();
      const size_t offset = c.offset ? size_t(ieee(c.dtype).size()) : 0;
      DeviceMemory& m = bench.memory;
      const void* in = m.copy(w, offset, s);
      const float* global = m.copy(c.globals(), 0, s);
      auto* codes = static_cast<uint8_t*>(m.make(got.codes.size(), 0, s));
      void* scales = m.make(got.scales.size(), 0, s);
      void* biases = f.affine() ? m.make(got.biases.size(), 0, s) : nullptr;
      cuda::quantize(c.format, in, c.dtype, c.groups, global, codes, scales, biases,
                     bench.queue);
      const size_t scale_offset = c.offset ? size_t(size_of(source.scale_type)) : 0;
      const cuda::Weights packed{m.copy(source.codes, c.offset ? 4 : 0, s),
                                 m.copy(source.scales, scale_offset, s),
                                 m.copy(source.biases, scale_offset, s),
                                 source.scale_type,
                                 f.group_size,
                                 1,
                                 c.rows(),
                                 c.groups / c.rows() * f.group_size,
                                 c.groups / c.rows() * f.group_size * f.bits / 8};
      void* out = m.make(values.size(), 0, s);
      cuda::dequantize(c.format, packed, global, out, c.dtype, bench.queue);
      require(cudaGetLastError(), "launch");
      inside &= m.fetch(codes, got.codes, s) && m.fetch(scales, got.scales, s);
      if (biases) inside &= m.fetch(biases, got.biases, s);
      inside &= m.fetch(out, values, s);
      bench.queue.wait();
      m.reset();
    }
    const std::string beyond = inside ? "" : "wrote beyond a result";
    const std::string wrong = compare_encoded(c, w, got);
    encoded.add(0.0, 0.0, wrong.empty() ? beyond : wrong, c.text());
    double worst = 0.0;
    const std::string off = compare_decoded(c, source, values, worst);
    decoded.add(worst, 0.0, off.empty() ? beyond : off, c.text());
  });
  bool good = encoded.report("quantize") & decoded.report("dequantize");
  const auto codes = [&]<class Code>(const char* name, Code) {
    const uint64_t wrong = differences<Code>(bench.queue, bench.memory, bench.options.quick);
    std::printf("%-10s %llu codes differ\n", name, (unsigned long long)wrong);
    good &= wrong == 0;
  };
  codes("e2m1", E2m1{});
  codes("e4m3", E4m3{});
  codes("3 bits", Unsigned<3>{});
  codes("8 bits", Unsigned<8>{});
  const uint64_t wrong = wrong_quotients(bench.queue, bench.memory, bench.options.quick);
  std::printf("quotients  %llu differ\n", (unsigned long long)wrong);
  good &= wrong == 0;
  return good && encoded.cases > 0;
}

int run(int argc, char** argv) {
  const Options options = parse(argc, argv);
  const unsigned cores = std::max(1u, std::thread::hardware_concurrency());
  const unsigned threads = options.threads ? options.threads : cores;
  Bench bench(options);
  std::printf("compute capability %d, %d processors, %d threads\n",
              bench.queue.device().capability, bench.queue.device().processors, int(threads));
  const auto begin = std::chrono::steady_clock::now();
  bool good = check_products(bench, threads);
  good &= check_quantize(bench, threads);
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
  std::printf("%s, %.1f s\n", good ? "passed" : "FAILED", seconds.count());
  return good ? 0 : 1;
}

}  // namespace
}  // namespace lowbit::check

int main(int argc, char** argv) {
  try {
    return lowbit::check::run(argc, argv);
  } catch (const std::invalid_argument& e) {
    std::fprintf(stderr, "%s\n%s", e.what(), lowbit::check::kUsage);
    return 2;
  } catch (const std::exception& e) {
    std::fprintf(stderr, "FAILED %s\n", e.what());
    return 1;
  }
}
