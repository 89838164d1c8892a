// From MLX arrays to kernel arguments and onto MLX's command encoder. The only file of the CUDA
// backend, beside launch_memory.cpp, that knows MLX.
//
// libmlx.so holds a CUDA runtime of its own, which does not know the kernels of this object:
// they reach the encoder as CUfunction, found by the runtime of this object.
#include <cstdlib>
#include <mutex>
#include <shared_mutex>
#include <stdexcept>
#include <unordered_map>
#include <vector>

#include "../host/backend.h"
#include "cache_step.h"
#include "device.h"
#include "kernels.h"
#include "launch_memory.h"
#include "mlx/backend/cuda/device.h"

namespace lowbit::cuda {

namespace {

// Kernels as the driver knows them, one entry a kernel and device: functions belong to a
// device's context, and so does the leave to use more shared memory than 48 KiB.
class Functions {
 public:
  CUfunction get(const void* kernel, int device, size_t shared_bytes, int cluster) {
    const Key key{kernel, device};
    {
      const std::shared_lock lock(mutex_);
      const auto found = entries_.find(key);
      if (found != entries_.end() && found->second.covers(shared_bytes, cluster))
        return found->second.function;
    }
    const std::unique_lock lock(mutex_);
    Entry& entry = entries_[key];
    if (!entry.function) {
      cudaFunction_t function = nullptr;
      check(cudaGetFuncBySymbol(&function, kernel), "cudaGetFuncBySymbol");
      entry.function = function;
    }
    if (shared_bytes > entry.shared_bytes) {
      check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 int(shared_bytes)),
            "cudaFuncSetAttribute(MaxDynamicSharedMemorySize)");
      entry.shared_bytes = shared_bytes;
    }
    if (cluster > entry.cluster) {
      check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
            "cudaFuncSetAttribute(NonPortableClusterSizeAllowed)");
      entry.cluster = cluster;
    }
    return entry.function;
  }

 private:
  struct Key {
    const void* kernel;
    int device;
    bool operator==(const Key&) const = default;
  };
  struct Hash {
    size_t operator()(const Key& k) const {
      return std::hash<const void*>()(k.kernel) ^ size_t(k.device);
    }
  };
  struct Entry {
    CUfunction function = nullptr;
    size_t shared_bytes = 48 << 10;  // what every kernel may use
    int cluster = 8;                 // what every device may schedule
    bool covers(size_t bytes, int blocks) const {
      return function && bytes <= shared_bytes && blocks <= cluster;
    }
  };
  std::shared_mutex mutex_;
  std::unordered_map<Key, Entry, Hash> entries_;
};

Functions& functions() {
  static auto& all = *new Functions;
  return all;
}

// A kernel with a cluster, as a graph of one node.
//
// cudaGraphExecUpdate reports success and leaves each node's cluster as it was. MLX updates one
// executable graph for all sequences of nodes with the same key, and a kernel node's key does
// not tell its cluster: an MLX kernel that took the place of one with a cluster of 2 lost its
// last block, or did not run (H200, CUDA 13.0, driver 580, 2026-11-22; also with
// __cluster_dims__). The key of a child graph is the owner's to choose. It costs 1 to 2 us more
// of the CPU's time a node and none of the GPU's.
class ClusterNode {
 public:
  ClusterNode() = default;
  ClusterNode(const ClusterNode&) = delete;
  ClusterNode& operator=(const ClusterNode&) = delete;
  ~ClusterNode() {
    if (graph_) cudaGraphDestroy(graph_);
  }

  // Valid until the next call: whoever adds it to a graph gets a copy.
  cudaGraph_t with(const cudaKernelNodeParams& params, int cluster) {
    if (graph_) {
      check(cudaGraphKernelNodeSetParams(node_, &params), "cudaGraphKernelNodeSetParams");
      return graph_;
    }
    check(cudaGraphCreate(&graph_, 0), "cudaGraphCreate");
    check(cudaGraphAddKernelNode(&node_, graph_, nullptr, 0, &params),
          "cudaGraphAddKernelNode");
    cudaKernelNodeAttrValue value{};
    value.clusterDim.x = unsigned(cluster);
    value.clusterDim.y = value.clusterDim.z = 1;
    check(cudaGraphKernelNodeSetAttribute(node_, cudaLaunchAttributeClusterDimension, &value),
          "cudaGraphKernelNodeSetAttribute");
    return graph_;
  }

