#pragma once
// Router logits to a routing decision, with steering (model.md 2.3, 2.9, 2.10, 4.3):
//   z' = z + bias, -inf where ablated;  p = softmax(z'), or the given rows, or the one-hot of a forced expert
//   ids = the K largest of p, descending, equal values by ascending id, NaN below -inf;  q_i = p[id_i]
//   w_i = q_i / (sum_j q_j + 1e-9)

#include <cstdint>

#include "micro_kernels/dtype.h"
#include "micro_kernels/parallel.h"
#include "micro_kernels/status.h"

namespace micro_kernels {

// The weight of a chosen expert, forward and backward (model.md 2.10.4).
enum class WeightRule : int8_t {
  kRenormalized,     // q / sum q; gradient in closed form, so that K = 1 gets exactly 0
  kProbability,      // q
  kStraightThrough,  // q / sum q, gradient as if the weight were q
};

// Strides of steering inputs are in elements between tokens; 0 is one row for all tokens.
struct RouteParams {
  const void* logits;     // [tokens, experts]; read only where rows is nullptr
  const void* rows;       // [tokens, experts], accumulator type: probabilities that win over everything; or nullptr
  const void* bias;       // [tokens | 1, experts], accumulator type, or nullptr
  const bool* ablate;     // [tokens | 1, experts] or nullptr
  const int32_t* force;   // [tokens | 1], -1 is free, else in [0, experts); or nullptr
  const int32_t* replay;  // [tokens, k], in [0, experts): ids to take instead of the largest; or nullptr
  int32_t* ids;           // [tokens, k]
  void* weights;          // [tokens, k]
  void* probs;            // [tokens, experts], accumulator type
  void* effective;        // [tokens, experts], accumulator type: z', or the rows
  int64_t bias_stride;
  int64_t ablate_stride;
  int64_t force_stride;
  int64_t tokens;
  int64_t experts;
  int64_t k;
  WeightRule rule;
  DType dtype;  // of logits and weights
};

// dp = grad_probs + dq at the chosen ids;  grad_z = p (dp - sum p dp) + grad_effective, 0 where z' = -inf or forced.
struct RouteBackwardParams {
  const void* grad_weights;    // [tokens, k], or nullptr: zero
  const void* grad_probs;      // [tokens, experts], accumulator type, or nullptr: zero
  const void* grad_effective;  // [tokens, experts], accumulator type, or nullptr: zero
  const int32_t* ids;          // [tokens, k]
  const void* probs;           // [tokens, experts], accumulator type
  const void* effective;       // [tokens, experts], accumulator type
  const int32_t* force;        // [tokens | 1] or nullptr
  void* grad_z;                // [tokens, experts], accumulator type
  int64_t force_stride;
  int64_t tokens;
  int64_t experts;
  int64_t k;
  WeightRule rule;
  DType dtype;  // of grad_weights
};

// An id outside [0, experts) in force, replay or ids is kIndexOutOfRange on the CPU and a device assertion on CUDA.
namespace cpu {
Status route(const RouteParams& params, const ParallelFor& parallel_for);
Status route_backward(const RouteBackwardParams& params, const ParallelFor& parallel_for);
}  // namespace cpu

namespace cuda {
Status route(const RouteParams& params, void* stream);
Status route_backward(const RouteBackwardParams& params, void* stream);
}  // namespace cuda

}  // namespace micro_kernels
