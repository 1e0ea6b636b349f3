#pragma once

#include <ATen/core/Tensor.h>

#include "micro/types.h"

namespace micro {

// Token rows in plan order: y[n] = x[plan.tokens[n]], 0 for idle rows.
//
// x:    [T, H], float32, float64 or bfloat16, CPU or CUDA; not contiguous: copied first.
// plan: of T tokens.
//
// Returns [N, H], N = T * K. Differentiable once, in x: the K rows of a token are added by rank in float32 (float64 for
// float64) and rounded once. Throws ValueError or TypeError that names the argument.
//
//   at::Tensor rows = micro::permute(x, plan);
at::Tensor permute(const at::Tensor& x, const Plan& plan);

}  // namespace micro