  // One for each cluster size and device, for the calling thread.
  static ClusterNode& of(int device, int cluster) {
    static thread_local std::unordered_map<int64_t, ClusterNode> nodes;
    return nodes[int64_t(device) << 32 | cluster];
  }

 private:
  cudaGraph_t graph_ = nullptr;
  cudaGraphNode_t node_ = nullptr;
};

// One primitive's kernels on the command encoder of its stream.
//
// The encoder orders nodes by the buffers that they write. Each kernel after the first of a
// primitive follows the one before it through the outputs and scratch, and through it what the
// inputs wait for; naming the inputs once keeps the encoder's count of the bytes in its graph
// right.
class EncoderQueue : public Queue {
 public:
  explicit EncoderQueue(mx::Stream stream)
      : stream_(stream),
        encoder_(mx::cu::get_command_encoder(stream)),
        index_(encoder_.device().cuda_device()),
        device_(cuda::device(index_)) {
    encoder_.device().make_current();
  }

  template <class T>
  const T* input(const mx::array& a) {
    inputs_.push_back(a);
    return static_cast<const T*>(address(a));
  }
  template <class T>
  const T* input(const std::optional<mx::array>& a) {
    return a ? input<T>(*a) : nullptr;
  }

  // A weight, which may belong to the primitive instead of being an input that MLX keeps until
  // the work is done. Nothing in the graph writes one whose value is there.
  template <class T>
  const T* weight(const mx::array& a) {
    encoder_.add_temporary(a);
    if (a.status() != mx::array::Status::available) inputs_.push_back(a);
    return static_cast<const T*>(address(a));
  }
  template <class T>
  const T* weight(const std::optional<mx::array>& a) {
    return a ? weight<T>(*a) : nullptr;
  }

  // MLX_LOWBIT_POISON=1 fills results with NaN first, so that an element nobody writes shows.
  template <class T>
  T* output(mx::array& out) {
    static const bool poison = [] {
      const char* text = std::getenv("MLX_LOWBIT_POISON");
      return text && *text && *text != '0';
    }();
    if (out.nbytes() < kLarge)
      take_listed(out, out.nbytes());
    else
      take_of_mlx(out, index_, stream_);
    void* p = written(out);
    // Straight onto the stream, before the graph: nothing there uses memory of the list
    // (launch_memory.h) or of MLX's cache, which also gets it when the work is done.
    if (poison)
      check(cudaMemsetAsync(p, 0xff, out.nbytes(), encoder_.stream()), "cudaMemsetAsync");
    return static_cast<T*>(p);
  }

  // Which has memory already: taken here, or an input's.
  void* written(const mx::array& a) {
    written_.push_back(a);
    return address(a);
  }

  void* scratch(size_t bytes) override {
    mx::array held(mx::Shape{1}, mx::uint8, nullptr, {});
    take_listed(held, bytes);
    return written(held);
  }

  void launch(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes, void** args,
              int cluster) override {
    const CUfunction function = functions().get(kernel, index_, shared_bytes, cluster);
    for (const mx::array& a : inputs_) encoder_.set_input_array(a);
    inputs_.clear();
    for (const mx::array& a : written_) encoder_.set_output_array(a);
    if (cluster == 1) {
      encoder_.add_kernel_node_raw(function, grid, block, dim3(1, 1, 1), uint32_t(shared_bytes),
                                   args);
      return;
    }
    cudaKernelNodeParams params{};
    params.func = const_cast<void*>(kernel);
    params.gridDim = grid;
    params.blockDim = block;
    params.sharedMemBytes = unsigned(shared_bytes);
    params.kernelParams = args;
    encoder_.add_graph_node(ClusterNode::of(index_, cluster).with(params, cluster),
                            "(lowbit" + std::to_string(cluster) + ")", true);
  }

