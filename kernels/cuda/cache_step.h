// What cache_step.cu is asked for.
#pragma once

#include "kernels.h"

namespace lowbit::cuda {

// A row of each head of each sequence; strides in elements.
struct HeadRows {
  const void* data;
  int64_t sequence, head;
};

// One more token of each sequence. k and v go to row `at` of keys and values [sequences, heads,
// capacity, dims]; y [sequences, heads * share, dims] is softmax(scale * q keys^T) values over
// rows 0 to `at`. Where there are periods [dims / 2], q and k are rotated first: dims d and
// d + dims / 2 by at / periods[d]. keys and values begin at multiples of 16 bytes.
struct CacheStep {
  Dtype dtype;
  int sequences, heads, share, dims, at;
  int64_t capacity;
  HeadRows q, k, v;
  void* keys;
  void* values;
  void* y;
  const float* periods;
  float scale;
};

// Whether cache_step() takes so many heads of q for one of k, of so many dims.
bool takes_cache_step(int share, int dims, Dtype);
void cache_step(const CacheStep&, Queue&);

}  // namespace lowbit::cuda
