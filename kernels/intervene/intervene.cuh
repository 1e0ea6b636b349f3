#pragma once
// Device code of changed rows and their gradients: one warp per piece of a row; sums of gradients of values by a block
// per 32 columns and row of values, or, with many rows of values, a thread per column.

#include "common/cuda/arch/trap.cuh"
#include "common/cuda/memory.cuh"
#include "common/cuda/rows.cuh"
#include "micro_kernels/intervene.h"

namespace micro_kernels::cuda {

inline constexpr int64_t kMostValueRows = 64;  // that blocks of their own add up

// What a row of x meets: which columns, and which row of values.
struct ChangedRow {
  bool touched;
  int64_t expert, value;

  __device__ ChangedRow(const InterveneParams& p, int64_t row)
      : touched(!p.touched || load(p.touched + row)), expert(0), value(0) {
    if (!touched) return;
    expert = p.expert ? load(p.expert + row) : 0;
    require(!p.columns || (expert >= 0 && expert < p.experts));
    if (p.change == Change::kZero) return;
    value = p.index ? load(p.index + row) : p.value_rows == 1 ? 0 : expert;
    require(value >= 0 && value < p.value_rows);
  }
  __device__ bool names(const InterveneParams& p, int64_t column) const {
    return touched && (!p.columns || load(p.columns + expert * p.width + column));
  }
  template <class T>
  __device__ accumulator_t<T> at(const InterveneParams& p, int64_t column) const {
    const int64_t place = value * p.value_width + (p.value_width == 1 ? 0 : column);
    return static_cast<accumulator_t<T>>(load(static_cast<const T*>(p.value) + place));
  }
};

template <class T, int N>
__global__ void __launch_bounds__(kRowThreads) intervene_kernel(InterveneParams p) {
  using Acc = accumulator_t<T>;
  const Piece<N> piece;
  if (piece.row >= p.rows) return;
  const ChangedRow row(p, piece.row);
  for (int i = 0; i < kPieceVectors; ++i) {
    if (piece.column(i) >= p.width) continue;
    const int64_t at = piece.row * p.width + piece.column(i);
    Vec<T, N> values = load_vec<N>(static_cast<const T*>(p.x) + at);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const int64_t column = piece.column(i) + j;
      if (!row.names(p, column)) continue;
      const Acc value = p.change == Change::kZero ? Acc(0) : row.at<T>(p, column);
      if (p.change == Change::kScale)
        values[j] = T(static_cast<Acc>(values[j]) * value);
      else if (p.change == Change::kShift)
        values[j] = T(static_cast<Acc>(values[j]) + value);
      else
        values[j] = T(value);
    }
    store_vec<N>(static_cast<T*>(p.y) + at, values);
  }
}

template <class T, int N>
__global__ void __launch_bounds__(kRowThreads) intervene_backward_kernel(InterveneBackwardParams b) {
  using Acc = accumulator_t<T>;
  const InterveneParams& p = b.forward;
  const Piece<N> piece;
  if (piece.row >= p.rows) return;
  const ChangedRow row(p, piece.row);
  for (int i = 0; i < kPieceVectors; ++i) {
    if (piece.column(i) >= p.width) continue;
    const int64_t at = piece.row * p.width + piece.column(i);
    Vec<T, N> grad = load_vec<N>(static_cast<const T*>(b.grad_y) + at);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const int64_t column = piece.column(i) + j;
      if (p.change == Change::kShift || !row.names(p, column)) continue;
      const Acc factor = p.change == Change::kScale ? row.at<T>(p, column) : Acc(0);
      grad[j] = p.change == Change::kScale ? T(static_cast<Acc>(grad[j]) * factor) : T(Acc(0));
    }
    store_vec<N>(static_cast<T*>(b.grad_x) + at, grad);
  }
}

// What a row gives to the gradient of its value in a column.
template <class T>
__device__ __forceinline__ accumulator_t<T> value_gradient(const InterveneBackwardParams& b, int64_t row,
                                                           int64_t column) {
  using Acc = accumulator_t<T>;
  const int64_t at = row * b.forward.width + column;
  const Acc grad = static_cast<Acc>(load(static_cast<const T*>(b.grad_y) + at));
  return b.forward.change == Change::kScale ? grad * static_cast<Acc>(load(static_cast<const T*>(b.forward.x) + at))
                                            : grad;
}

template <class Acc>
struct ValueSumMemory {
  SharedArray<Acc, kRowThreads> sums;  // [warps][lanes]
};

// A block: 32 columns of one row of values; a warp takes every eighth row of x, and the warps' sums are added in order.
template <class T>
__global__ void __launch_bounds__(kRowThreads) intervene_value_kernel(InterveneBackwardParams b) {
  using Acc = accumulator_t<T>;
  const InterveneParams& p = b.forward;
  auto& memory = shared_memory<ValueSumMemory<Acc>>();
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t column = int64_t{blockIdx.x} * kWarp + lane;
  Acc sum = 0;
  for (int64_t n = warp; n < p.rows; n += kRowWarps) {
    const ChangedRow row(p, n);
    if (row.touched && row.value == blockIdx.y && column < p.width && row.names(p, column))
      sum += value_gradient<T>(b, n, column);
  }
  memory.sums.store(static_cast<int>(threadIdx.x), sum);
  __syncthreads();
  if (warp > 0 || column >= p.width) return;
  Acc total = 0;
  for (int i = 0; i < kRowWarps; ++i) total += memory.sums.load(i * kWarp + lane);
  store(static_cast<Acc*>(b.grad_value) + int64_t{blockIdx.y} * p.width + column, total);
}

// A thread: one column of all rows of values.
template <class T>
__global__ void __launch_bounds__(kRowThreads) intervene_source_kernel(InterveneBackwardParams b) {
  using Acc = accumulator_t<T>;
  const InterveneParams& p = b.forward;
  const int64_t column = int64_t{blockIdx.x} * kRowThreads + threadIdx.x;
  if (column >= p.width) return;
  Acc* sums = static_cast<Acc*>(b.grad_value) + column;
  for (int64_t r = 0; r < p.value_rows; ++r) store(sums + r * p.width, Acc(0));
  for (int64_t n = 0; n < p.rows; ++n) {
    const ChangedRow row(p, n);
    if (!row.names(p, column)) continue;
    Acc* sum = sums + row.value * p.width;
    store(sum, load(static_cast<const Acc*>(sum)) + value_gradient<T>(b, n, column));
  }
}

}  // namespace micro_kernels::cuda
