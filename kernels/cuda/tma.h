// Hopper's tensor copies (TMA): tiles of a matrix to and from shared memory, one instruction a
// tile, whatever lies outside the matrix read as zero and not written. And what goes with them:
// waits that end, and clusters.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "pipeline.h"
#include "wgmma.h"

namespace lowbit::cuda {

// Innermost dimensions first; strides in bytes, without that of single elements.
template <int rank>
CUtensorMap encode_tiles(const void* base, int size, const cuuint64_t (&extent)[rank],
                         const cuuint64_t (&strides)[rank - 1], const cuuint32_t (&box)[rank],
                         int swizzle) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found{};
    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000,
                                         cudaEnableDefault, &found) != cudaSuccess ||
        found != cudaDriverEntryPointSuccess)
      throw std::runtime_error("the NVIDIA driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<Encode>(entry);
  }();
  const cuuint32_t step[] = {1, 1, 1, 1};
  CUtensorMap map;
  const CUresult status = encode(
      &map, size == 1 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_UINT16, rank,
      const_cast<void*>(base), extent, strides, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
      swizzle == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
      : swizzle == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
      : swizzle == 32 ? CU_TENSOR_MAP_SWIZZLE_32B
                      : CU_TENSOR_MAP_SWIZZLE_NONE,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS)
    throw std::runtime_error("cuTensorMapEncodeTiled failed: " + std::to_string(int(status)));
  return map;
}

// A row-major matrix of `rows` rows, `stride` bytes apart, as tiles of box_rows x box_columns
// elements of `size` bytes (1 or 2). Base and stride are multiples of 16 bytes, and so is a
// tile's row. swizzle: 0, or a tile's row in bytes when that is 32, 64 or 128: 16-byte chunks
// then permute so that equal chunks of 8 rows lie in different banks.
inline CUtensorMap tensor_map(const void* base, int size, int64_t rows, int64_t columns,
                              int64_t stride, int box_rows, int box_columns, int swizzle) {
  return encode_tiles<2>(base, size, {cuuint64_t(columns), cuuint64_t(rows)},
                         {cuuint64_t(stride)}, {cuuint32_t(box_columns), cuuint32_t(box_rows)},
                         swizzle);
}

// The same as tiles of all columns that a copy takes: `box_blocks` blocks of columns beside
// each other in the matrix, one behind the other in the tile, each box_rows x box_columns.
// step: every so many of them, the others are another tile's.
inline CUtensorMap block_map(const void* base, int size, int64_t rows, int64_t columns,
                             int64_t stride, int box_rows, int box_columns, int box_blocks,
                             int step, int swizzle) {
  const cuuint64_t block = cuuint64_t(box_columns) * size;
  return encode_tiles<4>(
      base, size,
      {cuuint64_t(box_columns), cuuint64_t(rows), cuuint64_t(step),
       cuuint64_t(columns / box_columns / step)},
      {cuuint64_t(stride), block, block * step},
      {cuuint32_t(box_columns), cuuint32_t(box_rows), 1, cuuint32_t(box_blocks)}, swizzle);
}

#if LOWBIT_HOPPER

// Where a tile swizzled by rows of `row_bytes` has 16-byte chunk i of a row: at chunk i ^ turn,
// which for other rows of bytes is i. The same 8 rows on.
__device__ __forceinline__ int turn_of(int row, int row_bytes) {
  return row_bytes == 128  ? row % 8
         : row_bytes == 64 ? row / 2 % 4
         : row_bytes == 32 ? row / 4 % 2
                           : 0;
}

