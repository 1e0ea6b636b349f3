#pragma once
// Dot products of a few rows of x with rows of a weight matrix. Bound by the weights' bytes: several weight rows are in
// flight at a time, and the next ones are prefetched. Included by the per-ISA files only.

#include "common/cpu/tiles.h"
#include "expert_linear/few_rows_items.h"

namespace micro_kernels::cpu {
namespace {

constexpr int kWeightRows = 4;  // in flight

// y[i][j] = x[i] . w[j]. Each sum runs over the vectors of the rows in order, one accumulator, so that it does not
// depend on how many rows stand beside it.
template <class Mode, int kX, int kW>
inline void dot_tile(const typename Mode::T* x, const typename Mode::T* w, int64_t in, typename Mode::T* y,
                     int64_t out) {
  using T = typename Mode::T;
  using Acc = typename Mode::Acc;
  using Cell = typename Mode::Cell;
  constexpr int64_t step = kLanes<Cell> * Mode::kPair;
  Vec<Acc> sum[kX][kW] = {};
  auto add = [&](int64_t i, int64_t count) __attribute__((always_inline)) {
    Vec<Cell> row[kX];
#pragma GCC unroll 8
    for (int a = 0; a < kX; ++a) row[a] = load_cells<Mode>(x + a * in + i, count);
#pragma GCC unroll 8
    for (int b = 0; b < kW; ++b) {
      __builtin_prefetch(w + (kW + b) * in + i);
      const Vec<Cell> weight = load_cells<Mode>(w + b * in + i, count);
#pragma GCC unroll 8
      for (int a = 0; a < kX; ++a) sum[a][b] = Mode::step(row[a], weight, sum[a][b]);
    }
  };
  int64_t i = 0;
  for (; i + step <= in; i += step) add(i, step);
  if (i < in) add(i, in - i);
  constexpr int lanes = kLanes<Acc>;
  if constexpr (kX * kW % lanes == 0 && lanes % kW == 0) {
#pragma GCC unroll 8
    for (int a = 0; a < kX; a += lanes / kW) {
      T totals[lanes];
      store_narrow(totals, sums_of<Acc>(sum[a]));
#pragma GCC unroll 8
      for (int i = 0; i < lanes; ++i) y[(a + i / kW) * out + i % kW] = totals[i];
    }
  } else {
#pragma GCC unroll 8
    for (int a = 0; a < kX; ++a)
#pragma GCC unroll 8
      for (int b = 0; b < kW; ++b) store_narrow<T>(y + a * out + b, broadcast<Acc>(sum_lanes<Acc>(sum[a][b])), 1);
  }
}

template <class Mode, int kW>
inline void dot_rows(const typename Mode::T* x, const typename Mode::T* w, int64_t in, typename Mode::T* y, int64_t out,
                     int64_t rows) {
  constexpr int kX = 4;
  for (; rows >= kX; rows -= kX, x += kX * in, y += kX * out) dot_tile<Mode, kX, kW>(x, w, in, y, out);
  switch (rows) {
    case 1:
      return dot_tile<Mode, 1, kW>(x, w, in, y, out);
    case 2:
      return dot_tile<Mode, 2, kW>(x, w, in, y, out);
    case 3:
      return dot_tile<Mode, 3, kW>(x, w, in, y, out);
    default:
      return;
  }
}

template <class Mode>
void few_rows(const LinearRows& part, int64_t in, int64_t out, int64_t begin, int64_t end) {
  using T = typename Mode::T;
  const T* x = static_cast<const T*>(part.x);
  const T* w = static_cast<const T*>(part.weight);
  T* y = static_cast<T*>(part.y);
  int64_t o = begin;
  for (; o + kWeightRows <= end; o += kWeightRows)
    dot_rows<Mode, kWeightRows>(x, w + o * in, in, y + o, out, part.rows);
  for (; o < end; ++o) dot_rows<Mode, 1>(x, w + o * in, in, y + o, out, part.rows);
}

}  // namespace
}  // namespace micro_kernels::cpu
