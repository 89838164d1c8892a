// One more token of each sequence, on a GPU: its keys and values go into the memory of a cache,
// and its queries attend to all that is there.
//
// In one operation for what MLX has seven (two rotations, two slice updates, two slices and the
// attention): each of them costs the host more than the GPU.
//
// Contract. Whoever else holds memory of the cache may read what lies before `offset`, and
// nobody else writes there or behind it: the caller sees to that (nn/cache_step.py).
#pragma once

#include <vector>

#include "mlx/primitives.h"
#include "ops.h"

namespace lowbit {

class CacheStep : public mx::Primitive {
 public:
  CacheStep(mx::Stream stream, int offset, float scale)
      : Primitive(stream), offset_(offset), scale_(scale) {}

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override;
  void eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override;
  const char* name() const override { return "LowbitCacheStep"; }
  bool is_equivalent(const mx::Primitive& other) const override {
    const auto& o = static_cast<const CacheStep&>(other);
    return offset_ == o.offset_ && scale_ == o.scale_;
  }

 private:
  int offset_;
  float scale_;
};

// Whether cache_step() on that device takes `heads` heads of queries for these keys
// [B, H, capacity, D].
bool takes_cache_step(const mx::array& keys, int heads, mx::StreamOrDevice s);

// keys, values [B, H, capacity, D], q [B, H * share, 1, D], k, v [B, H, 1, D] of one dtype ->
// y like q, and keys and values with k and v at `offset`, in the memory that they have. With
// periods, float32 [D / 2], q and k are rotated by offset / periods first, the dims d and
// d + D / 2 together (mlx.nn.RoPE, whose periods are base^(2 d / D) / scale). Nothing where the
// backend takes no such heads, or the layout of keys and values is another or not known yet.
// Throws std::invalid_argument for shapes that do not belong together.
std::vector<mx::array> cache_step(const mx::array& keys, const mx::array& values,
                                  const mx::array& q, const mx::array& k, const mx::array& v,
                                  const OptionalArray& periods, int offset, float scale,
                                  mx::StreamOrDevice s);

}  // namespace lowbit
