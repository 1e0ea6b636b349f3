#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "micro/types.h"

namespace micro {

// The weight of a chosen expert with probability q (model.md 2.10.4).
enum class WeightRule {
  kRenormalized,     // q / (sum q + 1e-9); gradient in closed form: K = 1 gives the router exactly 0 in float32
  kProbability,      // q (Switch)
  kStraightThrough,  // forward of kRenormalized, gradient as if the weight were q
};

// All [T, .] inputs but rows and replay may have one row for all tokens. Rows win over force, force over bias and
// ablation (model.md 4.3).
struct RouteOptions {
  std::optional<at::Tensor> rows = {};    // [T, E] floating: probabilities in place of the softmax, without gradient
  std::optional<at::Tensor> bias = {};    // [T | 1, E] float32 or float64, added to the logits; differentiable
  std::optional<at::Tensor> ablate = {};  // [T | 1, E] bool: the logit becomes -inf
  std::optional<at::Tensor> force = {};   // [T | 1] int32: the token goes to this expert; -1: free
  std::optional<at::Tensor> replay = {};  // [T, K] int32: ids to take as they are; their weights are computed anew
  WeightRule weight_rule = WeightRule::kRenormalized;
};

// Router logits to a routing decision (MiCRo router; model.md 2.3): p = softmax(logits), the K largest, their weights.
//
// logits: [T, E], float32, float64 or bfloat16, CPU or CUDA; may be absent where options.rows is given.
// k:      1 .. E.
//
// Softmax, selection and weights are computed in float32 (float64 for float64). Equal probabilities: the lower id. NaN
// ranks below everything; a row of NaN gives ids 0, 1, ... and NaN weights: no id ever lies outside 0 .. E - 1.
// Differentiable once, from weights, probs and effective to logits and bias. Throws ValueError or TypeError that names
// the argument.
//
//   micro::Routing routing = micro::route(logits, 1, {.ablate = mask});
Routing route(const std::optional<at::Tensor>& logits, int64_t k, const RouteOptions& options = {});

}  // namespace micro
