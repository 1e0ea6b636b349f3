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

// ---- chunks of a weight matrix -------------------------------------------------------------------------------------

// Whether a packed matrix can be read as cells where it lies: bfloat16 is stored in pairs.
template <class Mode>
constexpr bool kPackedAsCells = sizeof(typename Mode::T) * Mode::kPair == sizeof(typename Mode::Cell);

// Integers and bfloat16 are packed in pairs along the reduction, [pairs, kPanel, 2]; other types [in, kPanel].
template <class T>
constexpr int64_t kStoredPair = sizeof(T) == 2 ? 2 : 1;

inline Vec<float> widen_low(Vec<uint32_t> pairs) { return (Vec<float>)(pairs << 16); }
inline Vec<float> widen_high(Vec<uint32_t> pairs) { return (Vec<float>)(pairs & 0xffff0000u); }

// Packed bfloat16 pairs to floats, for instruction sets that do not multiply pairs.
inline void unpack_pairs(float* to, const uint16_t* pairs, int64_t steps) {
  for (int64_t k = 0; k < steps; k += 2, pairs += 2 * kPanel)
    for (int64_t n = 0; n < kPanel; n += kLanes<float>) {
      Vec<uint32_t> v;
      __builtin_memcpy(&v, pairs + 2 * n, sizeof(v));
      store(to + k * kPanel + n, widen_low(v));
      store(to + (k + 1) * kPanel + n, widen_high(v));
    }
}

// The lower and the upper integer of 32-bit lanes that hold two bytes.
inline Vec<float> low_integer(Vec<uint32_t> v) {
  return __builtin_convertvector((Vec<int32_t>)(v << 24) >> 24, Vec<float>);
}
inline Vec<float> high_integer(Vec<uint32_t> v) {
  return __builtin_convertvector((Vec<int32_t>)(v << 16) >> 24, Vec<float>);
}

// Integers to cells. They are exact in every cell type.
template <class Mode>
inline void unpack_int8(typename Mode::Cell* to, const int8_t* pairs, int64_t steps) {
  using Cell = typename Mode::Cell;
  for (int64_t k = 0; k < steps * Mode::kPair; k += 2, pairs += 2 * kPanel) {
    Cell* low = to + k / Mode::kPair * kPanel;
    if constexpr (sizeof(Cell) == 8) {
      for (int64_t n = 0; n < kPanel; ++n) {
        low[n] = pairs[2 * n];
        low[kPanel + n] = pairs[2 * n + 1];
      }
      continue;
    }
    for (int64_t n = 0; n < kPanel; n += kLanes<float>) {
      HalfVec both;
      __builtin_memcpy(&both, pairs + 2 * n, sizeof(both));
      const Vec<uint32_t> v = widen(both);
      if constexpr (Mode::kPair == 2) {
        store(low + n, (Vec<uint32_t>)low_integer(v) >> 16 | ((Vec<uint32_t>)high_integer(v) & 0xffff0000u));
      } else if constexpr (sizeof(Cell) == 4) {
        store(low + n, low_integer(v));
        store(low + kPanel + n, high_integer(v));
      }
    }
  }
}

// Columns [column, column + 64) of a matrix as chunks of cells [steps, kPanel].
template <class Mode>
struct WeightPanel {
  using T = typename Mode::T;
  using Cell = typename Mode::Cell;
  const Matrix& matrix;
  int64_t in, out, column;

  int64_t steps() const { return round_up(in, Mode::kPair) / Mode::kPair; }
  bool in_place() const { return matrix.format == WeightFormat::kPacked && kPackedAsCells<Mode>; }

  // The first weights of the panel.
  const char* begin() const {
    const char* data = static_cast<const char*>(matrix.data);
    switch (matrix.format) {
      case WeightFormat::kPlain:
        return data + column * in * int64_t{sizeof(T)};
      case WeightFormat::kInt8:
        return data + packed_at(0, 2);
      case WeightFormat::kPacked:
        break;
    }
    return data + packed_at(0, kStoredPair<T>) * int64_t{sizeof(T)};
  }

