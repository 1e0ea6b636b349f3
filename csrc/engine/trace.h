#pragma once
// Routing decisions, gathered row by row while tokens are worked off.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "micro/engine.h"

namespace micro::engine {

// What the router of one layer said in one call over [rows, slots] columns.
struct LayerDecision {
  const char *ids, *weights, *probs, *effective, *raw;
  bool forced;  // force decided: its rows are reported as logits 0 and -inf
};

class TraceRecorder {
 public:
  // raw_wide: raw logits come in the accumulator type.
  TraceRecorder(const ModelConfig& config, at::ScalarType dtype, at::ScalarType accumulator, bool raw_wide,
                int64_t rows, int64_t experts_per_token);

  // Before the layers of a call: makes room for `count` more slots of row `origin`.
  void extend(int64_t origin, int64_t count);
  // Tokens [first, first + count) of the call are the last `count` slots of row `origin`.
  void record(int64_t layer, int64_t origin, int64_t first, int64_t count, const LayerDecision& decision);

  // Every row begins as row 0 did.
  void share_first_row();

  // Rows side by side, `indent[row]` empty columns in front of each.
  Trace assemble(const std::vector<int64_t>& indent) const;

 private:
  // One quantity: bytes per slot and layer, and each row's bytes, slot by slot, layer by layer.
  struct Field {
    at::ScalarType type;
    int64_t width;  // elements
    std::vector<std::vector<char>> rows;
    int64_t bytes() const { return width * static_cast<int64_t>(c10::elementSize(type)); }
  };
  void copy(Field& field, int64_t layer, int64_t origin, int64_t count, const char* from);
  at::Tensor tensor(const Field& field, const std::vector<int64_t>& indent, int64_t slots) const;

  int64_t layers_;
  at::ScalarType accumulator_;
  std::vector<int64_t> lengths_;
  Field ids_, weights_, probs_, logits_, raw_;
};

}  // namespace micro::engine
