#pragma once
// Reading and changing activations inside the engine's forward pass: the same actions as model.intervene in Python.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "micro/config.h"

namespace micro {

namespace engine {
class ActionTable;
}

// A place of a layer. Rows are tokens, or pairs of a token and an expert that it is routed to; under FFN experts
// attention is shared, so kHeads and kAttention have token rows there. In brackets: W, the columns.
enum class Point {
  kResidual,     // [H] tokens: input of layer l; l = L: what the last layer gives, before the final norm
  kRouter,       // [E] tokens: router logits before steering
  kHeads,        // [A D] routed: outputs of the attention heads, before the output matrix
  kAttention,    // [H] routed: what attention adds to the residual
  kUp,           // [F] routed: outputs of the up-projection
  kUnits,        // [F] routed: gated units, before the down-projection
  kFfn,          // [H] routed: what the feed-forward part adds to the residual
  kBlockOutput,  // [H] routed: the expert's output before weighting
};

enum class ActionKind { kRead, kMoments, kZero, kScale, kShift, kReplace, kResample };

// Rows that were seen at one point, in the order of calls, layers and experts.
struct RowsSeen {
  at::Tensor values;  // [N, W], element type; W: the columns that the action names
  at::Tensor layer;   // int64 [N], as the next three
  at::Tensor expert;  // -1 at token rows
  at::Tensor row;     // of the call's batch
  at::Tensor slot;    // of the row, from 0
  at::Tensor chosen;  // bool [N]: whether the token is routed to the expert; false only where all experts run. As the
                      // source of an action it may be undefined
};

// Streaming moments, float64 (micro/moments.h). L' is L, at kResidual L + 1; E' is E at routed rows, 1 at token rows.
struct MomentsSeen {
  at::Tensor count;    // [L', E']
  at::Tensor mean;     // [L', E', W]
  at::Tensor m2;       // [L', E', W]: sums of squared deviations
  at::Tensor scatter;  // [L', E', W, W], sums of products of deviations; undefined unless asked for
};

// Slots first, first + step, ... below last.
struct SlotRange {
  int64_t first = 0;
  int64_t last = INT64_MAX;
  int64_t step = 1;
};

// What to do with some columns of some rows at a point.
struct Action {
  ActionKind kind = ActionKind::kRead;
  Point point = Point::kResidual;
  std::vector<int64_t> layers = {};  // empty: all
  at::Tensor columns = {};           // bool [L'|1, E', W]; undefined: all. A read names the same ones for all experts
  std::vector<int64_t> rows = {};    // of the batch; empty: all
  std::optional<SlotRange> range = {};  // of slots; none: all
  at::Tensor slots = {};                // bool [B|1, S], false behind S; undefined: all
  at::Tensor value = {};                // kScale, kShift, kReplace: [L'|1, E'|1, W|1]
  std::optional<RowsSeen> source = {};  // kReplace instead of a value: values of the same layer, expert, row and slot;
                                        // kResample: of a random row of the same layer and expert. All W columns
  uint64_t seed = 0;                    // of kResample; a draw depends on layer, expert, row and slot alone
  bool covariance = false;              // of kMoments
  bool only_chosen = false;             // where all experts run: only rows of experts that the token is routed to
  int64_t first_row = 0;                // the row of the batch that counts as row 0 of the source
};

// Actions in the order in which they act, and what they bring back. Pass it to Engine::prefill, decode or generate;
// calls add to it, also one that fails later on. Not to be used by two engines at the same time.
//
//   micro::Interventions table(engine.config(), {{.kind = micro::ActionKind::kZero, .point = micro::Point::kUnits},
//                                                {.kind = micro::ActionKind::kRead}});
//   engine.generate(prompts, {.interventions = &table});
//   at::Tensor residual = table.reading(1).values;
//
// K interventions on one input: read the shared tokens once, Engine::select(std::vector<int64_t>(K, 0)), and read the
// rest with one action list whose `rows` tell them apart; or GenerateOptions::shared_prefix.
class Interventions {
 public:
  // all_experts: in layers of which an action meets routed rows, every expert runs on every token, so that these rows
  // are E for each token; what the layer gives is that of the usual routing, bit for bit (model.md 9.5, mode "all").
  // Throws ValueError or TypeError for what the model does not have, naming the action.
  Interventions(const ModelConfig& config, std::vector<Action> actions, bool all_experts = false);
  Interventions(Interventions&&) noexcept;
  Interventions& operator=(Interventions&&) noexcept;
  ~Interventions();

  RowsSeen reading(int64_t action) const;     // of a kRead; without rows if it met none
  MomentsSeen moments(int64_t action) const;  // of a kMoments

  engine::ActionTable& table() const { return *table_; }

 private:
  std::unique_ptr<engine::ActionTable> table_;
};

}  // namespace micro
