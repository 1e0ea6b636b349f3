#pragma once
// Decision entropy of a router (model.md 7.5), natural logarithm, 0 log 0 = 0, M real tokens:
//   entropy[l] = 1/M sum_t m[t] sum_e -p[l, t, e] log p[l, t, e]
// The gradient at p = 0 is 0: an expert that cannot be chosen does not move.

#include <cstdint>

#include "micro_kernels/dtype.h"
#include "micro_kernels/parallel.h"
#include "micro_kernels/status.h"

namespace micro_kernels {

struct RoutingEntropyParams {
  const void* probs;  // [layers, tokens, experts]
  const bool* mask;   // [tokens], true: a real token; nullptr: all are
  void* entropy;      // [layers], accumulator type
  int64_t layers;
  int64_t tokens;
  int64_t experts;
  DType dtype;  // of probs
};

struct RoutingEntropyBackwardParams {
  const void* grad_entropy;  // [layers], accumulator type
  const void* probs;         // [layers, tokens, experts]
  const bool* mask;          // [tokens] or nullptr
  void* grad_probs;          // [layers, tokens, experts]
  int64_t layers;
  int64_t tokens;
  int64_t experts;
  DType dtype;
};

namespace cpu {
Status routing_entropy(const RoutingEntropyParams& params, const ParallelFor& parallel_for);
Status routing_entropy_backward(const RoutingEntropyBackwardParams& params, const ParallelFor& parallel_for);
}  // namespace cpu

// `workspace` holds routing_entropy_workspace(params) bytes.
namespace cuda {
int64_t routing_entropy_workspace(const RoutingEntropyParams& params);
Status routing_entropy(const RoutingEntropyParams& params, void* workspace, void* stream);
Status routing_entropy_backward(const RoutingEntropyBackwardParams& params, void* stream);
}  // namespace cuda

}  // namespace micro_kernels
