#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace micro {

// One step of AdamW with decoupled weight decay (Loshchilov and Hutter 2019, algorithm 2), in place, one pass over the
// memory of each tensor:
//
//   g = gradient_scale * gradient;   m = beta1 m + (1 - beta1) g;   v = beta2 v + (1 - beta2) g^2
//   p = p (1 - learning_rate weight_decay) - learning_rate (m / (1 - beta1^step)) / (sqrt(v / (1 - beta2^step)) + eps)
//
// parameters:     any shapes, dense, float32, float64 or bfloat16. Gradients must be off (NoGradGuard) if they need
// any. gradients:      same shapes and types as the parameters. first_moments, second_moments: same shapes and layouts;
// float32, float64 for float64 parameters. Zero before step 1. masters:        empty; or, for bfloat16 parameters, one
// float32 copy each, which carries the value while the
//                 parameter is its rounding.
// step:           1 for the first.
//
// Throws ValueError or TypeError that names the argument and the index.
//
//   micro::adamw_step({w}, {w.grad()}, {m}, {v}, {}, /*step=*/1, /*learning_rate=*/2e-5);
void adamw_step(at::TensorList parameters, at::TensorList gradients, at::TensorList first_moments,
                at::TensorList second_moments, at::TensorList masters, int64_t step, double learning_rate,
                double beta1 = 0.9, double beta2 = 0.999, double eps = 1e-8, double weight_decay = 0.0,
                double gradient_scale = 1.0);

}  // namespace micro
