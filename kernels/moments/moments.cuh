#pragma once
// Device code of streaming moments: a block takes 32 columns of one expert, a warp every eighth row of x; the warps'
// parts and what was there before are joined in a fixed order.

#include "common/cuda/arch/trap.cuh"
#include "common/cuda/memory.cuh"
#include "common/cuda/rows.cuh"
#include "micro_kernels/moments.h"

namespace micro_kernels::cuda {

struct Moment {
  double count = 0, mean = 0, m2 = 0;

  __device__ void take(double value) {
    count += 1;
    const double before = value - mean;
    mean += before / count;
    m2 += before * (value - mean);
  }
  __device__ void join(const Moment& other) {
    if (other.count == 0) return;
    const double total = count + other.count, delta = other.mean - mean;
    m2 += other.m2 + delta * delta * (count * other.count / total);
    mean += delta * (other.count / total);
    count = total;
  }
};

struct MomentsMemory {
  SharedArray<double, kRowThreads> count, mean, m2;  // [warps][lanes]
};

__device__ __forceinline__ bool takes(const MomentsParams& p, int64_t row) {
  if (p.touched && !load(p.touched + row)) return false;
  const int64_t expert = p.expert ? load(p.expert + row) : 0;
  require(expert >= 0 && expert < p.experts);
  return expert == blockIdx.y;
}

template <class T>
__global__ void __launch_bounds__(kRowThreads) moments_kernel(MomentsParams p) {
  auto& memory = shared_memory<MomentsMemory>();
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
  const int64_t column = int64_t{blockIdx.x} * kWarp + lane;
  Moment own;
  for (int64_t n = warp; n < p.rows; n += kRowWarps)
    if (takes(p, n) && column < p.width)
      own.take(
          static_cast<double>(static_cast<accumulator_t<T>>(load(static_cast<const T*>(p.x) + n * p.width + column))));
  memory.count.store(thread, own.count);
  memory.mean.store(thread, own.mean);
  memory.m2.store(thread, own.m2);
  __syncthreads();
  if (warp > 0 || column >= p.width) return;
  const int64_t at = int64_t{blockIdx.y} * p.width + column;
  Moment all{load(p.count + blockIdx.y), load(p.mean + at), load(p.m2 + at)};
  for (int i = lane; i < kRowThreads; i += kWarp)
    all.join({memory.count.load(i), memory.mean.load(i), memory.m2.load(i)});
  store(p.mean + at, all.mean);
  store(p.m2 + at, all.m2);
}

struct MomentsCountMemory {
  SharedArray<int64_t, kRowThreads> counts;
};

// Behind the other kernel, which reads the counts: a block per expert.
template <int kThreads>
__global__ void __launch_bounds__(kThreads) moments_count_kernel(MomentsParams p) {
  auto& memory = shared_memory<MomentsCountMemory>();
  int64_t own = 0;
  for (int64_t n = threadIdx.x; n < p.rows; n += kThreads) own += takes(p, n);
  memory.counts.store(static_cast<int>(threadIdx.x), own);
  __syncthreads();
  if (threadIdx.x > 0) return;
  int64_t total = 0;
  for (int i = 0; i < kThreads; ++i) total += memory.counts.load(i);
  store(p.count + blockIdx.y, load(static_cast<const double*>(p.count) + blockIdx.y) + static_cast<double>(total));
}

}  // namespace micro_kernels::cuda
