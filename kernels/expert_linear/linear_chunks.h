#pragma once
// One panel of a product: all rows of a part against 64 columns. Included by the per-ISA files only.
//
// The panel is walked in chunks along the reduction: a chunk of B (64 columns, 24 KiB) stays in the first-level cache
// while tiles of six rows pass over it; the sums wait in scratch memory between chunks. Each sum is one chain over the
// reduction, so chunks, tiles and row blocks leave no trace in the result (performance.md 9.9).

#include "common/cpu/tiles.h"
#include "expert_linear/linear_items.h"

namespace micro_kernels::cpu {
namespace {

constexpr int64_t kChunkBytes = 24 * 1024;
template <class Mode>
constexpr int64_t kChunk = kChunkBytes / (kPanel * int64_t{sizeof(typename Mode::Cell)});  // steps of the reduction
// Of cells that are read in place: the second-level cache delivers them fast enough, and sums wait less often.
template <class Mode>
constexpr int64_t kLongChunk = 4 * kChunk<Mode>;

// Gradients of weights: columns of x are packed once for all blocks of outputs, if there are not too many rows.
constexpr int64_t kKeptChunks = 2;

template <class Mode>
struct PanelScratch {
  using Acc = typename Mode::Acc;
  using Cell = typename Mode::Cell;
  Acc* sums;          // [kGradientPanels, kRowBlock, kPanel]
  Acc* up_sums;       // the second panel of them, for the second matrix of a gated unit
  Cell* b;            // [kKeptChunks, kGradientPanels, kChunk, kPanel]: one chunk, or those of a gradient's columns
  Cell* a;            // [kRowBlock, kChunk]: rows that cannot be read as cells where they lie
  const Cell** rows;  // [kRowBlock]
  int64_t bytes;

  explicit PanelScratch(char* base) {
    int64_t used = 0;
    const auto take = [&](int64_t size) {
      char* piece = base ? base + used : nullptr;
      used += round_up(size, 64);
      return piece;
    };
    sums = reinterpret_cast<Acc*>(take(kGradientPanels * kRowBlock * kPanel * sizeof(Acc)));
    up_sums = sums + kRowBlock * kPanel;
    b = reinterpret_cast<Cell*>(take(kKeptChunks * kGradientPanels * kChunk<Mode> * kPanel * sizeof(Cell)));
    a = reinterpret_cast<Cell*>(take(kRowBlock * kChunk<Mode> * sizeof(Cell)));
    rows = reinterpret_cast<const Cell**>(take(kRowBlock * sizeof(Cell*)));
    bytes = used;
  }
};

// ---- rows of x as cells --------------------------------------------------------------------------------------------

template <class T>
inline const T* row_of(const ConstRows& rows, int64_t r) {
  return static_cast<const T*>(rows.data) + (rows.index ? rows.index[r] : r) * rows.stride;
}

// Whether a packed matrix can be read as cells where it lies: bfloat16 is stored in pairs.
template <class Mode>
constexpr bool kPackedAsCells = sizeof(typename Mode::T) * Mode::kPair == sizeof(typename Mode::Cell);

template <class Mode>
constexpr bool rows_are_cells(int64_t length) {
  return kPackedAsCells<Mode> && length % Mode::kPair == 0;
}

// Pointers to `count` rows of `length` elements from step k on: into the rows themselves where their elements already
// are cells, else into converted copies.
template <class Mode>
inline void row_cells(const ConstRows& x, int64_t length, int64_t first, int64_t count, int64_t k, int64_t steps,
                      const PanelScratch<Mode>& scratch) {
  using T = typename Mode::T;
  using Cell = typename Mode::Cell;
  const bool direct = rows_are_cells<Mode>(length);
  for (int64_t r = 0; r < count; ++r) {
    const T* row = row_of<T>(x, first + r) + k * Mode::kPair;
    if (direct) {
      scratch.rows[r] = reinterpret_cast<const Cell*>(row);
    } else {
      Cell* copy = scratch.a + r * kChunk<Mode>;
      pack_row<Mode>(copy, row, length - k * Mode::kPair, round_up(steps, kLanes<Cell>));
      scratch.rows[r] = copy;
    }
  }
}

template <class Acc>
inline void clear(Acc* sums, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes<Acc>) store(sums + i, Vec<Acc>{});
}

// ---- product of rows with one chunk --------------------------------------------------------------------------------

// Rows of a matrix that will be packed next. They are fetched bit by bit between the tiles of the product before: all
// at once they would wait for memory.
struct NextRows {
  const char* data = nullptr;
  int64_t stride = 0, rows = 0, bytes = 0;

