#pragma once
// Device code of what lies between the products of a layer's backward pass: norms and their gradients, sums of
// gradients, the router's few columns. One warp per row, but for the gains.

#include <cassert>

#include "block_forward/block_forward.cuh"
#include "micro_kernels/block_train.h"

namespace micro_kernels::cuda {

// ---- in front of the products --------------------------------------------------------------------------------------

// Rows of the plan: grad_out = weight * grad_y of the token, the weight's own gradient, the norm of u. Then the rows
// [T]: the norms of x, one copy for each expert in use.
struct SplitStep {
  const int32_t* tokens;      // the plan
  const int32_t* experts;     //
  const int32_t* offsets;     //
  const int32_t* inverse;     //
  const void* grad_y;         // [T, H]
  const void* weights;        // [T, K]
  void* grad_out;             // [N, H]; idle rows are 0
  const void* out;            // [N, H]; nullptr: gradients of the weights are not asked for
  const void* given_weights;  // [T, K] gradient that came to the weights, or nullptr
  void* grad_weights;         // [T, K], element type
  const void* u;              // [N, H]
  const void* u_gain;         // [E, H]
  void* normed_u;             // [N, H]; idle rows are 0
  void* inverse_u;            // [N], accumulator type; idle rows are 0
  const void* x;              // [T, H]
  const void* x_gain;         // [E, H]
  void* normed_x;             // [E, T, H]; nullptr: not asked for
  void* inverse_x;            // [T], accumulator type
  int64_t tokens_count, pairs, k, hidden, expert_count;
  double eps;
};

template <class T, int N>
__device__ __forceinline__ void norm_row(const T* x, const T* gain, accumulator_t<T> scale, T* y, int64_t width) {
  using Acc = accumulator_t<T>;
  each_column<N>(width, [&](int64_t h) {
    Acc values[N], gains[N];
    load_wide<N>(x + h, values);
    load_wide<N>(gain + h, gains);
    Vec<T, N> result;
#pragma unroll
    for (int i = 0; i < N; ++i) result[i] = normed<T>(values[i], scale, gains[i], GainRounding::kBeforeGain);
    store_vec<N>(y + h, result);
  });
}

template <class T, int N>
__device__ __forceinline__ void clear_row(T* y, int64_t width) {
  each_column<N>(width, [&](int64_t h) { store_vec<N>(y + h, Vec<T, N>{}); });
}

// The pair of a token that has this row of the plan.
__device__ inline int64_t pair_of(const int32_t* inverse, int64_t token, int64_t k, int64_t row) {
  int64_t pair = token * k;
  while (load(inverse + pair) != row) ++pair;
  return pair;
}

template <class T, int N>
__device__ __forceinline__ void split_row(const SplitStep& p, int64_t row, int64_t pair) {
  using Acc = accumulator_t<T>;
  const T* grad_y = static_cast<const T*>(p.grad_y) + load(p.tokens + row) * p.hidden;
  const T* out = p.out ? static_cast<const T*>(p.out) + row * p.hidden : nullptr;
  T* grad_out = static_cast<T*>(p.grad_out) + row * p.hidden;
  const Acc weight = static_cast<Acc>(load(static_cast<const T*>(p.weights) + pair));
  Acc dot = 0;
  each_column<N>(p.hidden, [&](int64_t h) {
    Acc grad[N], values[N];
    load_wide<N>(grad_y + h, grad);
    Vec<T, N> result;
#pragma unroll
    for (int i = 0; i < N; ++i) result[i] = T(grad[i] * weight);
    store_vec<N>(grad_out + h, result);
    if (!out) return;
    load_wide<N>(out + h, values);
#pragma unroll
    for (int i = 0; i < N; ++i) dot += grad[i] * values[i];
  });
  if (!out) return;
  dot = warp_sum(dot);
  if (warp_lane() != 0) return;
  T rounded(dot);
  if (p.given_weights)
    rounded = T(static_cast<Acc>(load(static_cast<const T*>(p.given_weights) + pair)) + static_cast<Acc>(rounded));
  store(static_cast<T*>(p.grad_weights) + pair, rounded);
}

template <class T, int N>
__device__ __forceinline__ void split_plan_row(const SplitStep& p, int64_t row) {
  using Acc = accumulator_t<T>;
  const int64_t pair = pair_of(p.inverse, load(p.tokens + row), p.k, row);
  T* normed_u = static_cast<T*>(p.normed_u) + row * p.hidden;
  if (row >= load(p.offsets + p.expert_count)) {
    clear_row<T, N>(static_cast<T*>(p.grad_out) + row * p.hidden, p.hidden);
    clear_row<T, N>(normed_u, p.hidden);
    if (warp_lane() != 0) return;
    store(static_cast<Acc*>(p.inverse_u) + row, Acc(0));
    if (!p.out) return;
    const T given = p.given_weights ? load(static_cast<const T*>(p.given_weights) + pair) : T(Acc(0));
    store(static_cast<T*>(p.grad_weights) + pair, given);
    return;
  }
  split_row<T, N>(p, row, pair);
  const T* u = static_cast<const T*>(p.u) + row * p.hidden;
  const Acc scale = inverse_rms_of<T, N>(u, p.hidden, p.eps);
  if (warp_lane() == 0) store(static_cast<Acc*>(p.inverse_u) + row, scale);
  norm_row<T, N>(u, static_cast<const T*>(p.u_gain) + load(p.experts + row) * p.hidden, scale, normed_u, p.hidden);
}

template <class T, int N>
__global__ void __launch_bounds__(kRowThreads, 2) train_split_kernel(SplitStep p) {
  using Acc = accumulator_t<T>;
  int64_t row = warp_row();
  if (row < p.pairs) return split_plan_row<T, N>(p, row);
  row -= p.pairs;
  if (row >= p.tokens_count) return;
  const T* x = static_cast<const T*>(p.x) + row * p.hidden;
  const Acc scale = inverse_rms_of<T, N>(x, p.hidden, p.eps);
  if (warp_lane() == 0) store(static_cast<Acc*>(p.inverse_x) + row, scale);
  if (!p.normed_x) return;
  for (int64_t e = 0; e < p.expert_count; ++e) {
    if (load(p.offsets + e) == load(p.offsets + e + 1)) continue;
    T* y = static_cast<T*>(p.normed_x) + (e * p.tokens_count + row) * p.hidden;
    norm_row<T, N>(x, static_cast<const T*>(p.x_gain) + e * p.hidden, scale, y, p.hidden);
  }
}

// ---- the norm behind attention, backwards --------------------------------------------------------------------------

// grad_u = grad_out + norm'(grad_normed), rows of the plan.
struct GradNormStep {
  const void* grad_out;
  const void* grad_normed;
  const void* u;
  const void* gain;         // [E, H]
  const void* inverse_rms;  // [N]
  const int32_t* experts;
  const int32_t* active;
  void* grad_u;  // idle rows are 0
  int64_t rows, hidden;
};

template <class T, int N>
__global__ void __launch_bounds__(kRowThreads, 2) train_grad_norm_kernel(GradNormStep p) {
  using Acc = accumulator_t<T>;
  const int64_t row = warp_row();
  if (row >= p.rows) return;
  const int64_t at = row * p.hidden;
  T* grad_u = static_cast<T*>(p.grad_u) + at;
  if (row >= load(p.active)) return clear_row<T, N>(grad_u, p.hidden);
  const T* u = static_cast<const T*>(p.u) + at;
  const T* gain = static_cast<const T*>(p.gain) + load(p.experts + row) * p.hidden;
  const Acc scale = load(static_cast<const Acc*>(p.inverse_rms) + row);
  const auto upstream = [&](int64_t h, Acc(&g)[N], Acc(&values)[N]) {
    Acc gains[N];
    load_wide<N>(static_cast<const T*>(p.grad_normed) + at + h, g);
    load_wide<N>(gain + h, gains);
    load_wide<N>(u + h, values);
#pragma unroll
    for (int i = 0; i < N; ++i) g[i] *= gains[i];
  };
  Acc dot = 0;
  each_column<N>(p.hidden, [&](int64_t h) {
    Acc g[N], values[N];
    upstream(h, g, values);
#pragma unroll
    for (int i = 0; i < N; ++i) dot += g[i] * values[i];
  });
  const Acc pull = warp_sum(dot) * scale * scale / static_cast<Acc>(p.hidden);
  each_column<N>(p.hidden, [&](int64_t h) {
    Acc g[N], values[N], residual[N];
    upstream(h, g, values);
    load_wide<N>(static_cast<const T*>(p.grad_out) + at + h, residual);
    Vec<T, N> result;
#pragma unroll
    for (int i = 0; i < N; ++i) result[i] = T(residual[i] + static_cast<Acc>(T(scale * (g[i] - values[i] * pull))));
    store_vec<N>(grad_u + h, result);
  });
}

// ---- the input -----------------------------------------------------------------------------------------------------

// grad_x of a token: through the norms of all experts (keys and values) and of its own (queries), through the residuals
// of its pairs, and through the router.
struct GradInputStep {
  const int32_t* experts;   // the plan
  const int32_t* offsets;   //
  const int32_t* inverse;   //
  const void* grad_keys;    // [E, T, H], behind the norms; zeros of experts without a row
  const void* grad_rows;    // [N, H], behind the norms
  const void* grad_u;       // [N, H]
  const void* grad_router;  // [T, H], or nullptr
  const void* x;            // [T, H]
  const void* gain;         // [E, H]
  const void* inverse_rms;  // [T]
  void* grad_x;             // [T, H]
  int64_t tokens, k, hidden, expert_count;
};

template <class Acc, class T, int N>
__device__ __forceinline__ void add_gained(const T* grad, const T* gain, Acc (&sum)[N]) {
  Acc values[N], gains[N];
  load_wide<N>(grad, values);
  load_wide<N>(gain, gains);
#pragma unroll
  for (int i = 0; i < N; ++i) sum[i] += values[i] * gains[i];
}

template <class T, int N>
__device__ __forceinline__ void gained_gradient(const GradInputStep& p, int64_t token, int32_t active, int64_t h,
                                                accumulator_t<T> (&sum)[N]) {
  const T* gain = static_cast<const T*>(p.gain) + h;
#pragma unroll
  for (int i = 0; i < N; ++i) sum[i] = 0;
  for (int64_t e = 0; e < p.expert_count; ++e)
    if (load(p.offsets + e) < load(p.offsets + e + 1))
      add_gained(static_cast<const T*>(p.grad_keys) + (e * p.tokens + token) * p.hidden + h, gain + e * p.hidden, sum);
  for (int64_t i = 0; i < p.k; ++i) {
    const int32_t row = load(p.inverse + token * p.k + i);
    if (row >= active) continue;
    add_gained(static_cast<const T*>(p.grad_rows) + row * p.hidden + h, gain + load(p.experts + row) * p.hidden, sum);
  }
}

template <class T, int N>
__device__ __forceinline__ void add_residuals(const GradInputStep& p, int64_t token, int32_t active, int64_t h,
                                              Vec<T, N>& sum) {
  using Acc = accumulator_t<T>;
  const auto add = [&](const void* from, int64_t row) {
    Acc values[N];
    load_wide<N>(static_cast<const T*>(from) + row * p.hidden + h, values);
#pragma unroll
    for (int i = 0; i < N; ++i) sum[i] = T(static_cast<Acc>(sum[i]) + values[i]);
  };
  for (int64_t i = 0; i < p.k; ++i) {
    const int32_t row = load(p.inverse + token * p.k + i);
    if (row < active) add(p.grad_u, row);
  }
  if (p.grad_router) add(p.grad_router, token);
}

template <class T, int N>
__global__ void __launch_bounds__(kRowThreads, 2) train_grad_input_kernel(GradInputStep p) {
  using Acc = accumulator_t<T>;
  const int64_t token = warp_row();
  if (token >= p.tokens) return;
  const T* x = static_cast<const T*>(p.x) + token * p.hidden;
  const Acc scale = load(static_cast<const Acc*>(p.inverse_rms) + token);
  const int32_t active = load(p.offsets + p.expert_count);
  Acc dot = 0;
  each_column<N>(p.hidden, [&](int64_t h) {
    Acc g[N], values[N];
    gained_gradient<T, N>(p, token, active, h, g);
    load_wide<N>(x + h, values);
#pragma unroll
    for (int i = 0; i < N; ++i) dot += g[i] * values[i];
  });
  const Acc pull = warp_sum(dot) * scale * scale / static_cast<Acc>(p.hidden);
  each_column<N>(p.hidden, [&](int64_t h) {
    Acc g[N], values[N];
    gained_gradient<T, N>(p, token, active, h, g);
    load_wide<N>(x + h, values);
    Vec<T, N> result;
#pragma unroll
    for (int i = 0; i < N; ++i) result[i] = T(scale * (g[i] - values[i] * pull));
    add_residuals<T, N>(p, token, active, h, result);
    store_vec<N>(static_cast<T*>(p.grad_x) + token * p.hidden + h, result);
  });
}

// ---- the router's columns ------------------------------------------------------------------------------------------

// grad_logits = T(grad_z) + grad_raw, and grad_mid = grad_logits router_out.
struct GradLogitsStep {
  const void* grad_z;      // [T, E], accumulator type; nullptr: zero
  const void* grad_raw;    // [T, E]; nullptr: zero
  void* grad_logits;       // [T, E]
  const void* router_out;  // [E, R]
  void* grad_mid;          // [T, R]; nullptr: not asked for
  int64_t tokens, experts, width;
};

template <class T>
__device__ __forceinline__ T grad_logit(const GradLogitsStep& p, int64_t at) {
  using Acc = accumulator_t<T>;
  T value(Acc(0));
  if (p.grad_z) value = T(load(static_cast<const Acc*>(p.grad_z) + at));
  if (p.grad_raw) value = T(static_cast<Acc>(load(static_cast<const T*>(p.grad_raw) + at)) + static_cast<Acc>(value));
  return value;
}

template <class T, int N>
__global__ void __launch_bounds__(kRowThreads, 2) train_grad_logits_kernel(GradLogitsStep p) {
  using Acc = accumulator_t<T>;
  const int64_t token = warp_row();
  if (token >= p.tokens) return;
  const int64_t row = token * p.experts;
  for (int64_t e = warp_lane(); e < p.experts; e += kWarp)
    store(static_cast<T*>(p.grad_logits) + row + e, grad_logit<T>(p, row + e));
  if (!p.grad_mid) return;
  each_column<N>(p.width, [&](int64_t h) {
    Acc sum[N] = {};
    for (int64_t e = 0; e < p.experts; ++e) {
      const Acc grad = static_cast<Acc>(grad_logit<T>(p, row + e));
      Acc weights[N];
      load_wide<N>(static_cast<const T*>(p.router_out) + e * p.width + h, weights);
#pragma unroll
      for (int i = 0; i < N; ++i) sum[i] += grad * weights[i];
    }
    Vec<T, N> result;
#pragma unroll
    for (int i = 0; i < N; ++i) result[i] = T(sum[i]);
    store_vec<N>(static_cast<T*>(p.grad_mid) + token * p.width + h, result);
  });
}

// ---- gains ---------------------------------------------------------------------------------------------------------

inline constexpr int kGainThreads = 128;
inline constexpr int kGainParts = 16;  // in which the rows of an expert are cut

// Sums over the rows of an expert of gradient * value / rms: first kGainParts partial sums, each in row order, then
// their sum. Norm 0: in front of attention (rows of all tokens, and those of the plan); norm 1: behind it.
struct GainStep {
  const int32_t* tokens;    // the plan
  const int32_t* offsets;   //
  const void* grad_keys;    // [E, T, H]
  const void* grad_rows;    // [N, H]
  const void* x;            // [T, H]
  const void* inverse_x;    // [T]
  const void* grad_normed;  // [N, H]
  const void* u;            // [N, H]
  const void* inverse_u;    // [N]
  void* parts;              // [2, kGainParts, E, H], accumulator type
  void* grad_x_gain;        // [E, H]; nullptr: not asked for
  void* grad_u_gain;        // [E, H]; nullptr: not asked for
  int64_t tokens_count, hidden, experts;
};

// The part of [begin, end) that belongs to `part`.
__device__ inline void cut(int64_t& begin, int64_t& end, int part) {
  const int64_t length = (end - begin + kGainParts - 1) / kGainParts;
  const int64_t first = begin + part * length, last = first + length;
  begin = first < end ? first : end;
  end = last < end ? last : end;
}

template <class T, int N>
__device__ __forceinline__ void add_gain(const void* grad, int64_t grad_row, const void* values, int64_t row,
                                         const void* inverse, int64_t hidden, int64_t h, accumulator_t<T> (&sum)[N]) {
  using Acc = accumulator_t<T>;
  Acc g[N], v[N];
  load_wide<N>(static_cast<const T*>(grad) + grad_row * hidden + h, g);
  load_wide<N>(static_cast<const T*>(values) + row * hidden + h, v);
  const Acc scale = load(static_cast<const Acc*>(inverse) + row);
#pragma unroll
  for (int i = 0; i < N; ++i) sum[i] += g[i] * v[i] * scale;
}

template <class T, int N>
__global__ void __launch_bounds__(kGainThreads, 4) train_gain_parts_kernel(GainStep p) {
  using Acc = accumulator_t<T>;
  const int64_t h = (int64_t{blockIdx.x} * kGainThreads + threadIdx.x) * N, expert = blockIdx.y;
  const int norm = static_cast<int>(blockIdx.z) / kGainParts, part = static_cast<int>(blockIdx.z) % kGainParts;
  if (h >= p.hidden || !(norm == 0 ? p.grad_x_gain : p.grad_u_gain)) return;
  int64_t begin = load(p.offsets + expert), end = load(p.offsets + expert + 1);
  const bool used = begin < end;
  cut(begin, end, part);
  Acc sum[N] = {};
  if (norm == 1) {
    for (int64_t n = begin; n < end; ++n) add_gain<T, N>(p.grad_normed, n, p.u, n, p.inverse_u, p.hidden, h, sum);
  } else if (used) {
    int64_t first = 0, last = p.tokens_count;
    cut(first, last, part);
    for (int64_t t = first; t < last; ++t)
      add_gain<T, N>(p.grad_keys, expert * p.tokens_count + t, p.x, t, p.inverse_x, p.hidden, h, sum);
    for (int64_t n = begin; n < end; ++n)
      add_gain<T, N>(p.grad_rows, n, p.x, load(p.tokens + n), p.inverse_x, p.hidden, h, sum);
  }
  Acc* to = static_cast<Acc*>(p.parts) + (int64_t{blockIdx.z} * p.experts + expert) * p.hidden + h;
#pragma unroll
  for (int i = 0; i < N; ++i) store(to + i, sum[i]);
}

template <class T>
__global__ void __launch_bounds__(kGainThreads, 4) train_gains_kernel(GainStep p) {
  using Acc = accumulator_t<T>;
  const int64_t size = p.experts * p.hidden, i = int64_t{blockIdx.x} * kGainThreads + threadIdx.x;
  void* gain = blockIdx.y == 0 ? p.grad_x_gain : p.grad_u_gain;
  if (i >= size || !gain) return;
  Acc sum = 0;
#pragma unroll
  for (int part = 0; part < kGainParts; ++part)
    sum += load(static_cast<const Acc*>(p.parts) + (int64_t{blockIdx.y} * kGainParts + part) * size + i);
  store(static_cast<T*>(gain) + i, T(sum));
}

// ---- zeros ---------------------------------------------------------------------------------------------------------

inline constexpr int kClearBlocks = 64;
inline constexpr int kMostCleared = 16;

// Arrays of elements of at least two bytes.
struct ClearStep {
  void* arrays[kMostCleared];
  int64_t bytes[kMostCleared];
  int count;

  void add(void* array, int64_t size) {
    if (!array || size == 0) return;
    arrays[count] = array;
    bytes[count++] = size;
  }
};

template <class Word>
__global__ void __launch_bounds__(kRowThreads, 2) train_clear_kernel(ClearStep p) {
  constexpr int kN = 16 / sizeof(Word);
  Word* array = static_cast<Word*>(p.arrays[blockIdx.y]);
  const int64_t size = p.bytes[blockIdx.y] / static_cast<int64_t>(sizeof(Word));
  const int64_t vectors = reinterpret_cast<uintptr_t>(array) % 16 == 0 ? size / kN : 0;
  const int64_t first = int64_t{blockIdx.x} * kRowThreads + threadIdx.x, step = int64_t{gridDim.x} * kRowThreads;
  for (int64_t i = first; i < vectors; i += step) store_vec<kN>(array + i * kN, Vec<Word, kN>{});
  for (int64_t i = vectors * kN + first; i < size; i += step) store(array + i, Word{0});
}

}  // namespace micro_kernels::cuda