  // What chunk() reads after `count` steps at k, if that is made of rows: the next chunk of this panel's, or, behind
  // its last one, the first of the panel at `then`.
  NextRows next_rows(int64_t k, int64_t count, const char* then) const {
    if (matrix.format != WeightFormat::kPlain) return {};
    const int64_t i = (k + count) * Mode::kPair, most = kChunk<Mode> * Mode::kPair, row = in * int64_t{sizeof(T)};
    if (i >= in) return {then, row, then ? kPanel : 0, (in < most ? in : most) * int64_t{sizeof(T)}};
    const int64_t rows = out - column < kPanel ? out - column : kPanel;
    return {begin() + i * int64_t{sizeof(T)}, row, rows, (in - i < most ? in - i : most) * int64_t{sizeof(T)}};
  }

  // The same for cells in place.
  const Cell* next_cells(int64_t k, int64_t count, const char* then) const {
    if (!in_place()) return nullptr;
    if (k + count < steps()) return reinterpret_cast<const Cell*>(begin()) + (k + count) * kPanel;
    return reinterpret_cast<const Cell*>(then ? then : begin());
  }

  // Where the first element of step k of this panel lies, in units of stored elements.
  int64_t packed_at(int64_t k, int64_t pair) const { return column * round_up(in, pair) + k * Mode::kPair * kPanel; }

  const Cell* chunk(int64_t k, int64_t count, Cell* scratch) const {
    if (matrix.format == WeightFormat::kInt8) {
      unpack_int8<Mode>(scratch, static_cast<const int8_t*>(matrix.data) + packed_at(k, 2), count);
    } else if (matrix.format == WeightFormat::kPlain) {
      pack_plain(scratch, k, count);
    } else if constexpr (kPackedAsCells<Mode>) {
      return reinterpret_cast<const Cell*>(static_cast<const T*>(matrix.data) + packed_at(k, kStoredPair<T>));
    } else {
      unpack_pairs(scratch, static_cast<const T*>(matrix.data) + packed_at(k, kStoredPair<T>), count);
    }
    return scratch;
  }

 private:
  // Rows of the plain matrix are columns of the panel: 16 x 16 cells at a time are turned in registers.
  void pack_plain(Cell* to, int64_t k, int64_t count) const {
    constexpr int n = kLanes<Cell>;
    const T* base = static_cast<const T*>(matrix.data) + column * in;
    const int64_t columns = out - column < kPanel ? out - column : kPanel;
    for (int64_t r = 0; r < kPanel; r += n) {
      if (r >= columns) {
        for (int64_t c = 0; c < count; ++c) store(to + c * kPanel + r, Vec<Cell>{});
        continue;
      }
      const T* rows = base + r * in;
      const int64_t there = columns - r < n ? columns - r : n;
      for (int64_t c = 0; c < count; c += n) turn(to + c * kPanel + r, rows, there, (k + c) * Mode::kPair, count - c);
    }
  }

  // Up to kLanes rows from element i of each: `count` steps at most are written.
  void turn(Cell* to, const T* rows, int64_t there, int64_t i, int64_t count) const {
    constexpr int n = kLanes<Cell>;
    Vec<Cell> v[n];
    if (there == n && i + n * Mode::kPair <= in) {
#pragma GCC unroll 16
      for (int l = 0; l < n; ++l) v[l] = load_cells<Mode>(rows + l * in + i, n * Mode::kPair);
    } else {
#pragma GCC unroll 16
      for (int l = 0; l < n; ++l)
        v[l] = l < there && i < in ? load_cells<Mode>(rows + l * in + i, in - i) : Vec<Cell>{};
    }
    transpose<Cell>(v);
    if (count >= n) {
#pragma GCC unroll 16
      for (int l = 0; l < n; ++l) store(to + l * kPanel, v[l]);
    } else {
#pragma GCC unroll 16
      for (int l = 0; l < n; ++l)
        if (l < count) store(to + l * kPanel, v[l]);
    }
  }
};

// ---- scales of integers ----

template <class Acc>
inline Vec<Acc> load_scales(const float* from, int64_t count) {
  constexpr int n = kLanes<Acc>;
  Acc part[n] = {};
  for (int64_t i = 0; i < (count < n ? count : n); ++i) part[i] = static_cast<Acc>(from[i]);
  return load(part);
}

