#pragma once
// Device code of the norm. Forward and grad_x: one block per row of x, which stays in registers where it fits.
// grad_gain: rows are cut at fixed places, each part summed in row order, and the parts added in order by a second
// kernel.

#include "common/cuda/arch/trap.cuh"
#include "common/cuda/block.cuh"
#include "common/cuda/launch.cuh"
#include "micro_kernels/rms_norm.h"

namespace micro_kernels::cuda {

inline constexpr int kRmsNormThreads = 128;
inline constexpr int kRmsNormItems = 4;  // vectors of a row that a thread keeps in registers

template <class T>
inline constexpr int kRmsNormVector = 16 / sizeof(T);

// Longest row that stays in registers.
template <class T>
inline constexpr int64_t kRmsNormLongest = int64_t{kRmsNormThreads} * kRmsNormVector<T>* kRmsNormItems;

// Both norm kernels visit a row in the same way: `N` neighbours at a time, every thread its own.
template <int N, class Body>
__device__ __forceinline__ void for_row(int64_t hidden, Body body) {
#pragma unroll
  for (int item = 0; item < kRmsNormItems; ++item) {
    const int64_t h = (int64_t{item} * kRmsNormThreads + threadIdx.x) * N;
    if (h < hidden) body(item, h);
  }
}

// Rows number less than 2^32: a division of 64 bits is a call, and a call a stack.
template <class P>
__device__ __forceinline__ int64_t rms_norm_expert(const P& p, int64_t row_of_y) {
  if (!p.expert) return static_cast<uint32_t>(row_of_y) / static_cast<uint32_t>(p.rows_per_expert);
  const int32_t expert = load(p.expert + row_of_y);
  require(expert >= 0 && expert < p.experts);
  return expert;
}

template <class Acc>
struct RmsNormShared {
  BlockSumMemory<Acc, kRmsNormThreads> sum;
};

template <class T>
__device__ __forceinline__ T rms_norm_element(T x, T gain, accumulator_t<T> scale, GainRounding rounding) {
  using Acc = accumulator_t<T>;
  Acc normalized = static_cast<Acc>(x) * scale;
  if (rounding == GainRounding::kBeforeGain) normalized = static_cast<Acc>(T(normalized));
  return T(normalized * static_cast<Acc>(gain));
}

// Aligned rows of at most kRmsNormLongest elements.
template <class T>
__global__ void __launch_bounds__(kRmsNormThreads) rms_norm_kernel(RmsNormParams p) {
  using Acc = accumulator_t<T>;
  constexpr int kN = kRmsNormVector<T>;
  auto& shared = shared_memory<RmsNormShared<Acc>>();
  const int64_t row = blockIdx.x;
  Vec<T, kN> x[kRmsNormItems];
  Acc sum = 0;
  for_row<kN>(p.hidden, [&](int item, int64_t h) {
    x[item] = load_vec<kN>(static_cast<const T*>(p.x) + row * p.hidden + h);
#pragma unroll
    for (int i = 0; i < kN; ++i) sum += static_cast<Acc>(x[item][i]) * static_cast<Acc>(x[item][i]);
  });
  sum = block_sum<kRmsNormThreads>(sum, shared.sum);
  const Acc scale = Acc(1) / sqrt(sum / static_cast<Acc>(p.hidden) + static_cast<Acc>(p.eps));
  if (threadIdx.x == 0) store(static_cast<Acc*>(p.inverse_rms) + row, scale);
  for (int64_t copy = 0; copy < p.copies; ++copy) {
    const int64_t out = copy * p.rows + row;
    const T* gain = static_cast<const T*>(p.gain) + rms_norm_expert(p, out) * p.hidden;
    T* y = static_cast<T*>(p.y) + out * p.hidden;
    for_row<kN>(p.hidden, [&](int item, int64_t h) {
      const auto g = load_vec<kN>(gain + h);
      Vec<T, kN> result;
#pragma unroll
      for (int i = 0; i < kN; ++i) result[i] = rms_norm_element(x[item][i], g[i], scale, p.rounding);
      store_vec<kN>(y + h, result);
    });
  }
}

// Any other row: element by element, x read once more for each copy.
template <class T>
__global__ void __launch_bounds__(kRmsNormThreads) rms_norm_long_kernel(RmsNormParams p) {
  using Acc = accumulator_t<T>;
  auto& shared = shared_memory<RmsNormShared<Acc>>();
  const int64_t row = blockIdx.x;
  const T* x = static_cast<const T*>(p.x) + row * p.hidden;
  Acc sum = 0;
  for (int64_t h = threadIdx.x; h < p.hidden; h += kRmsNormThreads) {
    const Acc value = static_cast<Acc>(load(x + h));
    sum += value * value;
  }
  sum = block_sum<kRmsNormThreads>(sum, shared.sum);
  const Acc scale = Acc(1) / sqrt(sum / static_cast<Acc>(p.hidden) + static_cast<Acc>(p.eps));
  if (threadIdx.x == 0) store(static_cast<Acc*>(p.inverse_rms) + row, scale);
  for (int64_t copy = 0; copy < p.copies; ++copy) {
    const int64_t out = copy * p.rows + row;
    const T* gain = static_cast<const T*>(p.gain) + rms_norm_expert(p, out) * p.hidden;
    T* y = static_cast<T*>(p.y) + out * p.hidden;
    for (int64_t h = threadIdx.x; h < p.hidden; h += kRmsNormThreads)
      store(y + h, rms_norm_element(load(x + h), load(gain + h), scale, p.rounding));
  }
}

// ---- gradient of x: scale * (g - x * scale^2 * mean(g * x)),  g = sum over copies of grad_y * gain -----------------

template <class T>
__global__ void __launch_bounds__(kRmsNormThreads) rms_norm_grad_x_kernel(RmsNormBackwardParams p) {
  using Acc = accumulator_t<T>;
  constexpr int kN = kRmsNormVector<T>;
  auto& shared = shared_memory<RmsNormShared<Acc>>();
  const int64_t row = blockIdx.x;
  const T* x = static_cast<const T*>(p.x) + row * p.hidden;
  const Acc scale = load(static_cast<const Acc*>(p.inverse_rms) + row);
  Acc g[kRmsNormItems][kN] = {};
  for (int64_t copy = 0; copy < p.copies; ++copy) {
    const int64_t out = copy * p.rows + row;
    const T* gain = static_cast<const T*>(p.gain) + rms_norm_expert(p, out) * p.hidden;
    const T* grad_y = static_cast<const T*>(p.grad_y) + out * p.hidden;
    for_row<kN>(p.hidden, [&](int item, int64_t h) {
      const auto upstream = load_vec<kN>(grad_y + h);
      const auto gains = load_vec<kN>(gain + h);
#pragma unroll
      for (int i = 0; i < kN; ++i) g[item][i] += static_cast<Acc>(upstream[i]) * static_cast<Acc>(gains[i]);
    });
  }
  Vec<T, kN> values[kRmsNormItems];
  Acc dot = 0;
  for_row<kN>(p.hidden, [&](int item, int64_t h) {
    values[item] = load_vec<kN>(x + h);
#pragma unroll
    for (int i = 0; i < kN; ++i) dot += g[item][i] * static_cast<Acc>(values[item][i]);
  });
  const Acc pull = block_sum<kRmsNormThreads>(dot, shared.sum) * scale * scale / static_cast<Acc>(p.hidden);
  T* grad_x = static_cast<T*>(p.grad_x) + row * p.hidden;
  for_row<kN>(p.hidden, [&](int item, int64_t h) {
    Vec<T, kN> result;
#pragma unroll
    for (int i = 0; i < kN; ++i) result[i] = T(scale * (g[item][i] - static_cast<Acc>(values[item][i]) * pull));
    store_vec<kN>(grad_x + h, result);
  });
}

template <class T>
__device__ accumulator_t<T> rms_norm_upstream(const RmsNormBackwardParams& p, int64_t row, int64_t h) {
  using Acc = accumulator_t<T>;
  Acc g = 0;
  for (int64_t copy = 0; copy < p.copies; ++copy) {
    const int64_t out = copy * p.rows + row;
    const T gain = load(static_cast<const T*>(p.gain) + rms_norm_expert(p, out) * p.hidden + h);
    g += static_cast<Acc>(load(static_cast<const T*>(p.grad_y) + out * p.hidden + h)) * static_cast<Acc>(gain);
  }
  return g;
}

template <class T>
__global__ void __launch_bounds__(kRmsNormThreads, 8) rms_norm_grad_x_long_kernel(RmsNormBackwardParams p) {
  using Acc = accumulator_t<T>;
  auto& shared = shared_memory<RmsNormShared<Acc>>();
  const int64_t row = blockIdx.x;
  const T* x = static_cast<const T*>(p.x) + row * p.hidden;
  T* grad_x = static_cast<T*>(p.grad_x) + row * p.hidden;
  const Acc scale = load(static_cast<const Acc*>(p.inverse_rms) + row);
  const Acc share = scale * scale / static_cast<Acc>(p.hidden);  // first: a division of float64 is a call
  Acc dot = 0;
  for (int64_t h = threadIdx.x; h < p.hidden; h += kRmsNormThreads)
    dot += rms_norm_upstream<T>(p, row, h) * static_cast<Acc>(load(x + h));
  const Acc pull = block_sum<kRmsNormThreads>(dot, shared.sum) * share;
  for (int64_t h = threadIdx.x; h < p.hidden; h += kRmsNormThreads)
    store(grad_x + h, T(scale * (rms_norm_upstream<T>(p, row, h) - static_cast<Acc>(load(x + h)) * pull)));
}

// ---- gradient of the gain ------------------------------------------------------------------------------------------

struct RmsNormGainParams {
  RmsNormBackwardParams backward;
  void* parts;            // [chunks, experts, hidden], accumulator type
  int64_t chunk, chunks;  // rows of y in one part, and how many parts
};

// Rows of y one after the other, with the row of x and the expert of each: divisions at the first one only.
struct RmsNormRow {
  int64_t row, source;
  int64_t expert = 0, left = 0;  // left: rows of y that the expert still has; unused where p.expert says it