  // The part of them that belongs to tile `tile` of `tiles`.
  void fetch(int64_t tile, int64_t tiles) const {
    for (int64_t r = rows * tile / tiles; r < rows * (tile + 1) / tiles; ++r)
      for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(data + r * stride + i, 0, 2);
  }
};

// What a product does beside adding up: start from 0 rather than from what the sums hold; fetch the packed chunk that
// will be read next; fetch rows.
template <class Cell>
struct ChunkOptions {
  bool start = false;
  const Cell* ahead = nullptr;
  NextRows next = {};
};

// sums[r][n] += sum over steps k of rows[r][k * step] * b[k][n], for kRows rows and kVectors vectors of columns.
template <class Mode, int kRows, int kVectors, bool kStart, bool kAhead>
inline void chunk_tile(const typename Mode::Cell* const* rows, int64_t step, const typename Mode::Cell* b,
                       int64_t steps, typename Mode::Acc* sums, const typename Mode::Cell* ahead) {
  using Acc = typename Mode::Acc;
  using Cell = typename Mode::Cell;
  constexpr int lanes = kLanes<Acc>;
  Vec<Acc> sum[kRows][kVectors];
  const Cell* row[kRows];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
    row[i] = rows[i];
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) sum[i][j] = kStart ? Vec<Acc>{} : load(sums + i * kPanel + j * lanes);
  }
  for (int64_t k = 0; k < steps; ++k, b += kPanel) {
    Vec<Cell> column[kVectors];
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) {
      column[j] = load(b + j * lanes);
      if constexpr (kAhead) __builtin_prefetch(ahead + k * kPanel + j * lanes);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      Cell cell;
      __builtin_memcpy(&cell, reinterpret_cast<const char*>(row[i] + k * step), sizeof(cell));
      const Vec<Cell> a = broadcast<Cell>(cell);
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) sum[i][j] = Mode::step(a, column[j], sum[i][j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) store(sums + i * kPanel + j * lanes, sum[i][j]);
}

template <class Mode, int kRows, bool kStart, bool kAhead>
inline void chunk_rows(const typename Mode::Cell* const* rows, int64_t step, const typename Mode::Cell* b,
                       int64_t steps, typename Mode::Acc* sums, const typename Mode::Cell* ahead = nullptr) {
  constexpr int64_t strip = kTileVectors * kLanes<typename Mode::Acc>;
  for (int64_t n = 0; n < kPanel; n += strip)
    chunk_tile<Mode, kRows, kTileVectors, kStart, kAhead>(rows, step, b + n, steps, sums + n, ahead + n);
}

template <class Mode, bool kStart, bool kAhead>
inline void last_rows(const typename Mode::Cell* const* rows, int64_t count, int64_t step, const typename Mode::Cell* b,
                      int64_t steps, typename Mode::Acc* sums, const typename Mode::Cell* ahead = nullptr) {
  switch (count) {
    case 1:
      return chunk_rows<Mode, 1, kStart, kAhead>(rows, step, b, steps, sums, ahead);
    case 2:
      return chunk_rows<Mode, 2, kStart, kAhead>(rows, step, b, steps, sums, ahead);
    case 3:
      return chunk_rows<Mode, 3, kStart, kAhead>(rows, step, b, steps, sums, ahead);
    case 4:
      return chunk_rows<Mode, 4, kStart, kAhead>(rows, step, b, steps, sums, ahead);
    case 5:
      return chunk_rows<Mode, 5, kStart, kAhead>(rows, step, b, steps, sums, ahead);
    default:
      return;
  }
}

// Of the chunk ahead only the first tile fetches: those behind it find the same lines on their way.
template <class Mode, bool kStart>
__attribute__((noinline)) void chunk_tiles(const typename Mode::Cell* const* rows, int64_t count, int64_t step,
                                           const typename Mode::Cell* b, int64_t steps, typename Mode::Acc* sums,
                                           const ChunkOptions<typename Mode::Cell>& options) {
  if (options.ahead && count < kTileRows)
    return last_rows<Mode, kStart, true>(rows, count, step, b, steps, sums, options.ahead);
  const int64_t tiles = (count + kTileRows - 1) / kTileRows;
  int64_t r = 0;
  if (options.ahead) {
    chunk_rows<Mode, kTileRows, kStart, true>(rows, step, b, steps, sums, options.ahead);
    r = kTileRows;
  }
  for (; r + kTileRows <= count; r += kTileRows) {
    options.next.fetch(r / kTileRows, tiles);
    chunk_rows<Mode, kTileRows, kStart, false>(rows + r, step, b, steps, sums + r * kPanel);
  }
  options.next.fetch(tiles - 1, tiles);
  last_rows<Mode, kStart, false>(rows + r, count - r, step, b, steps, sums + r * kPanel);
}

template <class Mode>
inline void chunk_product(const typename Mode::Cell* const* rows, int64_t count, int64_t step,
                          const typename Mode::Cell* b, int64_t steps, typename Mode::Acc* sums,
                          const ChunkOptions<typename Mode::Cell>& options) {
  options.start ? chunk_tiles<Mode, true>(rows, count, step, b, steps, sums, options)
                : chunk_tiles<Mode, false>(rows, count, step, b, steps, sums, options);
}

}  // namespace
}  // namespace micro_kernels::cpu
