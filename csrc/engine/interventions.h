#pragma once
// Actions bound to a model, met by the rows of each layer of a pass.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

#include "micro/config.h"
#include "micro/interventions.h"
#include "micro_kernels/block_forward.h"

namespace micro::engine {

// The tokens of one pass: row b of the batch has counts[b] of `slots` columns, behind the starts[b] that it holds.
struct Pass {
  const int32_t* counts;
  const int32_t* starts;
  const int64_t* origins;  // the caller's number of each row
  int64_t rows, slots;
};

class ActionTable {
 public:
  ActionTable(const ModelConfig& config, std::vector<Action> actions, bool all_experts);

  // Throws ValueError if it was made for a model of other sizes.
  void check_fits(const ModelConfig& config) const;

  void begin(const Pass& pass) { pass_ = pass; }
  // The points of a layer at which something happens, as BlockHooks says them.
  uint32_t points(int64_t layer) const;
  // Whether every expert of a layer runs on every token: where it was asked for, and an action sees it.
  bool all_experts(int64_t layer) const;
  void meet(int64_t layer, const micro_kernels::BlockRows& rows);
  void meet_residual(int64_t layer, void* rows, micro_kernels::DType dtype);

  RowsSeen reading(int64_t action) const;
  MomentsSeen moments(int64_t action) const;

 private:
  // Rows of a source by where they come from.
  struct Source {
    std::unordered_map<std::string, int64_t> places;              // layer, expert, row, slot
    std::unordered_map<int64_t, std::vector<int64_t>> of_expert;  // layer * (E + 1) + expert + 1
  };
  struct Bound {
    Action action;
    std::vector<bool> layers;
    at::Tensor value;  // of the action or its source, in the type last asked for
    Source source;
    std::vector<RowsSeen> seen;
    MomentsSeen moments;
  };
  struct Rows {  // at one point of one layer
    int64_t layer;
    char* data;
    const int32_t *tokens, *experts;
    const bool* chosen;  // nullptr: all
    int64_t count, width;
    micro_kernels::DType dtype;
    std::vector<int64_t> row, slot;  // of the batch, in the row; -1: not real

    bool is_chosen(size_t n) const { return !chosen || chosen[n]; }
  };

  void check(const Bound& bound, size_t number) const;
  void prepare(Bound& bound, size_t number) const;
  Rows locate(int64_t layer, const micro_kernels::BlockRows& rows) const;
  void run(Point point, const Rows& rows);
  std::vector<uint8_t> touched(const Bound& bound, const Rows& rows) const;
  std::vector<bool> named_experts(const Action& action, int64_t layer) const;
  void read(Bound& bound, const Rows& rows, const std::vector<uint8_t>& touched) const;
  void change(Bound& bound, const Rows& rows, std::vector<uint8_t> touched) const;
  std::vector<int64_t> source_rows(const Bound& bound, const Rows& rows, const std::vector<uint8_t>& touched) const;
  at::Tensor wrap(const Rows& rows) const;
  int64_t depth(Point point) const;
  int64_t width(Point point) const;
  bool routed(Point point) const;
  int64_t axis(Point point) const;

  ModelConfig config_;
  bool all_experts_;
  std::vector<Bound> bound_;
  Pass pass_{};
};

}  // namespace micro::engine
