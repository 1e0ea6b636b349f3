#pragma once
// Router z-loss (model.md 7.3):  loss = 1/(L M) sum_{l,t} m[t] (log sum_e exp z[l, t, e])^2,  M real tokens.

#include <cstdint>

#include "micro_kernels/dtype.h"
#include "micro_kernels/parallel.h"
#include "micro_kernels/status.h"

namespace micro_kernels {

struct ZLossParams {
  const void* logits;  // [layers, tokens, experts]
  const bool* mask;    // [tokens], true: a real token; nullptr: all are
  void* loss;          // [1], accumulator type
  int64_t layers;
  int64_t tokens;
  int64_t experts;
  DType dtype;  // of logits
};

struct ZLossBackwardParams {
  const void* grad_loss;  // [1], accumulator type
  const void* logits;     // [layers, tokens, experts]
  const bool* mask;       // [tokens] or nullptr
  void* grad_logits;      // [layers, tokens, experts]
  int64_t layers;
  int64_t tokens;
  int64_t experts;
  DType dtype;
};

namespace cpu {
Status z_loss(const ZLossParams& params, const ParallelFor& parallel_for);
Status z_loss_backward(const ZLossBackwardParams& params, const ParallelFor& parallel_for);
}  // namespace cpu

// `workspace` holds z_loss_workspace(params) bytes.
namespace cuda {
int64_t z_loss_workspace(const ZLossParams& params);
Status z_loss(const ZLossParams& params, void* workspace, void* stream);
Status z_loss_backward(const ZLossBackwardParams& params, void* stream);
}  // namespace cuda

}  // namespace micro_kernels
