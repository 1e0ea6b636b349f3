#pragma once
// Device code of changed rows and their gradients: one warp per piece of a row; sums of gradients of values by a block
// per 32 columns and row of values, or, with many rows of values, a thread per column.

#include "common/cuda/arch/trap.cuh"
#include "common/cuda/memory.cuh"
#include "common/cuda/rows.cuh"
#include "micro_kernels/intervene.h"

namespace micro_kernels::cuda {

inline constexpr int64_t kMostValueRows = 64;  // that blocks of their own add up

// What a row of x meets: the columns of its expert, and its row of values.
template <class T>
struct ChangedRow {
  bool touched;
  int64_t number = 0;             // of the row of values
  const bool* columns = nullptr;  // [width]; nullptr: all
  const T* values = nullptr;      // [width], or one for all columns
  bool one = false;

  __device__ ChangedRow(const InterveneParams& p, int64_t row) : touched(!p.touched || load(p.touched + row)) {
    if (!touched) return;
    const int64_t expert = p.expert ? load(p.expert + row) : 0;
    require(!p.columns || (expert >= 0 && expert < p.experts));
    if (p.columns) columns = p.columns + expert * p.width;
    if (p.change == Change::kZero) return;
    number = p.index ? load(p.index + row) : p.value_rows == 1 ? 0 : expert;
    require(number >= 0 && number < p.value_rows);
    values = static_cast<const T*>(p.value) + number * p.value_width;
    one = p.value_width == 1;
  }
  __device__ bool names(int64_t column) const { return touched && (!columns || load(columns + column)); }
  __device__ accumulator_t<T> at(int64_t column) const {
    return static_cast<accumulator_t<T>>(load(values + (one ? 0 : column)));
  }
};

template <class T>
__device__ __forceinline__ T changed_element(Change change, T x, accumulator_t<T> value) {
  using Acc = accumulator_t<T>;
  if (change == Change::kScale) return T(static_cast<Acc>(x) * value);
  if (change == Change::kShift) return T(static_cast<Acc>(x) + value);
  return T(value);
}

template <class T, int N>
__global__ void __launch_bounds__(kRowThreads) intervene_kernel(InterveneParams p) {
  using Acc = accumulator_t<T>;
  const Piece<N> piece;
  if (piece.row >= p.rows) return;
  const ChangedRow<T> row(p, piece.row);
  const T* x = static_cast<const T*>(p.x) + piece.row * p.width;
  T* y = static_cast<T*>(p.y) + piece.row * p.width;
#pragma unroll 1
  for (int i = 0; i < kPieceVectors; ++i) {
    const int64_t first = piece.column(i);
    if (first >= p.width) break;
    Vec<T, N> values = load_vec<N>(x + first);
#pragma unroll
    for (int j = 0; j < N; ++j)
      if (row.names(first + j))
        values[j] = changed_element(p.change, values[j], row.values ? row.at(first + j) : Acc(0));
    store_vec<N>(y + first, values);
  }
}

template <class T, int N>
__global__ void __launch_bounds__(kRowThreads) intervene_backward_kernel(InterveneBackwardParams b) {
  using Acc = accumulator_t<T>;
  const InterveneParams& p = b.forward;
  const Piece<N> piece;
  if (piece.row >= p.rows) return;
  const ChangedRow<T> row(p, piece.row);
  const T* grad_y = static_cast<const T*>(b.grad_y) + piece.row * p.width;
  T* grad_x = static_cast<T*>(b.grad_x) + piece.row * p.width;
  const bool scale = p.change == Change::kScale;
#pragma unroll 1
  for (int i = 0; i < kPieceVectors; ++i) {
    const int64_t first = piece.column(i);
    if (first >= p.width) break;
    Vec<T, N> grad = load_vec<N>(grad_y + first);
#pragma unroll
    for (int j = 0; j < N; ++j)
      if (p.change != Change::kShift && row.names(first + j))
        grad[j] = scale ? T(static_cast<Acc>(grad[j]) * row.at(first + j)) : T(Acc(0));
    store_vec<N>(grad_x + first, grad);
  }
}

// What a row gives to the gradient of its value in a column.
template <class T>
__device__ __forceinline__ accumulator_t<T> value_gradient(const InterveneBackwardParams& b, int64_t row,
                                                           int64_t column) {
  using Acc = accumulator_t<T>;
  const int64_t at = row * b.forward.width + column;
  const Acc grad = static_cast<Acc>(load(static_cast<const T*>(b.grad_y) + at));
  if (b.forward.change != Change::kScale) return grad;
  return grad * static_cast<Acc>(load(static_cast<const T*>(b.forward.x) + at));
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
#pragma unroll 1
  for (int64_t n = warp; n < p.rows; n += kRowWarps) {
    const ChangedRow<T> row(p, n);
    if (row.touched && row.number == blockIdx.y && column < p.width && row.names(column))
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
#pragma unroll 1
  for (int64_t n = 0; n < p.rows; ++n) {
    const ChangedRow<T> row(p, n);
    if (!row.names(column)) continue;
    Acc* sum = sums + row.number * p.width;
    store(sum, load(static_cast<const Acc*>(sum)) + value_gradient<T>(b, n, column));
  }
}

}  // namespace micro_kernels::cuda