// ---- rows of x as cells --------------------------------------------------------------------------------------------

template <class T>
inline const T* row_of(const ConstRows& rows, int64_t r) {
  return static_cast<const T*>(rows.data) + (rows.index ? rows.index[r] : r) * rows.stride;
}

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

// ---- few rows against a plain matrix -------------------------------------------------------------------------------
// Bound by the weights' bytes: blocks of the matrix are turned in registers and used at once, without a detour through
// memory, and what the next strip of columns needs is fetched as one stream.

constexpr int kFewRows = 5;
template <class Mode>
constexpr int64_t kFewSteps = kRowBlock* kChunk<Mode> / kFewRows - kLanes<typename Mode::Cell>;  // that scratch holds
constexpr int kStripGroups = kVectorBytes == 64 ? 2 : 1;  // of kLanes columns: two chains of sums per row hide latency

template <class Mode, int kRows>
inline void strip_sums(const typename Mode::T* weight, int64_t in, int64_t columns, const typename Mode::T* ahead,
                       const typename Mode::Cell* x, int64_t x_stride, typename Mode::Acc* sums) {
  using Acc = typename Mode::Acc;
  using Cell = typename Mode::Cell;
  constexpr int n = kLanes<Cell>;
  constexpr int64_t wide = n * Mode::kPair;
  Vec<Acc> sum[kStripGroups][kRows] = {};
  for (int64_t i = 0; i < in; i += wide, x += n)
#pragma GCC unroll 2
    for (int g = 0; g < kStripGroups; ++g, ahead += n * wide) {
      const typename Mode::T* rows = weight + g * n * in + i;
      const int64_t there = columns - g * n;
      Vec<Cell> v[n];
      if (there >= n && i + wide <= in) {
#pragma GCC unroll 16
        for (int l = 0; l < n; ++l) {
          v[l] = load_cells<Mode>(rows + l * in, wide);
          __builtin_prefetch(ahead + l * wide);
        }
      } else {
#pragma GCC unroll 16
        for (int l = 0; l < n; ++l) v[l] = l < there ? load_cells<Mode>(rows + l * in, in - i) : Vec<Cell>{};
      }
      transpose<Cell>(v);
#pragma GCC unroll 16
      for (int l = 0; l < n; ++l)
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) sum[g][r] = Mode::step(broadcast<Cell>(x[r * x_stride + l]), v[l], sum[g][r]);
    }
#pragma GCC unroll 2
  for (int g = 0; g < kStripGroups; ++g)
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) store(sums + r * kPanel + g * n, sum[g][r]);
}

// sums [count, kPanel] of rows [first, first + count) with the panel at `column`; x is copied with zeros behind its
// end.
template <class Mode>
inline void few_sums(const LinearPart& part, const Matrix& matrix, int64_t column, int64_t first, int64_t count,
                     const char* then, const PanelScratch<Mode>& scratch, typename Mode::Acc* sums) {
  using T = typename Mode::T;
  constexpr int64_t lanes = kLanes<typename Mode::Cell>;
  const int64_t stride = round_up(part.in, lanes * Mode::kPair) / Mode::kPair;
  for (int64_t r = 0; r < count; ++r)
    pack_row<Mode>(scratch.a + r * stride, row_of<T>(part.x, first + r), part.in, stride);
  constexpr int64_t strip = kStripGroups * lanes;
  for (int64_t n = 0; n < kPanel && column + n < part.out; n += strip) {
    const bool last = n + strip >= kPanel || column + n + strip >= part.out;
    const T* weight = static_cast<const T*>(matrix.data) + (column + n) * part.in;
    const T* ahead = last && then ? reinterpret_cast<const T*>(then) : weight + strip * part.in;
    const int64_t columns = part.out - column - n;
    switch (count) {
      case 1:
        strip_sums<Mode, 1>(weight, part.in, columns, ahead, scratch.a, stride, sums + n);
        break;
      case 2:
        strip_sums<Mode, 2>(weight, part.in, columns, ahead, scratch.a, stride, sums + n);
        break;
      case 3:
        strip_sums<Mode, 3>(weight, part.in, columns, ahead, scratch.a, stride, sums + n);
        break;
      case 4:
        strip_sums<Mode, 4>(weight, part.in, columns, ahead, scratch.a, stride, sums + n);
        break;
      default:
        strip_sums<Mode, 5>(weight, part.in, columns, ahead, scratch.a, stride, sums + n);
    }
  }
}

