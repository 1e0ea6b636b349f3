#pragma once
// Device code of the cross-entropy's rows: one block per row. The first pass reads the row and keeps a running sum of
// exponentials per thread; the second reads it again, mostly from the cache, and writes the gradient over it.

#include "common/cuda/arch/trap.cuh"
#include "common/cuda/block.cuh"
#include "common/cuda/neighbours.cuh"
#include "micro_kernels/cross_entropy.h"

namespace micro_kernels::cuda {

inline constexpr int kCrossEntropyThreads = 512;

struct CrossEntropyLaunch {
  CrossEntropyParams params;
  bool in_vectors;
};

template <class Acc>
struct CrossEntropyMemory {
  BlockSumMemory<Acc, kCrossEntropyThreads> reduction;
};

template <class Acc>
inline constexpr Acc kMinusInfinity = -static_cast<Acc>(INFINITY);

// sum exp(z - top) over what has been added, top the largest of it. While there is nothing above minus infinity: 0, or
// NaN where there was a NaN.
template <class Acc>
struct ExponentialSum {
  Acc top = kMinusInfinity<Acc>, sum = 0;

  template <int N>
  __device__ __forceinline__ void add(const Acc (&z)[N]) {
    Acc most = top;
#pragma unroll
    for (int i = 0; i < N; ++i) most = z[i] > most ? z[i] : most;  // false for NaN
    raise(most);
#pragma unroll
    for (int i = 0; i < N; ++i) sum += exp(top > kMinusInfinity<Acc> ? z[i] - top : z[i]);
  }
  __device__ __forceinline__ void raise(Acc most) {
    if (!(most > top)) return;
    if (top > kMinusInfinity<Acc>) sum *= exp(top - most);
    top = most;
  }
};

template <class T>
struct CrossEntropyRow {
  using Acc = accumulator_t<T>;
  static constexpr int kNeighbours = kVector<T>;

  T* logits;
  int64_t vocabulary, target;
  bool in_vectors;

  // Calls body(first, values) for this thread's pieces of the row; minus infinity behind its end.
  template <class Body>
  __device__ __forceinline__ void for_each_piece(const Body& body) const {
    for (int64_t first = int64_t{threadIdx.x} * kNeighbours; first < vocabulary;
         first += int64_t{kCrossEntropyThreads} * kNeighbours) {
      const Neighbours<T> stored = load_neighbours(logits, first, vocabulary, in_vectors, T(kMinusInfinity<Acc>));
      Acc z[kNeighbours];
#pragma unroll
      for (int i = 0; i < kNeighbours; ++i) z[i] = static_cast<Acc>(stored[i]);
      body(first, z);
    }
  }

  __device__ ExponentialSum<Acc> sum(CrossEntropyMemory<Acc>& memory) const {
    ExponentialSum<Acc> all;
    for_each_piece([&](int64_t, const Acc(&z)[kNeighbours]) { all.add(z); });
    all.raise(block_max<kCrossEntropyThreads>(all.top, memory.reduction));
    all.sum = block_sum<kCrossEntropyThreads>(all.sum, memory.reduction);
    return all;
  }

  __device__ void write_gradient(const ExponentialSum<Acc>& all) const {
    const Acc factor = Acc(1) / all.sum;
    for_each_piece([&](int64_t first, const Acc(&z)[kNeighbours]) {
      Neighbours<T> gradient;
#pragma unroll
      for (int i = 0; i < kNeighbours; ++i)
        gradient[i] = T(exp(z[i] - all.top) * factor - static_cast<Acc>(first + i == target));
      store_neighbours(logits, first, vocabulary, in_vectors, gradient);
    });
  }
};

template <class T>
__global__ void __launch_bounds__(kCrossEntropyThreads) cross_entropy_kernel(CrossEntropyLaunch launch) {
  using Acc = accumulator_t<T>;
  const CrossEntropyParams& p = launch.params;
  auto& memory = shared_memory<CrossEntropyMemory<Acc>>();
  const int64_t n = blockIdx.x;
  CrossEntropyRow<T> row{static_cast<T*>(p.logits) + n * p.vocabulary, p.vocabulary, 0, launch.in_vectors};
  Acc* const loss = static_cast<Acc*>(p.losses) + n;
  if (p.count && n >= load(p.count)) {
    if (threadIdx.x == 0) store(loss, Acc(0));
    return;
  }
  row.target = load(p.targets + n);
  require(row.target >= 0 && row.target < p.vocabulary);
  const Acc of_target = static_cast<Acc>(load(row.logits + row.target));  // before anyone writes the row
  const ExponentialSum<Acc> all = row.sum(memory);
  if (threadIdx.x == 0) store(loss, log(all.sum) - (of_target - all.top));
  if (p.write_gradient) row.write_gradient(all);
}

}  // namespace micro_kernels::cuda
