#include "cache_step.h"

#include <sstream>
#include <stdexcept>

#include "backend.h"
#include "mlx/utils.h"

namespace lowbit {

namespace {

// Whether it is known, and in row order from a multiple of 16 bytes on.
bool in_row_order(const mx::array& cache) {
  if (cache.status() == mx::array::Status::unscheduled)
    return cache.has_primitive() && dynamic_cast<const CacheStep*>(&cache.primitive());
  return cache.flags().row_contiguous && cache.offset() % 16 == 0;
}

void check(const char* name, const mx::array& a, const mx::Shape& shape) {
  if (a.shape() == shape) return;
  std::ostringstream text;
  text << "[cache_step] " << name << " must have shape " << shape << ", got " << a.shape();
  throw std::invalid_argument(text.str());
}

}  // namespace

void CacheStep::eval_cpu(const std::vector<mx::array>&, std::vector<mx::array>&) {
  throw std::runtime_error("[lowbit] internal: steps of caches are for a GPU");
}

void CacheStep::eval_gpu(const std::vector<mx::array>& inputs,
                         std::vector<mx::array>& outputs) {
  for (int i = 0; i < 2; i++) outputs[1 + i].copy_shared_buffer(inputs[i]);
  gpu().cache_step(inputs, outputs, offset_, scale_, stream());
}

bool takes_cache_step(const mx::array& keys, int heads, mx::StreamOrDevice s) {
  if (keys.ndim() != 4 || keys.size() == 0 || heads == 0 || heads % keys.shape(1)) return false;
  return mx::to_stream(s).device == mx::Device::gpu && issubdtype(keys.dtype(), mx::floating) &&
         gpu_loaded() && gpu().takes_cache_step &&
         gpu().takes_cache_step(heads / keys.shape(1), keys.shape(3), dtype_of(keys.dtype()));
}

std::vector<mx::array> cache_step(const mx::array& keys, const mx::array& values,
                                  const mx::array& q, const mx::array& k, const mx::array& v,
                                  const OptionalArray& periods, int offset, float scale,
                                  mx::StreamOrDevice s) {
  if (keys.ndim() != 4 || q.ndim() != 4)
    throw std::invalid_argument("[cache_step] keys and q must have four dimensions");
  const int B = keys.shape(0), H = keys.shape(1), capacity = keys.shape(2), D = keys.shape(3);
  check("values", values, {B, H, capacity, D});
  check("q", q, {B, q.shape(1), 1, D});
  check("k", k, {B, H, 1, D});
  check("v", v, {B, H, 1, D});
  if (periods) check("periods", *periods, {D / 2});
  if (offset < 0 || offset >= capacity)
    throw std::invalid_argument("[cache_step] offset must be from 0 to " +
                                std::to_string(capacity - 1) + ", got " +
                                std::to_string(offset));
  const mx::Stream stream = mx::to_stream(s);
  const mx::Dtype dtype = keys.dtype();
  for (const mx::array* each : {&values, &q, &k, &v})
    if (each->dtype() != dtype) return {};
  if (!takes_cache_step(keys, q.shape(1), stream) || !in_row_order(keys) ||
      !in_row_order(values) || (periods && periods->dtype() != mx::float32))
    return {};
  std::vector<mx::array> inputs{keys, values, q, k, v};
  if (periods) inputs.push_back(*periods);
  return mx::array::make_arrays(
      {q.shape(), keys.shape(), values.shape()}, {dtype, dtype, dtype},
      std::make_shared<CacheStep>(stream, offset, scale), std::move(inputs));
}

}  // namespace lowbit
