#pragma once
// Device code of the gated unit: vectors side by side, and the elements after the last whole vector one by
// one.

#include "common/cuda/math.cuh"
#include "common/cuda/memory.cuh"
#include "common/cuda/rows.cuh"
#include "micro_kernels/swiglu.h"

namespace micro_kernels::cuda {

inline constexpr int kSwigluThreads = 256;
inline constexpr int kSwigluVectors = 2;  // of one thread

template <class T>
__device__ __forceinline__ T swiglu_element(T gate, T up) {
  using Acc = accumulator_t<T>;
  const Acc g = static_cast<Acc>(gate);
  return T(g * sigmoid(g) * static_cast<Acc>(up));
}

template <class T>
__device__ __forceinline__ void swiglu_gradients(T grad_y, T gate, T up, T& grad_gate, T& grad_up) {
  using Acc = accumulator_t<T>;
  const Acc upstream = static_cast<Acc>(grad_y), g = static_cast<Acc>(gate), s = sigmoid(g);
  grad_gate = T(upstream * static_cast<Acc>(up) * s * (Acc(1) + g * (Acc(1) - s)));
  grad_up = T(upstream * (g * s));
}

// The first element of the thread's i-th vector.
template <int N>
__device__ __forceinline__ int64_t swiglu_first(int i) {
  return ((int64_t{blockIdx.x} * kSwigluVectors + i) * kSwigluThreads + threadIdx.x) * N;
}

// The element after the last whole vector that is the thread's, or `count`: the first block's first threads take them.
template <int N>
__device__ __forceinline__ int64_t swiglu_rest(int64_t count) {
  const int64_t at = count / N * N + threadIdx.x;
  return N > 1 && blockIdx.x == 0 && at < count ? at : count;
}

template <class T, int N>
__global__ void __launch_bounds__(kSwigluThreads, 3) swiglu_kernel(SwigluParams p) {
  const T *gate = static_cast<const T*>(p.gate), *up = static_cast<const T*>(p.up);
  T* y = static_cast<T*>(p.y);
  Vec<T, N> g[kSwigluVectors]{}, u[kSwigluVectors]{};
#pragma unroll
  for (int i = 0; i < kSwigluVectors; ++i) {
    if (swiglu_first<N>(i) + N > p.count) continue;
    g[i] = load_vec<N>(gate + swiglu_first<N>(i));
    u[i] = load_vec<N>(up + swiglu_first<N>(i));
  }
#pragma unroll
  for (int i = 0; i < kSwigluVectors; ++i) {
    if (swiglu_first<N>(i) + N > p.count) continue;
    Vec<T, N> values;
#pragma unroll
    for (int j = 0; j < N; ++j) values[j] = swiglu_element(g[i][j], u[i][j]);
    store_vec<N>(y + swiglu_first<N>(i), values);
  }
  if (const int64_t at = swiglu_rest<N>(p.count); at < p.count)
    store(y + at, swiglu_element(load(gate + at), load(up + at)));
}

template <class T, int N>
__global__ void __launch_bounds__(kSwigluThreads, 3) swiglu_backward_kernel(SwigluBackwardParams p) {
  const T *grad_y = static_cast<const T*>(p.grad_y), *gate = static_cast<const T*>(p.gate);
  const T* up = static_cast<const T*>(p.up);
  T *grad_gate = static_cast<T*>(p.grad_gate), *grad_up = static_cast<T*>(p.grad_up);
  Vec<T, N> d[kSwigluVectors]{}, g[kSwigluVectors]{}, u[kSwigluVectors]{};
#pragma unroll
  for (int i = 0; i < kSwigluVectors; ++i) {
    if (swiglu_first<N>(i) + N > p.count) continue;
    d[i] = load_vec<N>(grad_y + swiglu_first<N>(i));
    g[i] = load_vec<N>(gate + swiglu_first<N>(i));
    u[i] = load_vec<N>(up + swiglu_first<N>(i));
  }
#pragma unroll
  for (int i = 0; i < kSwigluVectors; ++i) {
    if (swiglu_first<N>(i) + N > p.count) continue;
    Vec<T, N> to_gate, to_up;
#pragma unroll
    for (int j = 0; j < N; ++j) swiglu_gradients(d[i][j], g[i][j], u[i][j], to_gate[j], to_up[j]);
    store_vec<N>(grad_gate + swiglu_first<N>(i), to_gate);
    store_vec<N>(grad_up + swiglu_first<N>(i), to_up);
  }
  if (const int64_t at = swiglu_rest<N>(p.count); at < p.count) {
    T to_gate, to_up;
    swiglu_gradients(load(grad_y + at), load(gate + at), load(up + at), to_gate, to_up);
    store(grad_gate + at, to_gate);
    store(grad_up + at, to_up);
  }
}

}  // namespace micro_kernels::cuda
