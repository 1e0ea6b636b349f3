#pragma once
// Every token through every expert that is used (model.md 2.6: keys and values):
//   y[e, t, o] = sum_i weight[e, o, i] * x[e or 0, t, i];   0 where offsets[e] == offsets[e + 1]
// On the CPU this is a list of parts of cpu::linear (expert_linear.h).

#include <cstdint>

#include "micro_kernels/dtype.h"
#include "micro_kernels/status.h"

namespace micro_kernels {

struct StackedLinearParams {
  const void* x;           // [inputs, T, in]
  const void* weight;      // [E, out, in]
  const int32_t* offsets;  // [E + 1] or nullptr: every expert is used
  void* y;                 // [E, T, out]
  int64_t inputs;          // 1 or E
  int64_t tokens, experts, in, out;
  DType dtype;
  bool tf32 = false;  // CUDA only: factors of float32 may be rounded to 10 bits
};

struct StackedLinearBackwardParams {
  const void* grad_y;      // [E, T, out]
  const void* x;           // [inputs, T, in]
  const void* weight;      // [E, out, in]
  const int32_t* offsets;  // [E + 1] or nullptr
  void* grad_x;            // [inputs, T, in], or nullptr: not wanted
  void* grad_weight;       // [E, out, in], or nullptr: not wanted
  int64_t inputs;
  int64_t tokens, experts, in, out;
  DType dtype;
  bool tf32 = false;  // CUDA only: factors of float32 may be rounded to 10 bits
};

namespace cuda {
Status stacked_linear(const StackedLinearParams& params, void* stream);
Status stacked_linear_backward(const StackedLinearBackwardParams& params, void* stream);
}  // namespace cuda

}  // namespace micro_kernels
