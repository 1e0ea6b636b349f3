#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace micro {

// Takes rows into streaming moments, in place (Welford 1962; Chan, Golub, LeVeque 1979). With n rows of an expert:
//   count: n      mean: 1/n sum x      m2: sum (x - mean)^2      scatter: sum (x - mean)(x - mean)^T
//
// x:       [N, W], float32, float64 or bfloat16.
// count:   float64 [E'], as the next three; all 0 at the start.
// mean:    [E', W].
// m2:      [E', W]; the variance is m2 / (n - 1).
// scatter: [E', W, W]; none: not kept.
// touched: bool [N], the rows that are taken in; none: all.
// experts: int32 [N], in [0, E') where the row is taken in; none: 0.
//
// On the CPU rows are taken in one by one: how they are cut into calls changes no bit (of the scatter: to rounding).
// Not differentiable. Throws ValueError or TypeError that names the argument.
//
//   micro::moments_(x, count, mean, m2, std::nullopt, std::nullopt, experts);
void moments_(const at::Tensor& x, at::Tensor& count, at::Tensor& mean, at::Tensor& m2,
              const std::optional<at::Tensor>& scatter = std::nullopt,
              const std::optional<at::Tensor>& touched = std::nullopt,
              const std::optional<at::Tensor>& experts = std::nullopt);

}  // namespace micro