// The tile whose first element is (row, column), to `to`. Completes on `bar`. policy:
// pipeline.h.
__device__ __forceinline__ void load_tile(uint32_t to, const CUtensorMap& map, int column,
                                          int row, uint32_t bar) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3}], [%4];" ::"r"(to),
      "l"(&map), "r"(column), "r"(row), "r"(bar)
      : "memory");
}
__device__ __forceinline__ void load_tile(uint32_t to, const CUtensorMap& map, int column,
                                          int row, uint32_t bar, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".L2::cache_hint [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
      "l"(&map), "r"(column), "r"(row), "r"(bar), "l"(policy)
      : "memory");
}
// The same to the blocks of the cluster in `blocks` (bits by rank), on each one's `bar`.
__device__ __forceinline__ void multicast_tile(uint32_t to, const CUtensorMap& map, int column,
                                               int row, uint32_t bar, uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
      "l"(&map), "r"(column), "r"(row), "r"(bar), "h"(blocks)
      : "memory");
}
// Of a block_map: rows from `row` on, and of each `step` blocks from `block` * step on the one
// that `first` says.
__device__ __forceinline__ void load_blocks(uint32_t to, const CUtensorMap& map, int row,
                                            int first, int block, uint32_t bar) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(to),
      "l"(&map), "r"(0), "r"(row), "r"(first), "r"(block), "r"(bar)
      : "memory");
}
__device__ __forceinline__ void load_blocks(uint32_t to, const CUtensorMap& map, int row,
                                            int first, int block, uint32_t bar,
                                            uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".L2::cache_hint [%0], [%1, {%2, %3, %4, %5}], [%6], %7;" ::"r"(to),
      "l"(&map), "r"(0), "r"(row), "r"(first), "r"(block), "r"(bar), "l"(policy)
      : "memory");
}
__device__ __forceinline__ void prefetch_map(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Ordinary stores to shared memory so far are seen by copies that follow a barrier.
__device__ __forceinline__ void fence_for_copies() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
// One group of copies: a tile of the matrix from shared memory.
__device__ __forceinline__ void store_tile(const CUtensorMap& map, int column, int row,
                                           uint32_t from) {
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];\n"
      "cp.async.bulk.commit_group;" ::"l"(&map),
      "r"(column), "r"(row), "r"(from)
      : "memory");
}
// Until all but `groups` of this thread's stores have read their shared memory; or, `written`,
// until all are done.
template <int groups>
__device__ __forceinline__ void wait_for_stores(bool written = false) {
  if (written) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(groups) : "memory");
}

// Ordinary accesses to shared memory, by address; of 2 (to a word), 4, 8 or 16 bytes.
template <int bytes>
__device__ __forceinline__ void load_shared(uint32_t address, uint32_t* to) {
  if constexpr (bytes == 16)
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address));
  else if constexpr (bytes == 8)
    asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(to[0]), "=r"(to[1]) : "r"(address));
  else if constexpr (bytes == 4)
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(to[0]) : "r"(address));
  else
    asm volatile("ld.shared.u16 %0, [%1];" : "=r"(to[0]) : "r"(address));
}

__device__ __forceinline__ void store_shared(uint32_t address, uint32_t v) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(v) : "memory");
}
__device__ __forceinline__ void store_shared(uint32_t address, const uint32_t (&v)[4]) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v[0]), "r"(v[1]),
               "r"(v[2]), "r"(v[3])
               : "memory");
}
// Four 8x8 matrices of 16-bit elements, transposed: lane l gives the address of row l % 8 of
// matrix l / 8.
__device__ __forceinline__ void store_transposed(uint32_t address, const uint32_t (&v)[4]) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(address),
      "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3])
      : "memory");
}

// One element of 1 or 2 bytes that nobody writes meanwhile.
template <int bytes>
__device__ __forceinline__ uint32_t load_narrow(const uint8_t* p) {
  uint32_t v;
  if constexpr (bytes == 2)
    asm volatile("{ .reg .u16 h; ld.global.nc.u16 h, [%1]; cvt.u32.u16 %0, h; }"
                 : "=r"(v)
                 : "l"(p));
  else
    asm volatile("ld.global.nc.u8 %0, [%1];" : "=r"(v) : "l"(p));
  return v;
}
// The line of p into the L2 cache.
__device__ __forceinline__ void prefetch_line(const uint8_t* p) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}

// In its cluster. A block without a cluster is one.
__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t r;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return r;
}
// All threads of all blocks of the cluster; what they wrote before is seen after.
__device__ __forceinline__ void cluster_sync() {
  asm volatile(
      "barrier.cluster.arrive.release;\n"
      "barrier.cluster.wait.acquire;" ::
          : "memory");
}
// The same, and nothing is seen by anyone: for barriers published before, and for blocks that
// have consumed all that they read of each other's shared memory. Without the fence, which
// waits for all that a thread stored to global memory.
__device__ __forceinline__ void cluster_sync_relaxed() {
  asm volatile(
      "barrier.cluster.arrive.relaxed;\n"
      "barrier.cluster.wait;" ::
          : "memory");
}
// Where block `rank` of the cluster has what this block has at `address`.
__device__ __forceinline__ uint32_t remote_address(uint32_t address, uint32_t rank) {
  uint32_t r;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r) : "r"(address), "r"(rank));
  return r;
}
__device__ __forceinline__ void arrive_remote(uint32_t address) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(address) : "memory");
}
__device__ __forceinline__ uint32_t load_remote_word(uint32_t address) {
  uint32_t v;
  asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
  return v;
}
__device__ __forceinline__ float4 load_remote(uint32_t address) {
  float4 v;
  asm volatile("ld.shared::cluster.v4.f32 {%0,%1,%2,%3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(address)
               : "memory");
  return v;
}

#endif  // LOWBIT_HOPPER

}  // namespace lowbit::cuda
