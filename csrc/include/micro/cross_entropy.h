#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace micro {

// Language-model head and loss in one, in chunks over the target rows only (model.md 7.1):
//
//   loss = sum over t with targets[t] != ignore_index of -log softmax(hidden[t] weight^T)[targets[t]]
//
// The logits of a chunk take at most 32 MiB, whatever T and V are. Gradients are formed in the same pass, only those
// that are wanted; the backward scales them. Logits have the type of hidden; their softmax is taken in float32.
//
// hidden:  [T, H], float32, float64 or bfloat16.
// weight:  [V, H], same type and device as hidden. The embedding itself for a tied head.
// targets: [T] int64, in [0, V) or ignore_index. Already shifted.
//
// Returns the sum as a scalar in float32 (float64 for float64), 0 without target; the caller divides by its number of
// items. Differentiable once, in hidden and weight. The host reads the number of targets once.
// Throws ValueError or TypeError that names the argument.
//
//   at::Tensor loss = micro::cross_entropy(hidden, lm_head, shifted_labels) / num_items;
at::Tensor cross_entropy(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& targets,
                         int64_t ignore_index = -100);

}  // namespace micro
