#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace micro {

// Router z-loss (model.md 7.3; Zoph et al. 2022, ST-MoE, equation 5): keeps router logits small.
//
//   loss = 1/(L M) sum_{l,t} mask[t] (log sum_e exp logits[l, t, e])^2,   M = number of real tokens
//
// logits: [L, T, E], float32, float64 or bfloat16, before steering.
// mask:   [T] bool, true for a real token; absent: all are.
//
// Returns a scalar in float32 (float64 for float64); 0 without a real token. Differentiable once, in logits.
// Throws ValueError or TypeError that names the argument.
//
//   at::Tensor loss = micro::z_loss(logits, mask);
at::Tensor z_loss(const at::Tensor& logits, const std::optional<at::Tensor>& mask);

}  // namespace micro
