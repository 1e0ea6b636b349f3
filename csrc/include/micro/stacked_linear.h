#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace micro {

// Every token through every expert that is used: keys and values (model.md 2.6).
//
//   y[e, t, o] = sum_i weight[e, o, i] * x[e or 0, t, i]
//
// x:       [E, T, in], or [1, T, in] which every expert reads; float32, float64 or bfloat16, CPU or CUDA.
// weight:  [E, out, in], same type and device as x.
// offsets: [E + 1] int32 (plan().offsets): experts with offsets[e] == offsets[e + 1] are skipped, their output and
//          gradients are 0. Absent: every expert is used.
//
// Returns [E, T, out], sums carried in float32 (float64 for float64). Differentiable once, in x and weight.
// Throws ValueError or TypeError that names the argument.
//
//   at::Tensor k = micro::stacked_linear(normalized, k_weight, std::nullopt);
at::Tensor stacked_linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& offsets);

}  // namespace micro
