#pragma once
// The forward's two products for a few query rows and a whole key block, straight from the keys and values: one decoded
// token does not pay for packed copies. Every score and every output is the same chain of steps as in product() on
// packed cells, so that a token's results do not tell how many came with it. Included by the per-ISA files only.

#include "expert_attention/attention_tiles.h"

namespace micro_kernels::cpu {
namespace {

constexpr int64_t kFewRows = 12;                            // more rows pay for packing
constexpr int64_t kRowsAtOnce = 6;                          // their sums stay in registers
constexpr int kVectorsAtOnce = kVectorBytes == 64 ? 4 : 2;  // of an output row, likewise

// Vectors of keys at once: twice as many sums that do not wait for each other, where registers last.
template <class Acc, int kRows>
constexpr int kGroupsAtOnce = 2 * kRows + kLanes<Acc> <= (kVectorBytes == 64 ? 28 : 14) ? 2 : 1;

// Rows of one item against one block. `ahead` bytes behind a key (value) lies that of the next block.
template <class Mode>
struct FewRows {
  using T = typename Mode::T;
  using Acc = typename Mode::Acc;
  using Cell = typename Mode::Cell;
  const KeyBlock<T>& block;
  int64_t steps, width;  // of a head: whole vectors
  int64_t keys_ahead, values_ahead;
};

inline void prefetch(const void* from, int64_t ahead) { __builtin_prefetch(static_cast<const char*>(from) + ahead); }

// ---- scores: lanes are keys, which turns a square of the keys in registers -----------------------------------------

// bfloat16 that is multiplied as float still travels in pairs: half the shuffles.
template <class Mode>
using KeyCell = std::conditional_t<sizeof(typename Mode::T) == 2, uint32_t, typename Mode::Cell>;
template <class Mode>
constexpr int kKeyPair = sizeof(KeyCell<Mode>) / sizeof(typename Mode::T);

// sum += what the cell of each key gives with the query row whose cells begin at `q`.
template <class Mode>
inline void add_cell(const typename Mode::Cell* q, Vec<KeyCell<Mode>> cell, Vec<typename Mode::Acc>& sum) {
  using Cell = typename Mode::Cell;
  if constexpr (kKeyPair<Mode> == Mode::kPair) {
    sum = Mode::step(broadcast<Cell>(q[0]), cell, sum);
  } else {
    sum = Mode::step(broadcast<Cell>(q[0]), (Vec<Cell>)(cell << 16), sum);
    sum = Mode::step(broadcast<Cell>(q[1]), (Vec<Cell>)(cell & 0xffff0000u), sum);
  }
}

template <class Mode, int kRows>
inline void scores_of_groups(const FewRows<Mode>& x, const typename Mode::Cell* q, int64_t j,
                             typename Mode::Acc* scores) {
  using Acc = typename Mode::Acc;
  using Cell = KeyCell<Mode>;
  constexpr int n = kLanes<Acc>, pair = kKeyPair<Mode>, cells_of_q = pair / Mode::kPair;
  constexpr int groups = kGroupsAtOnce<Acc, kRows>;
  Vec<Acc> sum[groups][kRows] = {};
  for (int64_t c = 0; c < x.steps / cells_of_q; c += n) {
#pragma GCC unroll 2
    for (int g = 0; g < groups; ++g) {
      Vec<Cell> square[n];
#pragma GCC unroll 16
      for (int i = 0; i < n; ++i) {
        const typename Mode::T* from = x.block.keys[j + g * n + i] + c * pair;
        __builtin_memcpy(&square[i], from, sizeof(square[i]));
        prefetch(from, x.keys_ahead);
      }
      transpose<Cell>(square);
#pragma GCC unroll 16
      for (int i = 0; i < n; ++i)
#pragma GCC unroll 6
        for (int r = 0; r < kRows; ++r) add_cell<Mode>(q + r * x.steps + (c + i) * cells_of_q, square[i], sum[g][r]);
    }
  }
#pragma GCC unroll 2
  for (int g = 0; g < groups; ++g)
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) store(scores + r * kKeyBlock + j + g * n, sum[g][r]);
}

template <class Mode, int kRows>
__attribute__((noinline)) void few_scores(const FewRows<Mode>& x, const typename Mode::Cell* q,
                                          typename Mode::Acc* scores) {
  using Acc = typename Mode::Acc;
  for (int64_t j = 0; j < kKeyBlock; j += kGroupsAtOnce<Acc, kRows> * kLanes<Acc>)
    scores_of_groups<Mode, kRows>(x, q, j, scores);
}

// ---- outputs: lanes are elements of a value ------------------------------------------------------------------------

#if defined(__AVX512BF16__)
// Two values as pairs: of each quarter of the registers the lower or upper four elements. A quarter costs no move
// across the register, so the sums stand in this order too while a block is added up.
template <int kUpper, size_t... lane>
inline Vec<uint32_t> paired(Vec<uint16_t> even, Vec<uint16_t> odd, std::index_sequence<lane...>) {
  return (Vec<uint32_t>)__builtin_shufflevector(even, odd,
                                                (lane / 8 * 8 + lane % 8 / 2 + 4 * kUpper + (lane & 1 ? 32 : 0))...);
}

template <int kSecond, size_t... lane>
inline Vec<float> in_order(Vec<float> lower, Vec<float> upper, std::index_sequence<lane...>) {
  return __builtin_shufflevector(lower, upper, (lane / 8 * 4 + lane % 4 + 8 * kSecond + (lane / 4 % 2 ? 16 : 0))...);
}
#endif

// From two vectors of a row of sums to the order of load_values, and back.
template <class Mode>
inline void to_order_of_values([[maybe_unused]] Vec<typename Mode::Acc>* v) {
#if defined(__AVX512BF16__)
  if constexpr (Mode::kPair == 2) {
    constexpr std::make_index_sequence<16> lanes;
    const Vec<float> first = v[0], second = v[1];
    v[0] = quarters<0>(first, second, lanes);
    v[1] = quarters<1>(first, second, lanes);
  }
#endif
}

template <class Mode>
inline void from_order_of_values([[maybe_unused]] Vec<typename Mode::Acc>* v) {
#if defined(__AVX512BF16__)
  if constexpr (Mode::kPair == 2) {
    constexpr std::make_index_sequence<16> lanes;
    const Vec<float> lower = v[0], upper = v[1];
    v[0] = in_order<0>(lower, upper, lanes);
    v[1] = in_order<1>(lower, upper, lanes);
  }
#endif
}

// kVectors vectors of cells of the kPair values that begin at j, from element d on.
template <class Mode, int kVectors>
inline void load_values(const FewRows<Mode>& x, int64_t j, int64_t d, Vec<typename Mode::Cell>* cells) {
  constexpr int n = kLanes<typename Mode::Acc>;
#if defined(__AVX512BF16__)
  if constexpr (Mode::kPair == 2) {
    constexpr std::make_index_sequence<32> lanes;
#pragma GCC unroll 2
    for (int i = 0; i < kVectors; i += 2) {
      const uint16_t *even = x.block.values[j] + d + i * n, *odd = x.block.values[j + 1] + d + i * n;
      prefetch(even, x.values_ahead);
      prefetch(odd, x.values_ahead);
      cells[i] = paired<0>(load(even), load(odd), lanes);
      cells[i + 1] = paired<1>(load(even), load(odd), lanes);
    }
  }
#endif
  if constexpr (Mode::kPair == 1) {
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) {
      const typename Mode::T* from = x.block.values[j] + d + i * n;
      prefetch(from, x.values_ahead);
      cells[i] = load_wide(from);
    }
  }
}

