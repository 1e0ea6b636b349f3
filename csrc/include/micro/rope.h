#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace micro {

// Rotary position embedding (Su et al. 2021), half-split pairing (model.md 2.2):
//
//   (x[i], x[i + D/2]) -> (x[i] cos[i] - x[i + D/2] sin[i], x[i + D/2] cos[i] + x[i] sin[i])
//
// x:        [..., T, heads, D], or [N, heads, D] with tokens; D even; float32, float64 or bfloat16, CPU or CUDA; not
//           contiguous: copied first.
// cos, sin: [T, D/2] float32 or float64, constants, already rounded to the model type where the family does so.
// tokens:   [N] int32, the table row of each row of x, in [0, T).
//
// Returns a tensor like x, computed in float32 (float64 for float64) and rounded once. Differentiable once, in x: the
// gradient is turned back by the same angle. Throws ValueError or TypeError that names the argument.
//
//   at::Tensor q = micro::rope(rows, table.cos, table.sin, plan.tokens);
at::Tensor rope(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin,
                const std::optional<at::Tensor>& tokens = {});

// Llama 3's stretching of the low frequencies; wavelengths below context / high stay, above context / low are divided
// by factor, in between they are blended.
struct RopeScaling {
  double factor;
  double low;
  double high;
  double context;  // the old context, in tokens
};

// f[i] = 1 / theta^(2i/D), in this order, in float32 (model.md 2.2). Returns [D/2] float32 on the CPU.
// Throws ValueError where head_dim is not a positive even number or another number is not positive.
at::Tensor rope_frequencies(int64_t head_dim, double theta, const std::optional<RopeScaling>& scaling = {});

struct RopeTable {
  at::Tensor cos;  // [P, D/2] float32
  at::Tensor sin;  // [P, D/2] float32
};

// Cosine and sine of the angles position * frequency, all in float32. position_ids: [P] int64; frequencies: [D/2]
// float32 on the same device.
//
//   micro::RopeTable table = micro::rope_table(position_ids, micro::rope_frequencies(64, 500000.0));
RopeTable rope_table(const at::Tensor& position_ids, const at::Tensor& frequencies);

}  // namespace micro
