#pragma once
// Device code of the weighted sum and its gradients. Forward: one warp per piece of a token's row. Backward: one warp
// per token, so that the token's gradient is read once for two pairs and a dot product stays within the warp.

#include "common/cuda/arch/trap.cuh"
#include "common/cuda/memory.cuh"
#include "common/cuda/rows.cuh"
#include "micro_kernels/combine.h"

namespace micro_kernels::cuda {

// A product that the compiler may not fuse with a sum: it is rounded by itself.
__device__ __forceinline__ float product(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double product(double a, double b) { return __dmul_rn(a, b); }

// ---- forward -------------------------------------------------------------------------------------------------------

inline constexpr int64_t kNoPair = INT64_MAX;

// Active pairs of a token ascend by expert, and within one expert (only a replay can hold it twice) by rank: both in
// one number.
__device__ inline int64_t pair_order(const CombineParams& p, int64_t token, int64_t rank) {
  if (rank >= p.k) return kNoPair;
  const int32_t n = load(p.inverse + token * p.k + rank);
  require(n >= 0 && n < p.token_count * p.k);
  if (n >= load(p.offsets + p.expert_count)) return kNoPair;
  return (static_cast<int64_t>(load(p.experts + n)) << 32) | rank;
}

// The first of the token's pairs after `last`, the same in all lanes. `own` is that of the lane's own rank; further
// ranks, beyond a warp, are read again.
__device__ inline int64_t next_pair(const CombineParams& p, int64_t token, int64_t own, int64_t last) {
  int64_t next = own > last ? own : kNoPair;
  for (int64_t rank = threadIdx.x % kWarp + kWarp; rank < p.k; rank += kWarp) {
    const int64_t order = pair_order(p, token, rank);
    if (order > last && order < next) next = order;
  }
  return -warp_max(-next);
}

template <class T, int N>
__device__ __forceinline__ void add_row(const CombineParams& p, const Piece<N>& piece, int64_t pair,
                                        Vec<T, N> (&sums)[kPieceVectors]) {
  using Acc = accumulator_t<T>;
  const Acc weight = static_cast<Acc>(load(static_cast<const T*>(p.weights) + pair));
  const T* row = static_cast<const T*>(p.y) + load(p.inverse + pair) * p.hidden;
#pragma unroll
  for (int i = 0; i < kPieceVectors; ++i) {
    if (piece.column(i) >= p.hidden) continue;
    const Vec<T, N> values = load_vec<N>(row + piece.column(i));
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const T term(product(static_cast<Acc>(values[j]), weight));
      sums[i][j] = T(static_cast<Acc>(sums[i][j]) + static_cast<Acc>(term));
    }
  }
}

template <class T, int N>
__global__ void __launch_bounds__(kRowThreads, 3) combine_kernel(CombineParams p) {
  const Piece<N> piece;
  if (piece.row >= p.token_count) return;
  const int64_t own = pair_order(p, piece.row, threadIdx.x % kWarp);
  int64_t last = INT64_MIN;
  Vec<T, N> sums[kPieceVectors]{};
  for (int64_t left = p.k; left > 0; --left) {
    last = next_pair(p, piece.row, own, last);
    if (last == kNoPair) break;
    add_row<T, N>(p, piece, piece.row * p.k + (last & 0xffffffff), sums);
  }
  T* out = static_cast<T*>(p.out) + piece.row * p.hidden;
#pragma unroll
  for (int i = 0; i < kPieceVectors; ++i)
    if (piece.column(i) < p.hidden) store_vec<N>(out + piece.column(i), sums[i]);
}

// ---- backward ------------------------------------------------------------------------------------------------------

inline constexpr int kPairsAtOnce = 2;  // pairs that share one reading of their token's gradient

template <class T>
struct BackwardPair {
  int64_t row = 0;  // where its rows of y and grad_y begin, in elements
  bool exists = false, active = false;
  accumulator_t<T> weight = 0, dot = 0;
};

template <class T>
__device__ __forceinline__ BackwardPair<T> backward_pair(const CombineBackwardParams& p, int64_t pair) {
  const int32_t n = load(p.inverse + pair);
  require(n >= 0 && n < p.token_count * p.k);
  BackwardPair<T> result;
  result.row = n * p.hidden;
  result.exists = true;
  result.active = n < load(p.offsets + p.expert_count);
  if (p.grad_y && result.active)
    result.weight = static_cast<accumulator_t<T>>(load(static_cast<const T*>(p.weights) + pair));
  return result;
}

// One vector of the token's gradient, for all its pairs: every load stands before the first store.
template <class T, int N>
__device__ __forceinline__ void backward_vector(const CombineBackwardParams& p, const Vec<T, N>& grad, int64_t column,
                                                BackwardPair<T> (&pairs)[kPairsAtOnce]) {
  using Acc = accumulator_t<T>;
  Vec<T, N> y[kPairsAtOnce]{};
#pragma unroll
  for (int i = 0; i < kPairsAtOnce; ++i)
    if (p.grad_weights && pairs[i].active) y[i] = load_vec<N>(static_cast<const T*>(p.y) + pairs[i].row + column);
#pragma unroll
  for (int i = 0; i < kPairsAtOnce; ++i) {
#pragma unroll
    for (int j = 0; j < N; ++j) pairs[i].dot += static_cast<Acc>(grad[j]) * static_cast<Acc>(y[i][j]);
    if (!p.grad_y || !pairs[i].exists) continue;
    Vec<T, N> grad_y;
#pragma unroll
    for (int j = 0; j < N; ++j) grad_y[j] = T(pairs[i].active ? static_cast<Acc>(grad[j]) * pairs[i].weight : Acc(0));
    store_vec<N>(static_cast<T*>(p.grad_y) + pairs[i].row + column, grad_y);
  }
}

template <class T, int N>
__global__ void __launch_bounds__(kRowThreads, 3) combine_backward_kernel(CombineBackwardParams p) {
  using Acc = accumulator_t<T>;
  const int64_t token = int64_t{blockIdx.x} * kRowWarps + threadIdx.x / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  if (token >= p.token_count) return;
  const T* grad = static_cast<const T*>(p.grad) + token * p.hidden;
  for (int64_t first = 0; first < p.k; first += kPairsAtOnce) {
    BackwardPair<T> pairs[kPairsAtOnce];
#pragma unroll
    for (int i = 0; i < kPairsAtOnce; ++i)
      if (first + i < p.k) pairs[i] = backward_pair<T>(p, token * p.k + first + i);
    for (int64_t column = int64_t{lane} * N; column < p.hidden; column += kWarp * N)
      backward_vector<T, N>(p, load_vec<N>(grad + column), column, pairs);
    if (!p.grad_weights) continue;
#pragma unroll
    for (int i = 0; i < kPairsAtOnce; ++i) {
      const Acc dot = warp_sum(pairs[i].dot);
      if (lane == 0 && pairs[i].exists)
        store(static_cast<Acc*>(p.grad_weights) + token * p.k + first + i, pairs[i].active ? dot : Acc(0));
    }
  }
}

}  // namespace micro_kernels::cuda
