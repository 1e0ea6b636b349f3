#pragma once

#include <ATen/core/Tensor.h>

namespace micro {

// One weight matrix per expert, rows in plan order (model.md 2.6):
//
//   y[n, o] = sum_i weight[e, o, i] * x[n, i],   offsets[e] <= n < offsets[e + 1]
//
// x:       [N, in], float32, float64 or bfloat16, CPU or CUDA.
// weight:  [E, out, in], same type and device as x.
// offsets: [E + 1] int32, ascending from 0 to at most N (plan().offsets).
//
// Returns [N, out], sums carried in float32 (float64 for float64); rows at n >= offsets[E] are 0. Differentiable once,
// in x and weight; an expert without rows gets a zero gradient. A copy is made of an argument that is not contiguous.
// With E = 1 and offsets [0, N] it is a plain linear map that is fast for one row, such as a head.
// Throws ValueError or TypeError that names the argument.
//
//   at::Tensor q = micro::expert_linear(x, q_weight, plan.offsets);
at::Tensor expert_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& offsets);

}  // namespace micro
