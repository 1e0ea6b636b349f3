#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "micro/types.h"

namespace micro {

// Routed pairs (token, rank) sorted by expert, stable: tokens of one expert stay in slot order.
//
// ids:     [T, K] int32, in [0, num_experts), CPU or CUDA.
// weights: [T, K] float32, float64 or bfloat16: pairs of weight 0 are idle. Absent: none is.
// mask:    [T] bool: false marks a padded token, whose pairs are idle.
//
// Returns T * K rows and num_experts + 1 offsets whatever the ids are: no size depends on data. Idle pairs stand behind
// the last expert's rows, in order. No gradient. Throws ValueError or TypeError that names the argument.
//
//   micro::Plan plan = micro::plan(routing.ids, 4, routing.weights);
Plan plan(const at::Tensor& ids, int64_t num_experts, const std::optional<at::Tensor>& weights = {},
          const std::optional<at::Tensor>& mask = {});

}  // namespace micro
