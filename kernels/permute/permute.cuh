#pragma once
// Device code of the gather and its gradient: one warp per piece of a row of the output.

#include "common/cuda/arch/trap.cuh"
#include "common/cuda/memory.cuh"
#include "common/cuda/rows.cuh"
#include "micro_kernels/permute.h"

namespace micro_kernels::cuda {

template <class T, int N>
__global__ void __launch_bounds__(kRowThreads) permute_kernel(PermuteParams p) {
  const Piece<N> piece;
  if (piece.row >= p.rows) return;
  const bool active = piece.row < load(p.offsets + p.experts);
  const int64_t token = active ? load(p.tokens + piece.row) : 0;
  require(token >= 0 && (token < p.token_count || !active));
  const T* x = static_cast<const T*>(p.x) + token * p.hidden;
  T* y = static_cast<T*>(p.y) + piece.row * p.hidden;

  Vec<T, N> values[kPieceVectors]{};
#pragma unroll
  for (int i = 0; i < kPieceVectors; ++i)
    if (active && piece.column(i) < p.hidden) values[i] = load_vec<N>(x + piece.column(i));
#pragma unroll
  for (int i = 0; i < kPieceVectors; ++i)
    if (piece.column(i) < p.hidden) store_vec<N>(y + piece.column(i), values[i]);
}

template <class T, int N>
__global__ void __launch_bounds__(kRowThreads) permute_backward_kernel(PermuteBackwardParams p) {
  using Acc = accumulator_t<T>;
  const Piece<N> piece;
  if (piece.row >= p.token_count) return;
  const int32_t active = load(p.offsets + p.experts);

  Acc sums[kPieceVectors][N]{};
  for (int64_t pair = piece.row * p.k; pair < (piece.row + 1) * p.k; ++pair) {
    const int64_t n = load(p.inverse + pair);
    require(n >= 0 && n < p.token_count * p.k);
    if (n >= active) continue;
    const T* row = static_cast<const T*>(p.grad_y) + n * p.hidden;
#pragma unroll
    for (int i = 0; i < kPieceVectors; ++i) {
      if (piece.column(i) >= p.hidden) continue;
      const Vec<T, N> values = load_vec<N>(row + piece.column(i));
#pragma unroll
      for (int j = 0; j < N; ++j) sums[i][j] += static_cast<Acc>(values[j]);
    }
  }

  T* grad_x = static_cast<T*>(p.grad_x) + piece.row * p.hidden;
#pragma unroll
  for (int i = 0; i < kPieceVectors; ++i) {
    if (piece.column(i) >= p.hidden) continue;
    Vec<T, N> values;
#pragma unroll
    for (int j = 0; j < N; ++j) values[j] = T(sums[i][j]);
    store_vec<N>(grad_x + piece.column(i), values);
  }
}

}  // namespace micro_kernels::cuda
