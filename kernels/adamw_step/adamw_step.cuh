#pragma once
// Device code of AdamW: one pass over each element, one block per chunk of a tensor.

#include <type_traits>

#include "adamw_step/adamw_factors.h"
#include "common/cuda/memory.cuh"
#include "common/cuda/rows.cuh"
#include "common/cuda/tensor_batch.cuh"

namespace micro_kernels::cuda {

inline constexpr int kAdamWThreads = 256;
inline constexpr int kAdamWTensors = 64;

template <class T>
struct AdamWArrays {
  using Acc = accumulator_t<T>;
  T* parameter;
  const T* gradient;
  Acc *first, *second;
  Acc* value;  // the master, or the parameter itself
  int64_t size;
  bool in_vectors;
};

template <class T>
struct AdamWLaunch {
  TensorBatch<AdamWArrays<T>, kAdamWTensors> batch;
  AdamWFactors<accumulator_t<T>> factors;
};
static_assert(sizeof(AdamWLaunch<float>) <= 4096 && sizeof(AdamWLaunch<double>) <= 4096);

// Returns the new value and updates both moments.
template <class Acc>
__device__ __forceinline__ Acc adamw(Acc gradient, Acc& first, Acc& second, Acc value, const AdamWFactors<Acc>& f) {
  const Acc g = gradient * f.gradient_scale;
  first = f.beta1 * first + f.other1 * g;
  second = f.beta2 * second + f.other2 * (g * g);
  return value * f.decay - f.step_size * first / (sqrt(second) * f.inverse_root + f.eps);
}

// As many neighbours as make a vector of 16 bytes of what takes most memory: moments and values. A warp's accesses then
// are dense in every array.
template <class T>
inline constexpr int kAdamWNeighbours = kVector<accumulator_t<T>>;

// kCount neighbours at place i.
template <int kCount, class T>
__device__ __forceinline__ void step_neighbours(const AdamWArrays<T>& t, int64_t i,
                                                const AdamWFactors<accumulator_t<T>>& factors) {
  using Acc = accumulator_t<T>;
  const Vec<T, kCount> gradient = load_vec<kCount>(t.gradient + i);
  Vec<Acc, kCount> first = load_vec<kCount>(t.first + i), second = load_vec<kCount>(t.second + i);
  Vec<Acc, kCount> value = load_vec<kCount>(t.value + i);
#pragma unroll
  for (int j = 0; j < kCount; ++j)
    value[j] = adamw(static_cast<Acc>(gradient[j]), first[j], second[j], value[j], factors);
  store_vec(t.first + i, first);
  store_vec(t.second + i, second);
  store_vec(t.value + i, value);
  if constexpr (!std::is_same_v<T, Acc>) {
    Vec<T, kCount> rounded;
#pragma unroll
    for (int j = 0; j < kCount; ++j) rounded[j] = T(value[j]);
    store_vec(t.parameter + i, rounded);
  }
}

template <class T>
__global__ void __launch_bounds__(kAdamWThreads) adamw_step_kernel(AdamWLaunch<T> launch) {
  const int32_t chunk = static_cast<int32_t>(blockIdx.x);
  const int index = launch.batch.tensor_of(chunk);
  const AdamWArrays<T>& tensor = launch.batch.tensors[index];
  const int64_t begin = (chunk - launch.batch.first_chunk[index]) * kChunkElements;
  const int64_t end = begin + kChunkElements < tensor.size ? begin + kChunkElements : tensor.size;
  constexpr int n = kAdamWNeighbours<T>;
  const int64_t single = tensor.in_vectors ? begin + (end - begin) / n * n : begin;
  for (int64_t i = begin + int64_t{threadIdx.x} * n; i < single; i += kAdamWThreads * n)
    step_neighbours<n>(tensor, i, launch.factors);
  for (int64_t i = single + threadIdx.x; i < end; i += kAdamWThreads) step_neighbours<1>(tensor, i, launch.factors);
}

}  // namespace micro_kernels::cuda