// ---- what happens to finished sums ---------------------------------------------------------------------------------

template <class Mode>
inline void finish_row(const LinearPart& part, int64_t r, int64_t column, const typename Mode::Acc* sums,
                       const typename Mode::Acc* up_sums) {
  using T = typename Mode::T;
  using Acc = typename Mode::Acc;
  constexpr int lanes = kLanes<Acc>;
  const int64_t end = part.out - column < kPanel ? part.out - column : kPanel;
  const int64_t target = part.y.index ? part.y.index[r] : r;
  T* y = static_cast<T*>(part.y.data) + target * part.y.stride + column;
  const T* residual = part.residual.data ? row_of<T>(part.residual, r) + column : nullptr;
  const bool as_it_is = !part.matrix.scales && !part.up.data && !residual && !part.scale.data;
  if (as_it_is && end == kPanel) {
#pragma GCC unroll 4
    for (int64_t n = 0; n < kPanel; n += lanes) store_narrow(y + n, load(sums + n));
    return;
  }
  const Acc weight = part.scale.data ? static_cast<Acc>(load_wide(row_of<T>(part.scale, r), 1)[0]) : Acc(1);
  for (int64_t n = 0; n < end; n += lanes) {
    Vec<Acc> v = load(sums + n);
    if (part.matrix.scales) v *= load_scales<Acc>(part.matrix.scales + column + n, end - n);
    v = rounded<T>(v);
    if (part.up.data) {
      Vec<Acc> up = load(up_sums + n);
      if (part.up.scales) up *= load_scales<Acc>(part.up.scales + column + n, end - n);
      v = rounded<T>(v * sigmoid<Acc>(v) * rounded<T>(up));
    }
    if (residual) v = rounded<T>(load_wide(residual + n, end - n) + v);
    if (part.scale.data) v = v * weight + Acc(0);  // + 0 as the sum over a token's experts begins
    store_narrow(y + n, v, end - n);
  }
}

template <class T, class Acc>
inline void store_row(T* to, const Acc* sums, int64_t width) {
  constexpr int lanes = kLanes<Acc>;
  for (int64_t n = 0; n < width; n += lanes) store_narrow(to + n, load(sums + n), width - n);
}

// Steps [k, k + steps) of a matrix whose rows are the reduction, `count` rows in all, as cells [steps, stride]; columns
// behind `width` are 0 up to a whole panel or vector.
template <class Mode>
inline void pack_matrix_rows(typename Mode::Cell* to, int64_t stride, const ConstRows& rows, int64_t k, int64_t steps,
                             int64_t count, int64_t width) {
  using T = typename Mode::T;
  for (int64_t s = 0; s < steps; ++s, to += stride) {
    const T* pair[Mode::kPair];
    int64_t there = 0;
    for (int64_t r = (k + s) * Mode::kPair; there < Mode::kPair && r < count; ++r) pair[there++] = row_of<T>(rows, r);
    pack_rows<Mode>(to, stride, pair, there, width);
  }
}

// ---- the three products --------------------------------------------------------------------------------------------

// then: the weights that are read next.
template <class Mode>
inline void panel_sums(const LinearPart& part, const WeightPanel<Mode>& panel, int64_t first, int64_t count,
                       const char* then, const PanelScratch<Mode>& scratch, typename Mode::Acc* sums) {
  const int64_t steps = panel.steps();
  if (panel.matrix.format == WeightFormat::kPlain && count <= kFewRows && steps <= kFewSteps<Mode>)
    return few_sums<Mode>(part, panel.matrix, panel.column, first, count, then, scratch, sums);
  if (steps == 0) clear(sums, count * kPanel);
  const int64_t most = panel.in_place() && rows_are_cells<Mode>(part.in) ? kLongChunk<Mode> : kChunk<Mode>;
  for (int64_t k = 0; k < steps; k += most) {
    const int64_t here = steps - k < most ? steps - k : most;
    row_cells<Mode>(part.x, part.in, first, count, k, here, scratch);
    const auto* b = panel.chunk(k, here, scratch.b);
    chunk_product<Mode>(
        scratch.rows, count, 1, b, here, sums,
        {.start = k == 0, .ahead = panel.next_cells(k, here, then), .next = panel.next_rows(k, here, then)});
  }
}

