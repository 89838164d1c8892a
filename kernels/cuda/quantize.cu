// quantize and dequantize, one pass over memory.
//
// quantize: a lane has 16 consecutive elements, neighbouring lanes share a group.
#include <algorithm>

#include "encode.cuh"
#include "formats.h"
#include "kernels.h"
#include "lane_order.h"

namespace lowbit::cuda {

namespace {

constexpr int kThreads = 256;

struct QuantizeArgs {
  const void* w;
  const float* global;
  uint8_t* codes;
  void* scales;
  void* biases;
  int64_t units;    // of 16 elements
  int group_shift;  // units of a group, as a power of two
  bool vectors;     // w begins at a multiple of 16 bytes
};

// 16 elements of a group whose scale has no inverse in two parts: rare, and small in registers.
template <class F>
__device__ __noinline__ void encode_huge(const float* x, typename F::Group group,
                                         uint8_t* codes, int64_t unit) {
  Packed<F::kBits> out;
#pragma unroll 1
  for (int i = 0; i < 16; i++) out.put(i, 1, F::encode(x[i], group, FromZero()));
  out.store(codes, unit);
}

template <class F, Dtype dtype>
__device__ __forceinline__ void quantize_affine(const QuantizeArgs& a, const Sixteen<dtype>& w,
                                                int64_t unit) {
  float low, high;
  w.range(low, high);
  for (int lanes = 1; lanes >> a.group_shift == 0; lanes *= 2) {
    low = least(low, __shfl_xor_sync(0xffffffffu, low, lanes));
    high = most(high, __shfl_xor_sync(0xffffffffu, high, lanes));
  }
  if (unit >= a.units) return;
  typename F::Group group{from_bits(0x7fc00000u), 0.0f};
  if (finite(low) && finite(high)) group = F::fit(low, larger(high, 0.0f), FromZero());
  float x[16];
  w.widen(x);
  if (magnitude(group.scale) >= 0x1p100f) {
    float copy[16];
    for (int i = 0; i < 16; i++) copy[i] = x[i];
    encode_huge<F>(copy, group, a.codes, unit);
  } else {
    encode_affine<F>(x, group).store(a.codes, unit);
  }
  const int64_t index = unit >> a.group_shift;
  if (index << a.group_shift != unit) return;
  store_float(a.scales, index, group.scale, dtype);
  store_float(a.biases, index, group.bias, dtype);
}

template <class F, Dtype dtype>
__device__ __forceinline__ void quantize_block(const QuantizeArgs& a, const Sixteen<dtype>& w,
                                               int64_t unit) {
  float x[16];
  w.widen(x);
  const uint32_t largest = largest_of<F>(x);
  if (unit >= a.units) return;
  const Block<F> block(largest, enlarge_by(a.global));
  constexpr int kLanes = F::kGroup / 16;
  if (unit % kLanes == 0) static_cast<uint8_t*>(a.scales)[unit / kLanes] = uint8_t(block.scale);

  using Codes = Eight<typename F::Code>;
  constexpr uint32_t kNanCodes = F::kNanCode * (F::kBits == 4 ? 0x11111111u : 0x01010101u);
#pragma unroll
  for (int half = 0; half < 2; half++) {
    float v[8];
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = __fmul_rn(x[8 * half + i], block.factor);
    uint32_t codes[Codes::kWords];
    Codes::encode(v, codes);
#pragma unroll
    for (int i = 0; i < Codes::kWords; i++)
      reinterpret_cast<uint32_t*>(a.codes)[(unit * 2 + half) * Codes::kWords + i] =
          block.scale == F::kNanScale ? kNanCodes : codes[i];
  }
}

template <class F, Dtype dtype>
__global__ void __launch_bounds__(kThreads, dtype == Dtype::f32 ? 6 : 8)
    quantize_kernel(QuantizeArgs a) {
  const int64_t unit = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t count = unit < a.units ? 8 : 0;
  Sixteen<dtype> w;
#pragma unroll
  for (int h = 0; h < 2; h++)
    w.half[h] = EightBits::load(a.w, unit * 16 + h * 8, count, dtype, a.vectors);
  if constexpr (F::kHasBias)
    quantize_affine<F, dtype>(a, w, unit);
  else
    quantize_block<F, dtype>(a, w, unit);
}

// Elements that a thread decodes at a time: what one vector store takes.
__host__ __device__ constexpr int unit_of(Dtype d) { return 16 / size_of(d); }

template <Dtype dtype>
__device__ __forceinline__ void store_unit(const float* x, void* out, int64_t unit,
                                           bool vectors) {
  if (!vectors) {
#pragma unroll
    for (int i = 0; i < unit_of(dtype); i++)
      store_float(out, unit * unit_of(dtype) + i, x[i], dtype);
  } else if constexpr (dtype == Dtype::f32) {
    static_cast<float4*>(out)[unit] = {x[0], x[1], x[2], x[3]};
  } else {
    static_cast<uint4*>(out)[unit] = {
        round_pair(x[0], x[1], dtype), round_pair(x[2], x[3], dtype),
        round_pair(x[4], x[5], dtype), round_pair(x[6], x[7], dtype)};
  }
}

// Q(x) as bfloat16, in one pass.
template <class F>
__global__ void __launch_bounds__(kThreads, 8)
    round_trip_kernel(const void* x, const float* global, uint4* out, int64_t units,
                      bool vectors) {
  const int64_t unit = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  Sixteen<Dtype::bf16> sixteen;
#pragma unroll
  for (int h = 0; h < 2; h++)
    sixteen.half[h] =
        EightBits::load(x, unit * 16 + h * 8, unit < units ? 8 : 0, Dtype::bf16, vectors);
  float v[16];
  sixteen.widen(v);
  const Block<F> block(largest_of<F>(v), enlarge_by(global));
  if (unit >= units) return;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    float part[8];
#pragma unroll
    for (int i = 0; i < 8; i++) part[i] = v[8 * h + i];
    round_trip<F>(part, block);
    store_unit<Dtype::bf16>(part, out, unit * 2 + h, true);
  }
}

// Q(x) as bfloat16 in lane order: a thread has 8 elements of each of two quarters of a unit,
// and their pairs.
constexpr int kLaneThreads = 128;
template <class F>
__global__ void __launch_bounds__(kLaneThreads)
    lane_round_trip_kernel(const void* x, const float* global, uint2* out, int K, int columns,
                           int rows, bool vectors) {
  const int thread = int(blockIdx.x * kLaneThreads + threadIdx.x);
  const int q = thread % 4, quarters = thread / 4 % 2, unit = thread / 8;
#pragma unroll 1
  for (int row = int(blockIdx.y); row < rows; row += int(gridDim.y)) {
    EightBits eight[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int k = unit * 128 + quarters * 64 + h * 32 + q * 8;
      eight[h] = EightBits::load(x, int64_t(row) * K + k, k < K ? 8 : 0, Dtype::bf16, vectors);
    }
    uint32_t pairs[2][4];
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float v[8];
      eight[h].widen(Dtype::bf16, v);
      round_trip_across<F>(v, enlarge_by(global));
#pragma unroll
      for (int i = 0; i < 4; i++)
        pairs[h][i] = round_pair(v[pair_order(2 * i, F::kBits)],
                                 v[pair_order(2 * i + 1, F::kBits)], Dtype::bf16);
    }
    if (unit * 128 >= columns) continue;
    uint2* to = out + int64_t(row) * (columns / 4) + unit * 32 + q * 8 + quarters;
#pragma unroll
    for (int i = 0; i < 4; i++) to[2 * i] = {pairs[0][i], pairs[1][i]};
  }
}

