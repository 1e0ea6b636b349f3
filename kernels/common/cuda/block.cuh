#pragma once
// Operations of a whole thread block. Each takes its working memory from the caller: a member of the kernel's struct
// of shared memory.

#include "common/cuda/memory.cuh"
#include "common/cuda/warp.cuh"

#ifndef MICRO_EMULATED
#include <cub/block/block_scan.cuh>
#endif

namespace micro_kernels::cuda {

template <class T, int kThreads>
using BlockSumMemory = SharedArray<T, kThreads / kWarp>;

// Sum over the block, returned to every thread; the same order of additions in every launch. Begins and ends with a
// barrier, so it may be called again at once.
template <int kThreads, class T>
__device__ T block_sum(T value, BlockSumMemory<T, kThreads>& memory) {
  value = warp_sum(value);
  __syncthreads();
  if (threadIdx.x % kWarp == 0) memory.store(threadIdx.x / kWarp, value);
  __syncthreads();
  T sum = memory.load(0);
#pragma unroll
  for (int i = 1; i < kThreads / kWarp; ++i) sum += memory.load(i);
  __syncthreads();
  return sum;
}

template <int kThreads, class T>
__device__ T block_max(T value, BlockSumMemory<T, kThreads>& memory) {
  value = warp_max(value);
  __syncthreads();
  if (threadIdx.x % kWarp == 0) memory.store(threadIdx.x / kWarp, value);
  __syncthreads();
  T most = memory.load(0);
#pragma unroll
  for (int i = 1; i < kThreads / kWarp; ++i) {
    const T other = memory.load(i);
    most = other > most ? other : most;
  }
  __syncthreads();
  return most;
}

// Exclusive prefix sum of integers over the threads of a block, and the block's total. Ends with a barrier.
#ifdef MICRO_EMULATED
template <int kThreads>
struct BlockScanMemory {
  SharedArray<int32_t, kThreads> values;
};
template <int kThreads>
__device__ int32_t block_exclusive_sum(int32_t value, int32_t& total, BlockScanMemory<kThreads>& memory) {
  __syncthreads();
  memory.values.store(threadIdx.x, value);
  __syncthreads();
  int32_t before = 0;
  total = 0;
  for (int i = 0; i < kThreads; ++i) {
    if (i == static_cast<int>(threadIdx.x)) before = total;
    total += memory.values.load(i);
  }
  __syncthreads();
  return before;
}
#else
template <int kThreads>
struct BlockScanMemory {
  typename cub::BlockScan<int32_t, kThreads>::TempStorage storage;
};
template <int kThreads>
__device__ int32_t block_exclusive_sum(int32_t value, int32_t& total, BlockScanMemory<kThreads>& memory) {
  int32_t before;
  cub::BlockScan<int32_t, kThreads>(memory.storage).ExclusiveSum(value, before, total);
  __syncthreads();
  return before;
}
#endif

}  // namespace micro_kernels::cuda
