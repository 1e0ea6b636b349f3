#pragma once
// Device code of the gradient norm: a sum of squares per chunk, then the sum of these, each in a fixed order.

#include "common/cuda/block.cuh"
#include "common/cuda/rows.cuh"
#include "common/cuda/tensor_batch.cuh"

namespace micro_kernels::cuda {

inline constexpr int kGradientNormThreads = 256;
inline constexpr int kGradientNormTensors = 128;

template <class T>
struct GradientArray {
  const T* gradient;
  int64_t size;
  bool in_vectors;
};

template <class T>
struct SquareSumLaunch {
  TensorBatch<GradientArray<T>, kGradientNormTensors> batch;
  double* parts;  // [chunks]
};
static_assert(sizeof(SquareSumLaunch<double>) <= 4096);

struct NormLaunch {
  const double* parts;  // [count]
  int64_t count;
  double* norm;
};

struct GradientNormMemory {
  BlockSumMemory<double, kGradientNormThreads> reduction;
};

// This thread's share of the elements from `begin` to `end`. The same elements whether they are read in vectors or one
// by one, so that the sum does not depend on where a tensor lies.
template <class T>
__device__ __forceinline__ double square_sum(const GradientArray<T>& tensor, int64_t begin, int64_t end) {
  constexpr int n = kVector<T>;
  double sum = 0;
  for (int64_t first = begin + int64_t{threadIdx.x} * n; first < end; first += kGradientNormThreads * n) {
    Vec<T, n> values;
    if (tensor.in_vectors && first + n <= end) {
      values = load_vec<n>(tensor.gradient + first);
    } else {
#pragma unroll
      for (int i = 0; i < n; ++i)
        values[i] = first + i < end ? load(tensor.gradient + first + i) : T(accumulator_t<T>(0));
    }
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const auto wide = static_cast<double>(static_cast<accumulator_t<T>>(values[i]));
      sum += wide * wide;
    }
  }
  return sum;
}

template <class T>
__global__ void __launch_bounds__(kGradientNormThreads) square_sum_kernel(SquareSumLaunch<T> launch) {
  auto& memory = shared_memory<GradientNormMemory>();
  const int32_t chunk = static_cast<int32_t>(blockIdx.x);
  const int index = launch.batch.tensor_of(chunk);
  const GradientArray<T>& tensor = launch.batch.tensors[index];
  const int64_t begin = (chunk - launch.batch.first_chunk[index]) * kChunkElements;
  const int64_t end = begin + kChunkElements < tensor.size ? begin + kChunkElements : tensor.size;
  const double sum = block_sum<kGradientNormThreads>(square_sum(tensor, begin, end), memory.reduction);
  if (threadIdx.x == 0) store(launch.parts + chunk, sum);
}

// One block.
__global__ void __launch_bounds__(kGradientNormThreads) norm_kernel(NormLaunch launch) {
  auto& memory = shared_memory<GradientNormMemory>();
  double sum = 0;
  for (int64_t i = threadIdx.x; i < launch.count; i += kGradientNormThreads) sum += load(launch.parts + i);
  sum = block_sum<kGradientNormThreads>(sum, memory.reduction);
  if (threadIdx.x == 0) store(launch.norm, sqrt(sum));
}

}  // namespace micro_kernels::cuda
