#pragma once
// Cross-entropy of the routers against token labels (model.md 7.4, before the division by the number of tokens):
//   loss = sum_l c[l] sum_t keep[t] -log softmax(z[l, t])[label[t]] / sum_l c[l],   keep = real and label >= 0

#include <cstdint>

#include "micro_kernels/dtype.h"
#include "micro_kernels/parallel.h"
#include "micro_kernels/status.h"

namespace micro_kernels {

struct LabelLossParams {
  const void* logits;         // [layers, tokens, experts]
  const int64_t* labels;      // [tokens], values below experts; negative: no label
  const bool* mask;           // [tokens], true: a real token; nullptr: all are
  const void* layer_weights;  // [layers], accumulator type; nullptr: all 1
  void* loss;                 // [1], accumulator type
  int64_t layers;
  int64_t tokens;
  int64_t experts;
  DType dtype;  // of logits
};

struct LabelLossBackwardParams {
  const void* grad_loss;      // [1], accumulator type
  const void* logits;         // [layers, tokens, experts]
  const int64_t* labels;      // [tokens]
  const bool* mask;           // [tokens] or nullptr
  const void* layer_weights;  // [layers] or nullptr
  void* grad_logits;          // [layers, tokens, experts]
  int64_t layers;
  int64_t tokens;
  int64_t experts;
  DType dtype;
};

// A label of `experts` or more is kIndexOutOfRange on the CPU and a device assertion on CUDA.
namespace cpu {
Status label_loss(const LabelLossParams& params, const ParallelFor& parallel_for);
Status label_loss_backward(const LabelLossBackwardParams& params, const ParallelFor& parallel_for);
}  // namespace cpu

// `workspace` holds label_loss_workspace(params) bytes.
namespace cuda {
int64_t label_loss_workspace(const LabelLossParams& params);
Status label_loss(const LabelLossParams& params, void* workspace, void* stream);
Status label_loss_backward(const LabelLossBackwardParams& params, void* stream);
}  // namespace cuda

}  // namespace micro_kernels
