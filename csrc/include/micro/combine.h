#pragma once

#include <ATen/core/Tensor.h>

#include "micro/types.h"

namespace micro {

// Weighted sum of a token's expert outputs (model.md 2.8):
//
//   out[t] = sum_i y[plan.inverse[t, i]] * weights[t, i]
//
// experts ascending, starting from 0, each product and each sum rounded to the type of y. Idle pairs add nothing.
//
// y:       [N, H] in plan order, float32, float64 or bfloat16, CPU or CUDA; not contiguous: copied first.
// weights: [T, K], any floating type; rounded to the type of y before use.
//
// Returns [T, H] in the type of y; 0 for a token without an active pair. Differentiable once, in y and weights; idle
// pairs get exactly 0. Throws ValueError or TypeError that names the argument.
//
//   at::Tensor out = micro::combine(y, routing.weights, plan);
at::Tensor combine(const at::Tensor& y, const at::Tensor& weights, const Plan& plan);

}  // namespace micro