// out = factor * out + weights * values in kVectors vectors from element d on.
template <class Mode, int kRows, int kVectors>
inline void outputs_at(const FewRows<Mode>& x, int64_t d, const typename Mode::Cell* weights,
                       const typename Mode::Acc* factor, typename Mode::Acc* out) {
  using Acc = typename Mode::Acc;
  using Cell = typename Mode::Cell;
  constexpr int n = kLanes<Acc>;
  constexpr int64_t cells_of_row = kKeyBlock / Mode::kPair;
  Vec<Acc> sum[kRows][kVectors];
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) sum[r][i] = load(out + r * x.width + d + i * n) * factor[r];
#pragma GCC unroll 2
    for (int i = 0; i + 1 < kVectors; i += 2) to_order_of_values<Mode>(sum[r] + i);
  }
  for (int64_t j = 0; j < cells_of_row; ++j) {
    Vec<Cell> cells[kVectors];
    load_values<Mode, kVectors>(x, j * Mode::kPair, d, cells);
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      const Vec<Cell> weight = broadcast<Cell>(weights[r * cells_of_row + j]);
#pragma GCC unroll 4
      for (int i = 0; i < kVectors; ++i) sum[r][i] = Mode::step(weight, cells[i], sum[r][i]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int i = 0; i + 1 < kVectors; i += 2) from_order_of_values<Mode>(sum[r] + i);
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) store(out + r * x.width + d + i * n, sum[r][i]);
  }
}

template <class Mode, int kRows>
__attribute__((noinline)) void few_outputs(const FewRows<Mode>& x, const typename Mode::Cell* weights,
                                           const typename Mode::Acc* factor, typename Mode::Acc* out) {
  constexpr int64_t n = kLanes<typename Mode::Acc>;
  int64_t d = 0;
  for (; d + kVectorsAtOnce * n <= x.width; d += kVectorsAtOnce * n)
    outputs_at<Mode, kRows, kVectorsAtOnce>(x, d, weights, factor, out);
  for (; d < x.width; d += Mode::kPair * n) outputs_at<Mode, kRows, Mode::kPair>(x, d, weights, factor, out);
}

// ---- any number of rows up to kFewRows -----------------------------------------------------------------------------

// Calls body.operator()<kRows>(first) for a few rows at a time.
template <class Body>
inline void each_few(int64_t rows, const Body& body) {
  int64_t first = 0;
  for (; first + kRowsAtOnce <= rows; first += kRowsAtOnce) body.template operator()<kRowsAtOnce>(first);
  switch (rows - first) {
    case 1:
      return body.template operator()<1>(first);
    case 2:
      return body.template operator()<2>(first);
    case 3:
      return body.template operator()<3>(first);
    case 4:
      return body.template operator()<4>(first);
    case 5:
      return body.template operator()<5>(first);
    default:
      return;
  }
}

// Heads whose cells and elements fill whole vectors, in pairs where bfloat16 travels in pairs.
template <class Mode>
inline bool few_rows_fit(const TileSizes<Mode>& z, int64_t rows) {
  constexpr int64_t n = kLanes<typename Mode::Acc>;
  return rows <= kFewRows && z.steps % (n * kKeyPair<Mode> / Mode::kPair) == 0 && z.width == z.steps * Mode::kPair &&
         z.width % (n * Mode::kPair) == 0;
}

}  // namespace
}  // namespace micro_kernels::cpu
