#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace micro {

// Load balancing of the routers (model.md 7.2). With f[l, k, e] the share of real tokens whose k-th choice in layer l
// is e, and P[l, e] the mean probability:
//
//   pooled (Jiang et al. 2024, Mixtral; parity):  loss = E sum_k sum_e mean_l f[l, k, e] mean_l P[l, e]
//   per layer (Fedus et al. 2022, Switch):        loss = E mean_l sum_k sum_e f[l, k, e] P[l, e]
//
// probs: [L, T, E], float32 or float64.
// ids:   [L, T, K] int32, the experts chosen, in [0, E).
// mask:  [T] bool, true for a real token; absent: all are.
//
// Returns a scalar like probs: K for uniform routing, E for one expert that takes everything; 0 without a real token.
// Differentiable once, in probs. Throws ValueError or TypeError that names the argument.
//
//   at::Tensor loss = micro::load_balancing_loss(probs, ids, mask, /*pooled=*/true);
at::Tensor load_balancing_loss(const at::Tensor& probs, const at::Tensor& ids, const std::optional<at::Tensor>& mask,
                               bool pooled = true);

}  // namespace micro
