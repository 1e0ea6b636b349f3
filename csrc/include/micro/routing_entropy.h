#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace micro {

// Decision entropy of the routers (model.md 7.5), natural logarithm, 0 log 0 = 0:
//
//   entropy[l] = 1/M sum_t mask[t] sum_e -probs[l, t, e] log probs[l, t, e],   M = number of real tokens
//
// probs: [..., T, E], float32 or float64.
// mask:  [T] bool, true for a real token; absent: all are.
//
// Returns [...], one mean per leading index (per layer); 0 without a real token. Differentiable once, in probs; the
// gradient at a probability of 0 is 0. Throws ValueError or TypeError that names the argument.
//
//   at::Tensor per_layer = micro::routing_entropy(probs, mask);
at::Tensor routing_entropy(const at::Tensor& probs, const std::optional<at::Tensor>& mask);

}  // namespace micro