struct DequantizeArgs {
  Weights w;
  const float* global;
  void* out;
  int64_t units;
  int unit_shift;  // units of a group, as a power of two
  bool vectors;    // out begins at a multiple of 16 bytes
};

constexpr int kUnits = 4;  // of a thread, a block's width apart: their loads overlap

template <class F, Dtype dtype>
__global__ void __launch_bounds__(kThreads) dequantize_kernel(DequantizeArgs a) {
  constexpr int kUnit = unit_of(dtype);
  const int64_t first = int64_t(blockIdx.x) * (kUnits * kThreads) + threadIdx.x;
  const ScaleType type = a.w.scale_type;
  RawCodes<F::kBits, kUnit> codes[kUnits] = {};
  uint32_t scale[kUnits] = {}, bias[kUnits] = {};
#pragma unroll
  for (int i = 0; i < kUnits; i++) {
    const int64_t unit = first + i * kThreads, group = unit >> a.unit_shift;
    if (unit >= a.units) break;
    codes[i].load(a.w.codes, unit * kUnit);
    scale[i] = load_bits(a.w.scales, group, size_of(type));
    if constexpr (F::kHasBias) bias[i] = load_bits(a.w.biases, group, size_of(type));
  }
  const float alpha = a.global ? __fdiv_rn(*a.global, Nvfp4::kGlobalMax) : 1.0f;
#pragma unroll
  for (int i = 0; i < kUnits; i++) {
    const int64_t unit = first + i * kThreads;
    if (unit >= a.units) break;
    const float s = to_float(scale[i], type) * alpha;
    const float b = F::kHasBias ? to_float(bias[i], type) : 0.0f;
    float x[8];
    Eight<typename F::Code>::decode(codes[i].codes(), x);
#pragma unroll
    for (int j = 0; j < kUnit; j++) x[j] = F::kHasBias ? fmaf(s, x[j], b) : s * x[j];
    store_unit<dtype>(x, a.out, unit, a.vectors);
  }
}