  __device__ RmsNormRow(const RmsNormBackwardParams& p, int64_t first)
      : row(first), source(static_cast<uint32_t>(first) % static_cast<uint32_t>(p.rows)) {
    if (p.expert) return;
    expert = rms_norm_expert(p, first);
    left = (expert + 1) * p.rows_per_expert - first;
  }
  __device__ int64_t expert_of(const RmsNormBackwardParams& p) const {
    return p.expert ? rms_norm_expert(p, row) : expert;
  }
  __device__ void next(const RmsNormBackwardParams& p) {
    ++row;
    if (++source == p.rows) source = 0;
    if (--left == 0) ++expert, left = p.rows_per_expert;
  }
};

// Block (columns, expert, part): thread by thread `N` columns, the part's rows of that expert in order.
template <class T, int N>
__global__ void __launch_bounds__(kRmsNormThreads) rms_norm_gain_parts_kernel(RmsNormGainParams q) {
  using Acc = accumulator_t<T>;
  const RmsNormBackwardParams& p = q.backward;
  const int64_t h = (int64_t{blockIdx.x} * kRmsNormThreads + threadIdx.x) * N;
  const int64_t expert = blockIdx.y, part = blockIdx.z;
  if (h >= p.hidden) return;
  const int64_t total = p.copies * p.rows;
  const int64_t end = (part + 1) * q.chunk < total ? (part + 1) * q.chunk : total;
  Acc sum[N] = {};
  for (RmsNormRow at(p, part * q.chunk); at.row < end; at.next(p)) {
    if (at.expert_of(p) != expert) continue;
    const auto upstream = load_vec<N>(static_cast<const T*>(p.grad_y) + at.row * p.hidden + h);
    const auto x = load_vec<N>(static_cast<const T*>(p.x) + at.source * p.hidden + h);
    const Acc scale = load(static_cast<const Acc*>(p.inverse_rms) + at.source);
#pragma unroll
    for (int i = 0; i < N; ++i) sum[i] += static_cast<Acc>(upstream[i]) * static_cast<Acc>(x[i]) * scale;
  }
  constexpr int kM = N < kRmsNormVector<Acc> ? N : kRmsNormVector<Acc>;
  Acc* to = static_cast<Acc*>(q.parts) + (part * p.experts + expert) * p.hidden + h;
#pragma unroll
  for (int i = 0; i < N; i += kM) {
    Vec<Acc, kM> values;
#pragma unroll
    for (int j = 0; j < kM; ++j) values[j] = sum[i + j];
    store_vec<kM>(to + i, values);
  }
}

template <class Acc>
__global__ void __launch_bounds__(kRmsNormThreads) rms_norm_gain_kernel(RmsNormGainParams q) {
  const int64_t size = q.backward.experts * q.backward.hidden;
  const int64_t i = int64_t{blockIdx.x} * kRmsNormThreads + threadIdx.x;
  if (i >= size) return;
  Acc sum = 0;
  for (int64_t part = 0; part < q.chunks; ++part) sum += load(static_cast<const Acc*>(q.parts) + part * size + i);
  store(static_cast<Acc*>(q.backward.grad_gain) + i, sum);
}

}  // namespace micro_kernels::cuda
