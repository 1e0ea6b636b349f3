#pragma once
// Controls of a call, checked and laid out as the routing kernel reads them (model.md 4).

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "micro/engine.h"
#include "micro_kernels/route.h"

namespace micro::engine {

// Which tokens a call has: `slots` columns, of which row b fills the first counts[b]. Column 0 of row b is slot
// offsets[b] of the controls' S axis, and their row is origins[b].
struct CallRows {
  int64_t rows, slots;
  const int32_t* counts;
  const int64_t* offsets;
  const int64_t* origins;
};

// One phase's controls in the kernel's types. Throws ValueError or TypeError for wrong shapes, dtypes and numbers.
class PreparedControls {
 public:
  PreparedControls(const Controls& controls, const ModelConfig& config, int64_t rows, at::ScalarType accumulator);

  bool empty() const { return !ablate_.defined() && !bias_.defined() && !force_.defined() && !labels_.defined(); }
  // Whether two calls that differ in the slots only are steered alike.
  bool same_at_all_slots() const;

 private:
  friend class BoundControls;
  void read_bias(const at::Tensor& bias, at::ScalarType accumulator);

  at::Tensor ablate_, bias_, force_, labels_;  // rank 4, 4, 3, 2; contiguous bool, accumulator, int32, int32
};

// Controls of the tokens of one call, per layer.
class BoundControls {
 public:
  BoundControls(const ModelConfig& config, at::ScalarType accumulator) : config_(config), accumulator_(accumulator) {}

  // Throws ValueError that names row, layer and slot where controls contradict each other (model.md 4.4).
  void bind(const PreparedControls& controls, const CallRows& call);

  // Fills rows, bias, ablate and force with their strides.
  void apply(int64_t layer, micro_kernels::RouteParams& route) const;

  // Whether a layer's decision is given and its router has no say.
  bool decided(int64_t layer) const { return rows_.defined() && (labelled_ || forced_[static_cast<size_t>(layer)]); }
  // ... by force rather than by labels, which report their rows as logits.
  bool forced(int64_t layer) const { return decided(layer) && !labelled_; }

 private:
  void check(const PreparedControls& controls, const CallRows& call) const;
  void bind_force(const PreparedControls& controls, const CallRows& call);
  at::Tensor spread(const at::Tensor& control, int64_t layers, const CallRows& call) const;

  const ModelConfig& config_;
  at::ScalarType accumulator_;
  at::Tensor ablate_, bias_;  // [L|1, T|1, E]
  at::Tensor force_;          // [L|1, T|1]
  at::Tensor rows_;           // [L|1, T, E] one-hot
  std::vector<char> forced_;  // [L]: every token of the layer is
  bool labelled_ = false;
};

}  // namespace micro::engine