// The logarithm of a power of two.
int shift_of(int power) {
  int shift = 0;
  while (1 << shift < power) shift++;
  return shift;
}

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

dim3 blocks_for(int64_t units, int of_block) {
  return dim3(unsigned((units + of_block - 1) / of_block));
}

template <class F>
void run_quantize(const QuantizeArgs& a, Dtype dtype, Queue& queue) {
  const auto kernel = dtype == Dtype::f32   ? quantize_kernel<F, Dtype::f32>
                      : dtype == Dtype::f16 ? quantize_kernel<F, Dtype::f16>
                                            : quantize_kernel<F, Dtype::bf16>;
  queue.run(kernel, blocks_for(a.units, kThreads), dim3(kThreads), 0, 1, a);
}

template <class F>
void run_dequantize(const DequantizeArgs& a, Dtype dtype, Queue& queue) {
  const auto kernel = dtype == Dtype::f32   ? dequantize_kernel<F, Dtype::f32>
                      : dtype == Dtype::f16 ? dequantize_kernel<F, Dtype::f16>
                                            : dequantize_kernel<F, Dtype::bf16>;
  queue.run(kernel, blocks_for(a.units, kUnits * kThreads), dim3(kThreads), 0, 1, a);
}

}  // namespace

// w at any multiple of its element size, the results as they are allocated.
void quantize(Format format, const void* w, Dtype dtype, int64_t groups,
              const float* global_scale, uint8_t* codes, void* scales, void* biases,
              Queue& queue) {
  if (groups == 0) return;
  const int shift = shift_of(kFormats[int(format)].group_size / 16);
  const QuantizeArgs a{w,      global_scale,    codes, scales,
                       biases, groups << shift, shift, aligned(w)};
  with_format(format, [&](auto f) {
    run_quantize<typename Family<typename TypeOf<f.value>::type>::type>(a, dtype, queue);
  });
}

void round_trip(Format format, const void* x, int64_t groups, const float* global_scale,
                void* out, Queue& queue) {
  const int64_t units = groups * (kFormats[int(format)].group_size / 16);
  if (units == 0) return;
  const auto run = [&](auto kernel) {
    queue.run(kernel, blocks_for(units, kThreads), dim3(kThreads), 0, 1, x, global_scale,
              static_cast<uint4*>(out), units, aligned(x));
  };
  if (format == Format::mxfp8) run(round_trip_kernel<Mxfp8>);
  if (format == Format::mxfp4) run(round_trip_kernel<Mxfp4>);
  if (format == Format::nvfp4) run(round_trip_kernel<Nvfp4>);
}

void round_trip_to_lanes(Format format, const void* x, int64_t rows, int64_t K,
                         const float* global_scale, void* out, Queue& queue) {
  const int columns = int(lane_order_columns(K));
  if (rows == 0 || columns == 0) return;
  const auto run = [&](auto kernel) {
    dim3 blocks = blocks_for(columns / 16, kLaneThreads);
    blocks.y = unsigned(std::min<int64_t>(rows, 65535));
    queue.run(kernel, blocks, dim3(kLaneThreads), 0, 1, x, global_scale,
              static_cast<uint2*>(out), int(K), columns, int(rows), aligned(x));
  };
  if (format == Format::mxfp8) run(lane_round_trip_kernel<Mxfp8>);
  if (format == Format::mxfp4) run(lane_round_trip_kernel<Mxfp4>);
  if (format == Format::nvfp4) run(lane_round_trip_kernel<Nvfp4>);
}

void dequantize(Format format, const Weights& w, const float* global_scale, void* out,
                Dtype dtype, Queue& queue) {
  const int64_t units = w.matrices * w.rows * w.columns / unit_of(dtype);
  if (units == 0) return;
  const DequantizeArgs a{
      w, global_scale, out, units, shift_of(w.group_size / unit_of(dtype)), aligned(out)};
  with_format(format, [&](auto f) {
    run_dequantize<typename Family<typename TypeOf<f.value>::type>::type>(a, dtype, queue);
  });
}

}  // namespace lowbit::cuda