template <class Mode>
void forward_panel(const LinearPart& part, int64_t number, const LinearPart* then, char* memory) {
  const PanelScratch<Mode> scratch(memory);
  const int64_t column = number * kPanel;
  const WeightPanel<Mode> panel{part.matrix, part.in, part.out, column}, up{part.up, part.in, part.out, column};
  const WeightPanel<Mode> next{part.matrix, part.in, part.out, column + kPanel};
  const char* behind = column + kPanel < part.out ? next.begin()
                       : then                     ? static_cast<const char*>(then->matrix.data)
                                                  : nullptr;
  for (int64_t first = 0; first < part.rows; first += kRowBlock) {
    const int64_t count = part.rows - first < kRowBlock ? part.rows - first : kRowBlock;
    panel_sums<Mode>(part, panel, first, count, part.up.data ? up.begin() : behind, scratch, scratch.sums);
    if (part.up.data) panel_sums<Mode>(part, up, first, count, behind, scratch, scratch.up_sums);
    for (int64_t r = 0; r < count; ++r)
      finish_row<Mode>(part, first + r, column, scratch.sums + r * kPanel, scratch.up_sums + r * kPanel);
  }
}

// Columns of a gradient that one item owns: some panels, which share what is packed or read for them.
template <class Part>
struct GradientColumns {
  int64_t begin, panels;
  const Part& part;

  GradientColumns(const Part& p, int64_t group) : begin(group * kGradientPanels * kPanel), part(p) {
    const int64_t left = (p.in - begin + kPanel - 1) / kPanel;
    panels = left < kGradientPanels ? left : kGradientPanels;
  }
  int64_t column(int64_t panel) const { return begin + panel * kPanel; }
  int64_t width(int64_t panel) const { return part.in - column(panel) < kPanel ? part.in - column(panel) : kPanel; }
};

// B is the weight matrix as it lies, two rows of it to a pair.
template <class Mode>
void grad_x_group(const LinearGradXPart& part, int64_t group, char* memory) {
  using T = typename Mode::T;
  const PanelScratch<Mode> scratch(memory);
  const GradientColumns columns(part, group);
  const auto sums = [&](int64_t panel) { return scratch.sums + panel * kRowBlock * kPanel; };
  const int64_t steps = round_up(part.out, Mode::kPair) / Mode::kPair;
  for (int64_t first = 0; first < part.rows; first += kRowBlock) {
    const int64_t count = part.rows - first < kRowBlock ? part.rows - first : kRowBlock;
    if (part.source_count == 0 || steps == 0) clear(scratch.sums, kGradientPanels * kRowBlock * kPanel);
    for (int64_t s = 0; s < part.source_count; ++s) {
      const T* weight = static_cast<const T*>(part.sources[s].weight);
      for (int64_t k = 0; k < steps; k += kChunk<Mode>) {
        const int64_t here = steps - k < kChunk<Mode> ? steps - k : kChunk<Mode>;
        row_cells<Mode>(part.sources[s].grad_y, part.out, first, count, k, here, scratch);
        for (int64_t p = 0; p < columns.panels; ++p) {
          const ConstRows b{weight + columns.column(p), nullptr, part.in};
          pack_matrix_rows<Mode>(scratch.b, kPanel, b, k, here, part.out, columns.width(p));
          const int64_t left = part.out - (k + here) * Mode::kPair, most = kChunk<Mode> * Mode::kPair;
          const NextRows next{reinterpret_cast<const char*>(row_of<T>(b, (k + here) * Mode::kPair)),
                              part.in * int64_t{sizeof(T)},
                              left < 0      ? 0
                              : left < most ? left
                                            : most,
                              columns.width(p) * int64_t{sizeof(T)}};
          chunk_product<Mode>(scratch.rows, count, 1, scratch.b, here, sums(p),
                              {.start = s == 0 && k == 0, .next = next});
        }
      }
    }
    for (int64_t p = 0; p < columns.panels; ++p)
      for (int64_t r = 0; r < count; ++r) {
        const int64_t target = part.grad_x.index ? part.grad_x.index[first + r] : first + r;
        T* to = static_cast<T*>(part.grad_x.data) + target * part.grad_x.stride + columns.column(p);
        store_row(to, sums(p) + r * kPanel, columns.width(p));
      }
  }
}

