#pragma once
// The experts' outputs back to the tokens (model.md 2.8):
//   out[t] = sum_i round(y[inverse[t, i]] * weights[t, i]), experts ascending, starting from 0, each sum rounded
// Idle pairs (inverse >= offsets[E]) add nothing.

#include <cstdint>

#include "micro_kernels/dtype.h"
#include "micro_kernels/parallel.h"
#include "micro_kernels/status.h"

namespace micro_kernels {

struct CombineParams {
  const void* y;           // [token_count * k, hidden], plan order
  const void* weights;     // [token_count, k]
  const int32_t* experts;  // [token_count * k], expert of each row; only their order matters
  const int32_t* offsets;  // [expert_count + 1]
  const int32_t* inverse;  // [token_count, k], a permutation of [0, token_count * k)
  void* out;               // [token_count, hidden]
  int64_t token_count;
  int64_t k;
  int64_t hidden;
  int64_t expert_count;
  DType dtype;  // of y, weights and out
};

//   grad_y[n] = weights[t, i] * grad[t],  grad_weights[t, i] = <grad[t], y[n]>,  n = inverse[t, i];  0 for idle pairs
struct CombineBackwardParams {
  const void* grad;        // [token_count, hidden]
  const void* y;           // [token_count * k, hidden]; read only where grad_weights is wanted
  const void* weights;     // [token_count, k]; read only where grad_y is wanted
  const int32_t* offsets;  // [expert_count + 1]
  const int32_t* inverse;  // [token_count, k]
  void* grad_y;            // [token_count * k, hidden], or nullptr: not wanted
  void* grad_weights;      // [token_count, k], accumulator type, or nullptr: not wanted
  int64_t token_count;
  int64_t k;
  int64_t hidden;
  int64_t expert_count;
  DType dtype;  // of grad, y, weights and grad_y
};

// A row outside [0, token_count * k) is kIndexOutOfRange on the CPU and a device assertion on CUDA.
namespace cpu {
Status combine(const CombineParams& params, const ParallelFor& parallel_for);
Status combine_backward(const CombineBackwardParams& params, const ParallelFor& parallel_for);
}  // namespace cpu

namespace cuda {
Status combine(const CombineParams& params, void* stream);
Status combine_backward(const CombineBackwardParams& params, void* stream);
}  // namespace cuda

}  // namespace micro_kernels
