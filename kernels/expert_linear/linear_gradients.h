#pragma once
// The gradients of some panels of columns, which share what is read and packed for them. Included by the per-ISA files
// only.

#include "expert_linear/linear_chunks.h"

namespace micro_kernels::cpu {
namespace {

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
    if (part.accumulate) return finish_as<Acc>(sums);
    finish_as<T>(sums);
  }

 private:
  template <class Element>
  void finish_as(const Acc* sums) const {
    for (int64_t m = 0; m < outputs; ++m) store_row(at<Element>(m), sums + m * kPanel, width);
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

}  // namespace
}  // namespace micro_kernels::cpu