  const Device& device() const override { return device_; }

 private:
  static void* address(const mx::array& a) {
    const auto* buffer = static_cast<const mx::cu::CudaBuffer*>(a.buffer().ptr());
    return static_cast<char*>(buffer->data) + a.offset();
  }

  // Memory of the list, which the encoder keeps until the work is done.
  void take_listed(mx::array& a, size_t bytes) {
    a.set_data(take(bytes, index_, encoder_.stream()));
    encoder_.add_temporary(a);
  }

  const mx::Stream stream_;
  mx::cu::CommandEncoder& encoder_;
  const int index_;
  const Device& device_;
  std::vector<mx::array> inputs_, written_;
};

ScaleType scale_type(const FormatInfo& f, const mx::array& scales) {
  if (f.affine()) return ScaleType(int(dtype_of(scales.dtype())));
  return f.group_size == 16 ? ScaleType::e4m3 : ScaleType::e8m0;
}
static_assert(int(ScaleType::bf16) == int(Dtype::bf16));

Weights weights(Format format, const mx::array& w, const mx::array& scales,
                const std::optional<mx::array>& biases, EncoderQueue& queue) {
  const FormatInfo& f = kFormats[int(format)];
  Weights v{};
  v.codes = queue.weight<uint8_t>(w);
  v.scales = queue.weight<void>(scales);
  v.biases = queue.weight<void>(biases);
  v.scale_type = scale_type(f, scales);
  v.group_size = f.group_size;
  v.rows = w.shape(-2);
  v.columns = w.shape(-1) * int64_t(32) / f.bits;
  v.row_bytes = w.shape(-1) * int64_t(w.itemsize());
  v.matrices = int64_t(w.size()) / (v.rows * w.shape(-1));
  return v;
}

// x's rows one after the other.
const void* rows(const mx::array& x, EncoderQueue& queue) {
  const void* from = queue.input<void>(x);
  if (x.flags().row_contiguous) return from;
  Strided a{};
  for (int d = 0; d < int(x.ndim()); d++) {
    if (x.shape(d) == 1) continue;
    // Dimensions that one stride spans are one.
    if (a.dims > 0 && a.strides[a.dims - 1] == x.strides(d) * x.shape(d)) {
      a.shape[a.dims - 1] *= x.shape(d), a.strides[a.dims - 1] = x.strides(d);
      continue;
    }
    if (a.dims == Strided::kDims)
      throw std::runtime_error("[lowbit] x has more dimensions than can be copied: 10");
    a.shape[a.dims] = x.shape(d), a.strides[a.dims] = x.strides(d);
    a.dims++;
  }
  void* to = queue.scratch(x.nbytes());
  copy_rows(from, a, dtype_of(x.dtype()), to, queue);
  return to;
}

void launch(const ProductKind& kind, const ProductInputs& in, mx::array& out,
            mx::Stream stream) {
  if (kind.format == Format::dense)
    throw std::runtime_error("[lowbit] internal: dense products on the GPU are MLX's");
  EncoderQueue queue(stream);
  const ProductShape s = ProductShape::of(kind, in);
  Product p{};
  p.format = kind.format;
  p.transpose = kind.transpose;
  p.quantize_x = kind.quantize_x;
  p.dtype = dtype_of(out.dtype());
  p.M = s.M, p.N = s.N, p.K = s.K;
  p.w = weights(kind.format, in.w, *in.scales, in.biases, queue);
  p.x = rows(in.x, queue);
  p.bias = queue.weight<void>(in.bias);
  if (in.bias) p.bias_dtype = dtype_of(in.bias->dtype());
  p.global_x = queue.input<float>(in.global_x);
  p.global_w = queue.input<float>(in.global_w);
  p.global_w_count = in.global_w ? int64_t(in.global_w->size()) : 0;
  p.lhs = queue.input<int64_t>(in.lhs);
  p.rhs = queue.input<int64_t>(in.rhs);
  p.pairs = s.pairs;
  p.x_matrices = s.x_matrices;
  p.y = queue.output<void>(out);
  run(p, queue);
}

