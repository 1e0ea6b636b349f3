#pragma once
// A panel of a weight matrix as chunks of cells, however it is stored. Included by the per-ISA files only.

#include "expert_linear/linear_chunks.h"

namespace micro_kernels::cpu {
namespace {

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

}  // namespace
}  // namespace micro_kernels::cpu