// One block of outputs and columns of a gradient: where its sums start from, and where they go.
template <class Mode>
struct WeightGradientBlock {
  using T = typename Mode::T;
  using Acc = typename Mode::Acc;
  const LinearGradWeightPart& part;
  int64_t output, outputs, column, width;

  template <class Element>
  Element* at(int64_t m) const {
    return static_cast<Element*>(part.grad_weight) + (output + m) * part.in + column;
  }
  void start(Acc* sums) const {
    clear(sums, outputs * kPanel);
    if (!part.accumulate) return;
    for (int64_t m = 0; m < outputs; ++m)
      for (int64_t n = 0; n < width; n += kLanes<Acc>)
        store(sums + m * kPanel + n, load_wide(at<Acc>(m) + n, width - n));
  }
  void finish(const Acc* sums) const {
    for (int64_t m = 0; m < outputs; ++m)
      part.accumulate ? store_row(at<Acc>(m), sums + m * kPanel, width) : store_row(at<T>(m), sums + m * kPanel, width);
  }
};

// The reduction runs along the rows of x and grad_y.
template <class Mode>
void grad_weight_group(const LinearGradWeightPart& part, int64_t group, char* memory) {
  using T = typename Mode::T;
  using Cell = typename Mode::Cell;
  const PanelScratch<Mode> scratch(memory);
  const GradientColumns columns(part, group);
  const int64_t steps = round_up(part.rows, Mode::kPair) / Mode::kPair;
  const bool kept = steps <= kKeptChunks * kChunk<Mode>;
  const auto sums = [&](int64_t panel) { return scratch.sums + panel * kOutputBlock * kPanel; };
  for (int64_t output = 0; output < part.out; output += kOutputBlock) {
    const int64_t outputs = part.out - output < kOutputBlock ? part.out - output : kOutputBlock;
    const auto block = [&](int64_t p) {
      return WeightGradientBlock<Mode>{part, output, outputs, columns.column(p), columns.width(p)};
    };
    const bool from_zero = !part.accumulate && steps > 0;
    for (int64_t p = 0; p < columns.panels && !from_zero; ++p) block(p).start(sums(p));
    for (int64_t k = 0; k < steps; k += kChunk<Mode>) {
      const int64_t here = steps - k < kChunk<Mode> ? steps - k : kChunk<Mode>;
      const ConstRows grad_y{static_cast<const T*>(part.grad_y.data) + output, part.grad_y.index, part.grad_y.stride};
      pack_matrix_rows<Mode>(scratch.a, kOutputBlock, grad_y, k, here, part.rows, outputs);
      for (int64_t m = 0; m < outputs; ++m) scratch.rows[m] = scratch.a + m;
      for (int64_t p = 0; p < columns.panels; ++p) {
        Cell* b = scratch.b + ((kept ? k / kChunk<Mode> : 0) * kGradientPanels + p) * kChunk<Mode> * kPanel;
        const ConstRows x{static_cast<const T*>(part.x.data) + columns.column(p), part.x.index, part.x.stride};
        if (!kept || output == 0) pack_matrix_rows<Mode>(b, kPanel, x, k, here, part.rows, columns.width(p));
        chunk_product<Mode>(scratch.rows, outputs, kOutputBlock, b, here, sums(p), {.start = from_zero && k == 0});
      }
    }
    for (int64_t p = 0; p < columns.panels; ++p) block(p).finish(sums(p));
  }
}

template <class Mode>
int64_t panel_scratch() {
  return PanelScratch<Mode>(nullptr).bytes;
}

template <class Mode>
constexpr LinearKernels kLinear{panel_scratch<Mode>, forward_panel<Mode>, grad_x_group<Mode>, grad_weight_group<Mode>};

}  // namespace
}  // namespace micro_kernels::cpu
