#pragma once
// The two records that pass between the operators of a layer. T tokens, K experts per token, E experts, N = T * K.
//
// Of all operators: the tensors of a call lie on one device, the CPU or CUDA. Where bfloat16 is taken, CUDA takes
// float16 as well. CUDA calls are queued on torch's current stream and wait for nothing: an index outside its range, on
// the CPU a ValueError, stops a CUDA kernel with a device-side assertion, which torch reports at a later call.

#include <ATen/core/Tensor.h>

namespace micro {

// A routing decision (model.md 2.3).
struct Routing {
  at::Tensor ids;        // [T, K] int32, descending by probability
  at::Tensor weights;    // [T, K], type of the logits
  at::Tensor probs;      // [T, E] float32 (float64 for float64)
  at::Tensor effective;  // [T, E] float32 (float64 for float64): the logits after steering, or the given rows
};

// Routed pairs sorted by expert. Rows n >= offsets[E] are idle and not computed.
struct Plan {
  at::Tensor tokens;   // [N] int32, token of each row
  at::Tensor experts;  // [N] int32, expert of each row
  at::Tensor offsets;  // [E + 1] int32, first row of each expert
  at::Tensor inverse;  // [T, K] int32, row of each pair
};

}  // namespace micro
