#pragma once

#include <ATen/core/Tensor.h>

namespace micro {

// The gated unit of the feed-forward part (Shazeer 2020, SwiGLU; model.md 2.2): gate * sigmoid(gate) * up.
//
// gate, up: [...], same sizes, type (float32, float64, bfloat16) and device; not contiguous: copied first. Autocast:
//           the wider of the two types.
//
// Returns a tensor of that shape and type, computed in float32 (float64 for float64) and rounded once. Differentiable
// once; the backward keeps nothing but the inputs. Throws ValueError or TypeError that names the argument.
//
//   at::Tensor h = micro::swiglu(gate, up);
at::Tensor swiglu(const at::Tensor& gate, const at::Tensor& up);

}  // namespace micro
