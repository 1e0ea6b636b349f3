#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace micro {

// What happens to the touched rows and columns of intervene().
enum class Change { kZero, kScale, kShift, kReplace };

// Rows at a point of a layer with some of their elements changed (model.md 9.3, 9.5: ablation, lesion, steering).
//   zero: 0      scale: x * v      shift: x + v      replace: v
//
// x:       [N, W], float32, float64 or bfloat16.
// touched: bool [N], the rows that are changed; none: all.
// experts: int32 [N], in [0, E') where the row is touched; none: 0.
// columns: bool [E', W], the columns that are changed; none: all.
// value:   [R|1, W|1] of x's type, none only for zero: v = value[index[n]] (R rows of another run), without an index
//          value[experts[n]] (R = E').
// index:   int64 [N], in [0, R) where the row is touched.
//
// Returns y [N, W]: what is not changed keeps its bits. Differentiable once, in x and value, whose gradient is added
// up over the rows in a fixed order (float64 for float64, else float32); neither needs the other's. Autocast: value
// takes x's type. Throws ValueError or TypeError that names the argument.
//
//   at::Tensor y = micro::intervene(x, micro::Change::kScale, touched, experts, columns, gates);
at::Tensor intervene(const at::Tensor& x, Change change, const std::optional<at::Tensor>& touched = std::nullopt,
                     const std::optional<at::Tensor>& experts = std::nullopt,
                     const std::optional<at::Tensor>& columns = std::nullopt,
                     const std::optional<at::Tensor>& value = std::nullopt,
                     const std::optional<at::Tensor>& index = std::nullopt);

}  // namespace micro
