#pragma once
// y = x weight^T of one panel, and what is asked for behind it. Included by the per-ISA files only.

#include "expert_linear/linear_weights.h"

namespace micro_kernels::cpu {
namespace {

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
  for (int64_t i = 0; i < in; i += wide, x += n) {
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

// ---- one panel -----------------------------------------------------------------------------------------------------

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

}  // namespace
}  // namespace micro_kernels::cpu
