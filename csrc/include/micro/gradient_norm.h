#pragma once

#include <ATen/core/Tensor.h>

namespace micro {

// Global norm of gradients, sqrt(sum of all squares), for clipping and for finding a step that must be skipped. Squares
// and sums are double, in an order that does not depend on the number of threads, so float32 values cannot overflow.
//
// gradients: at least one tensor, any shapes, float32, float64 or bfloat16, all on one device.
//
// Returns a float64 scalar on that device, not differentiable; NaN or infinity if any value is.
// Throws ValueError or TypeError that names the argument and the index.
//
//   const double norm = micro::gradient_norm(gradients).item<double>();
at::Tensor gradient_norm(at::TensorList gradients);

}  // namespace micro
