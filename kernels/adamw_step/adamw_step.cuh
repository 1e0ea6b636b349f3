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

// kCount neighbours in vectors of 16 bytes, or in less where they are fewer.
template <int kCount, class U>
inline constexpr int kPart = kCount < kVector<U> ? kCount : kVector<U>;

template <int kCount, class U>
__device__ __forceinline__ void load_all(const U* from, U (&values)[kCount]) {
  constexpr int n = kPart<kCount, U>;
#pragma unroll
  for (int part = 0; part < kCount; part += n) {
    const Vec<U, n> loaded = load_vec<n>(from + part);
#pragma unroll
    for (int i = 0; i < n; ++i) values[part + i] = loaded[i];
  }
}
template <int kCount, class U>
__device__ __forceinline__ void store_all(U* to, const U (&values)[kCount]) {
  constexpr int n = kPart<kCount, U>;
#pragma unroll
  for (int part = 0; part < kCount; part += n) {
    Vec<U, n> stored;
#pragma unroll
    for (int i = 0; i < n; ++i) stored[i] = values[part + i];
    store_vec(to + part, stored);
  }
}

// kCount neighbours at place i.
template <int kCount, class T>
__device__ __forceinline__ void step_neighbours(const AdamWArrays<T>& t, int64_t i,
                                                const AdamWFactors<accumulator_t<T>>& factors) {
  using Acc = accumulator_t<T>;
  T gradient[kCount];
  Acc first[kCount], second[kCount], value[kCount];
  load_all(t.gradient + i, gradient);
  load_all(t.first + i, first);
  load_all(t.second + i, second);
  load_all(t.value + i, value);
#pragma unroll
  for (int j = 0; j < kCount; ++j)
    value[j] = adamw(static_cast<Acc>(gradient[j]), first[j], second[j], value[j], factors);
  store_all(t.first + i, first);
  store_all(t.second + i, second);
  store_all(t.value + i, value);
  if constexpr (!std::is_same_v<T, Acc>) {
    T rounded[kCount];
#pragma unroll
    for (int j = 0; j < kCount; ++j) rounded[j] = T(value[j]);
    store_all(t.parameter + i, rounded);
  }
}

template <class T>
__global__ void __launch_bounds__(kAdamWThreads) adamw_step_kernel(AdamWLaunch<T> launch) {
  const int32_t chunk = static_cast<int32_t>(blockIdx.x);
  const int index = launch.batch.tensor_of(chunk);
  const AdamWArrays<T>& tensor = launch.batch.tensors[index];
  const int64_t begin = (chunk - launch.batch.first_chunk[index]) * kChunkElements;
  const int64_t end = begin + kChunkElements < tensor.size ? begin + kChunkElements : tensor.size;
  const int64_t single = tensor.in_vectors ? begin + (end - begin) / kVector<T> * kVector<T> : begin;
  for (int64_t i = begin + int64_t{threadIdx.x} * kVector<T>; i < single; i += kAdamWThreads * kVector<T>)
    step_neighbours<kVector<T>>(tensor, i, launch.factors);
  for (int64_t i = single + threadIdx.x; i < end; i += kAdamWThreads) step_neighbours<1>(tensor, i, launch.factors);
}

}  // namespace micro_kernels::cuda
