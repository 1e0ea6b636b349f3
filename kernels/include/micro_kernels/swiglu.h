#pragma once
// The gated unit of the feed-forward part (model.md 2.2), element by element:
//   y = gate * sigmoid(gate) * up, in the accumulator type, rounded once

#include <cstdint>

#include "micro_kernels/dtype.h"
#include "micro_kernels/parallel.h"
#include "micro_kernels/status.h"

namespace micro_kernels {

struct SwigluParams {
  const void* gate;  // [count]
  const void* up;    // [count]
  void* y;           // [count]
  int64_t count;
  DType dtype;
};

//   grad_gate = grad_y * up * s * (1 + gate * (1 - s)),  grad_up = grad_y * gate * s,  s = sigmoid(gate)
struct SwigluBackwardParams {
  const void* grad_y;  // [count]
  const void* gate;    // [count]
  const void* up;      // [count]
  void* grad_gate;     // [count]
  void* grad_up;       // [count]
  int64_t count;
  DType dtype;
};

namespace cpu {
Status swiglu(const SwigluParams& params, const ParallelFor& parallel_for);
Status swiglu_backward(const SwigluBackwardParams& params, const ParallelFor& parallel_for);
}  // namespace cpu

namespace cuda {
Status swiglu(const SwigluParams& params, void* stream);
Status swiglu_backward(const SwigluBackwardParams& params, void* stream);
}  // namespace cuda

}  // namespace micro_kernels
