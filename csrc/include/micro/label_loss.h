#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace micro {

// Cross-entropy of the routers against token labels, summed over tokens (model.md 7.4, before the division by the
// number of labelled tokens, so that accumulated micro-batches add up):
//
//   loss = sum_l c[l] sum_t keep[t] -log softmax(logits[l, t])[labels[t]] / sum_l c[l],   keep = real and labels[t] >=
//   0
//
// logits:        [L, T, E], float32, float64 or bfloat16, before steering.
// labels:        [T] int64, expert ids below E; negative: no label.
// mask:          [T] bool, true for a real token; absent: all are.
// layer_weights: [L] c, not negative, no gradient; absent: all 1. All 0: the loss is 0.
//
// Returns a scalar in float32 (float64 for float64). Differentiable once, in logits.
// Throws ValueError or TypeError that names the argument.
//
//   at::Tensor loss = micro::label_loss(logits, labels, mask, std::nullopt) / labelled_tokens;
at::Tensor label_loss(const at::Tensor& logits, const at::Tensor& labels, const std::optional<at::Tensor>& mask,
                      const std::optional<at::Tensor>& layer_weights);

}  // namespace micro
