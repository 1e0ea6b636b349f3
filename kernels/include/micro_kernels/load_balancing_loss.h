#pragma once
// Load balancing of a router (model.md 7.2). With m the mask and M the number of real tokens:
//   f[l, e] = 1/M sum_t m[t] #{k : ids[l, t, k] = e}        P[l, e] = 1/M sum_t m[t] probs[l, t, e]
//   pooled:     loss = E sum_e mean_l f[l, e] mean_l P[l, e]          (Mixtral: one pool over layers and tokens)
//   per layer:  loss = E mean_l sum_e f[l, e] P[l, e]                 (Switch)
// f has no gradient, so the gradient of every real token is one row of E numbers per layer: `slope`.

#include <cstdint>

#include "micro_kernels/dtype.h"
#include "micro_kernels/parallel.h"
#include "micro_kernels/status.h"

namespace micro_kernels {

struct LoadBalancingLossParams {
  const void* probs;   // [layers, tokens, experts], accumulator type
  const int32_t* ids;  // [layers, tokens, choices], values in [0, experts)
  const bool* mask;    // [tokens], true: a real token; nullptr: all are
  void* loss;          // [1], accumulator type
  void* slope;         // [layers, experts], accumulator type: d loss / d probs of a real token
  int64_t layers;
  int64_t tokens;
  int64_t choices;
  int64_t experts;
  bool pooled;
  DType dtype;  // of probs: float32 or float64
};

struct LoadBalancingLossBackwardParams {
  const void* grad_loss;  // [1]
  const void* slope;      // [layers, experts]
  const bool* mask;       // [tokens] or nullptr
  void* grad_probs;       // [layers, tokens, experts]
  int64_t layers;
  int64_t tokens;
  int64_t experts;
  DType dtype;
};

// An id outside [0, experts) is kIndexOutOfRange on the CPU and a device assertion on CUDA.
namespace cpu {
Status load_balancing_loss(const LoadBalancingLossParams& params, const ParallelFor& parallel_for);
Status load_balancing_loss_backward(const LoadBalancingLossBackwardParams& params, const ParallelFor& parallel_for);
}  // namespace cpu

// `workspace` holds load_balancing_loss_workspace(params) bytes.
namespace cuda {
int64_t load_balancing_loss_workspace(const LoadBalancingLossParams& params);
Status load_balancing_loss(const LoadBalancingLossParams& params, void* workspace, void* stream);
Status load_balancing_loss_backward(const LoadBalancingLossBackwardParams& params, void* stream);
}  // namespace cuda

}  // namespace micro_kernels
