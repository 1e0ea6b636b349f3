#pragma once
// Small matrix products on packed tiles, and the packing. Only the per-ISA files include this (see simd.h).
//
// A *cell* is what one vector lane multiplies in one step: a float, a double, or two bfloat16 that lie next to each
// other along the reduction (kPair = 2). With pairs a step does twice the work; sums are float either way.
//   Exact<T>  cells in the accumulator type of the stored type T
//   Paired    bfloat16 pairs, where the CPU multiplies them

#include "common/cpu/stored.h"

namespace micro_kernels::cpu {
namespace {

template <class StoredType>
struct Exact {
  using T = StoredType;
  using Acc = typename Stored<T>::Acc;
  using Cell = Acc;
  static constexpr int kPair = 1;
  static Vec<Acc> step(Vec<Cell> a, Vec<Cell> b, Vec<Acc> c) { return fma(a, b, c); }
};

#if defined(__AVX512BF16__)
struct Paired {
  using T = uint16_t;
  using Acc = float;
  using Cell = uint32_t;
  static constexpr int kPair = 2;
  static Vec<Acc> step(Vec<Cell> a, Vec<Cell> b, Vec<Acc> c) { return dot_pairs(a, b, c); }
};
#endif

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// ---- packing -------------------------------------------------------------------------------------------------------

// `count` elements as a vector of cells: one element each, or a pair of neighbours each.
template <class Mode>
inline Vec<typename Mode::Cell> load_cells(const typename Mode::T* from, int64_t count) {
  if constexpr (Mode::kPair == 1) {
    return load_wide(from, count);
  } else {
    Vec<typename Mode::Cell> cells{};
    const int64_t bytes = count * int64_t{sizeof(typename Mode::T)};
    if (bytes >= kVectorBytes) {
      __builtin_memcpy(&cells, from, sizeof(cells));
    } else {
      typename Mode::T part[kVectorBytes / sizeof(typename Mode::T)] = {};
      for (int64_t i = 0; i < count; ++i) part[i] = from[i];
      __builtin_memcpy(&cells, part, sizeof(cells));
    }
    return cells;
  }
}

// One row as an A operand: consecutive cells, `width` of them, zero behind `count` elements.
template <class Mode>
inline void pack_row(typename Mode::Cell* to, const typename Mode::T* from, int64_t count, int64_t width) {
  constexpr int n = kLanes<typename Mode::Cell>;
  for (int64_t i = 0; i < width; i += n)
    store(to + i, load_cells<Mode>(from + i * Mode::kPair, count - i * Mode::kPair));
}

// Rows from[r], r < count, to columns: to[c * stride + r] = cell c of row r. A null row is a zero column; so is every
// column between `count` and the next multiple of the vector width. Writes round_up(cells, lanes) rows of `to`.
template <class Mode>
inline void pack_columns(typename Mode::Cell* to, int64_t stride, const typename Mode::T* const* from, int64_t count,
                         int64_t elements) {
  using Cell = typename Mode::Cell;
  constexpr int n = kLanes<Cell>;
  for (int64_t r = 0; r < count; r += n)
    for (int64_t c = 0; c * Mode::kPair < elements; c += n) {
      Vec<Cell> rows[n];
#pragma GCC unroll 16
      for (int i = 0; i < n; ++i) {
        const bool there = r + i < count && from[r + i];
        rows[i] = there ? load_cells<Mode>(from[r + i] + c * Mode::kPair, elements - c * Mode::kPair) : Vec<Cell>{};
      }
      transpose<Cell>(rows);
#pragma GCC unroll 16
      for (int i = 0; i < n; ++i) store(to + (c + i) * stride + r, rows[i]);
    }
}

// Rows from[r] as a B operand that is reduced along r: to[(r / kPair) * width + i] holds element i of the kPair rows.
// A null row is zero. Writes round_up(count, kPair) / kPair rows of `width` cells.
template <class Mode>
inline void pack_rows(typename Mode::Cell* to, int64_t width, const typename Mode::T* const* from, int64_t count,
                      int64_t elements) {
  using Cell = typename Mode::Cell;
  constexpr int n = kLanes<Cell>;
  for (int64_t r = 0; r < count; r += Mode::kPair, to += width) {
    const typename Mode::T* even = from[r];
    if constexpr (Mode::kPair == 1) {
      for (int64_t i = 0; i < width; i += n) store(to + i, even ? load_wide(even + i, elements - i) : Vec<Cell>{});
    } else {
      const typename Mode::T* odd = r + 1 < count ? from[r + 1] : nullptr;
      for (int64_t i = 0; i < width; i += n) {
        const Vec<Cell> low = even ? (Vec<Cell>)load_wide(even + i, elements - i) >> 16 : Vec<Cell>{};
        const Vec<Cell> high = odd ? (Vec<Cell>)load_wide(odd + i, elements - i) : Vec<Cell>{};
        store(to + i, low | high);
      }
    }
  }
}

// ---- product -------------------------------------------------------------------------------------------------------

// C[m][n] = start + sum over steps k of A[m][k] * B[k][n], where start is 0, C[m][n] or factor[m] * C[m][n].
// A cell (m, k) lies at a[m * row_a + k * step_a]. The order of the sum is that of k, whatever m, n and the tile are.
template <class Mode>
struct Product {
  using Cell = typename Mode::Cell;
  using Acc = typename Mode::Acc;
  const Cell* a;
  int64_t row_a, step_a;
  const Cell* b;
  int64_t row_b;
  Acc* c;
  int64_t row_c;
  int64_t steps;
  bool add;           // start from C
  const Acc* factor;  // with add: times factor[m]; nullptr: times 1
};

template <class Mode, int kRows, int kVectors>
inline void product_tile(const Product<Mode>& p, int64_t m, int64_t n) {
  using Acc = typename Mode::Acc;
  using Cell = typename Mode::Cell;
  constexpr int lanes = kLanes<Acc>;
  Vec<Acc> sum[kRows][kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
    const Acc factor = p.factor ? p.factor[m + i] : Acc(1);
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j)
      sum[i][j] = p.add ? load(p.c + (m + i) * p.row_c + n + j * lanes) * factor : Vec<Acc>{};
  }
  const Cell* a = p.a + m * p.row_a;
  const Cell* b = p.b + n;
  for (int64_t k = 0; k < p.steps; ++k, a += p.step_a, b += p.row_b) {
    Vec<Cell> column[kVectors];
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) column[j] = load(b + j * lanes);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const Vec<Cell> row = broadcast<Cell>(a[i * p.row_a]);
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) sum[i][j] = Mode::step(row, column[j], sum[i][j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) store(p.c + (m + i) * p.row_c + n + j * lanes, sum[i][j]);
}

// Accumulators of a full tile: 24 of 32 registers with AVX-512, 12 of 16 elsewhere (performance.md 5.2).
constexpr int kTileRows = 6;
constexpr int kTileVectors = kVectorBytes == 64 ? 4 : 2;

template <class Mode, int kVectors>
inline void product_strip(const Product<Mode>& p, int64_t rows, int64_t n) {
  int64_t m = 0;
  for (; m + kTileRows <= rows; m += kTileRows) product_tile<Mode, kTileRows, kVectors>(p, m, n);
  switch (rows - m) {
    case 1:
      return product_tile<Mode, 1, kVectors>(p, m, n);
    case 2:
      return product_tile<Mode, 2, kVectors>(p, m, n);
    case 3:
      return product_tile<Mode, 3, kVectors>(p, m, n);
    case 4:
      return product_tile<Mode, 4, kVectors>(p, m, n);
    case 5:
      return product_tile<Mode, 5, kVectors>(p, m, n);
    default:
      return;
  }
}

// `columns` is a multiple of the vector width.
template <class Mode>
__attribute__((noinline)) void product(const Product<Mode>& p, int64_t rows, int64_t columns) {
  constexpr int lanes = kLanes<typename Mode::Acc>;
  int64_t n = 0;
  for (; n + kTileVectors * lanes <= columns; n += kTileVectors * lanes) product_strip<Mode, kTileVectors>(p, rows, n);
  for (; n < columns; n += lanes) product_strip<Mode, 1>(p, rows, n);
}

}  // namespace
}  // namespace micro_kernels::cpu