void launch_quantize(Format format, const mx::array& w,
                     const std::optional<mx::array>& global_scale,
                     std::vector<mx::array>& outputs, mx::Stream stream) {
  EncoderQueue queue(stream);
  const void* values = queue.input<void>(w);
  const float* global = queue.input<float>(global_scale);
  auto* codes = queue.output<uint8_t>(outputs[0]);
  void* scales = queue.output<void>(outputs[1]);
  void* biases = outputs.size() > 2 ? queue.output<void>(outputs[2]) : nullptr;
  quantize(format, values, dtype_of(w.dtype()),
           int64_t(w.size()) / kFormats[int(format)].group_size, global, codes, scales, biases,
           queue);
}

void launch_dequantize(Format format, const mx::array& w, const mx::array& scales,
                       const std::optional<mx::array>& biases,
                       const std::optional<mx::array>& global_scale, mx::array& out,
                       mx::Stream stream) {
  EncoderQueue queue(stream);
  Weights v = weights(format, w, scales, biases, queue);
  v.rows *= v.matrices;
  v.matrices = 1;
  const float* global = queue.input<float>(global_scale);
  dequantize(format, v, global, queue.output<void>(out), dtype_of(out.dtype()), queue);
}

void launch_cache_step(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs,
                       int offset, float scale, mx::Stream stream) {
  EncoderQueue queue(stream);
  const mx::array &keys = inputs[0], &values = inputs[1], &q = inputs[2], &k = inputs[3],
                  &v = inputs[4];
  const auto heads = [&](const mx::array& a) {
    if (a.strides(3) == 1) return HeadRows{queue.input<void>(a), a.strides(0), a.strides(1)};
    return HeadRows{rows(a, queue), int64_t(a.shape(1)) * a.shape(3), a.shape(3)};
  };
  queue.input<void>(keys), queue.input<void>(values);
  CacheStep p{};
  p.dtype = dtype_of(keys.dtype());
  p.sequences = keys.shape(0), p.heads = keys.shape(1), p.dims = keys.shape(3);
  p.share = q.shape(1) / p.heads;
  p.capacity = keys.shape(2), p.at = offset;
  p.q = heads(q), p.k = heads(k), p.v = heads(v);
  p.periods = inputs.size() > 5 ? queue.input<float>(inputs[5]) : nullptr;
  p.scale = scale;
  p.y = queue.output<void>(outputs[0]);
  p.keys = queue.written(outputs[1]), p.values = queue.written(outputs[2]);
  cache_step(p, queue);
}

bool on_tensor_cores(const Problem& problem, int index) {
  return plan(problem, device(index)).kernel != Plan::Kernel::simt;
}

std::string explain(const Problem& problem, int index) {
  const Device& d = device(index);
  return describe(problem, plan(problem, d), d);
}

}  // namespace

}  // namespace lowbit::cuda

extern "C" __attribute__((visibility("default"))) const lowbit::Backend* lowbit_cuda_backend() {
  using namespace lowbit;
  static const Backend backend{
      .build = LOWBIT_BUILD,
      .refusal = [](int index) { return cuda::refusal(index); },
      .total_memory = cuda::total_memory,
      .memory_use = cuda::memory_use,
      .reset_peak = cuda::reset_peak,
      .launch = cuda::launch,
      .launch_quantize = cuda::launch_quantize,
      .launch_dequantize = cuda::launch_dequantize,
      .takes_cache_step = cuda::takes_cache_step,
      .cache_step = cuda::launch_cache_step,
      .prepare = nullptr,
      .prepare_elements = nullptr,
      .takes_strides = true,
      .on_tensor_cores = cuda::on_tensor_cores,
      .route = [](const Problem& problem,
                  int index) { return cuda::route(problem, cuda::device(index)); },
      .explain = cuda::explain,
  };
  return &backend;
}
