#pragma once
// The gradient of one whole-block layer (model.md 2.10). The forward is block_forward with `saved`; everything that it
// did not keep (norms, gathered rows, gated units, outputs) is computed again from what it kept. What the backward
// passes of the separate operators give, one after the other, on the CPU bit for bit.

#include "micro_kernels/block_forward.h"

namespace micro_kernels {

// nullptr: not wanted, and not computed. Matrices [E, out, in] and gains [E, .] as in BlockWeights, element type.
struct BlockGradients {
  void* x;  // [T, H]
  void* q;
  void* k;
  void* v;
  void* o;
  void* gate;
  void* up;
  void* down;
  void* router_in;
  void* router_out;
  void* input_norm;
  void* post_attention_norm;
  void* post_ffn_norm;
  void* q_norm;
  void* k_norm;
  void* logits;  // [T, E], accumulator type: of the logits behind bias and ablation
};

struct BlockTrainBackwardParams {
  BlockShape shape;      // whole_block, with a router of two maps
  BlockWeights weights;  // plain matrices, all gains
  BlockSaved saved;      // only read
  const void* x;         // [T, H]
  int64_t batch, slots;  // B, S: T = B * S
  const void* mask;      // as ExpertAttentionShape
  AttentionMask mask_kind;
  int64_t masks;
  const void* cos;  // [T, D / 2], accumulator type
  const void* sin;
  double scale;               // of the scores
  const void* routing;        // [T, K] the pairs' weights
  bool given;                 // rows stood in for the router: the decision has no gradient
  RouteBackwardParams route;  // the decision, and gradients that came to its results; grad_z is filled in here
  const void* grad_y;         // [T, H], or nullptr: zero
  const void* grad_raw;       // [T, E], element type, or nullptr: zero
  BlockGradients grad;
  bool tf32 = false;  // CUDA only: factors of float32 may be rounded to 10 bits
};

namespace cpu {
// Bytes of working memory, 64-byte aligned.
int64_t block_train_backward_workspace(const BlockTrainBackwardParams& params);
Status block_train_backward(const BlockTrainBackwardParams& params, char* workspace, const ParallelFor& parallel_for);
}  // namespace cpu

// As block_forward. kUnsupported: post_norm, and weights as there. A renormalised weight of a token's only expert
// counts as constant without a look at its probability, unless saved.out is given or the element is float64: keep the
// outputs where an expert may be chosen whose probability is below 1/32.
namespace cuda {
int64_t block_train_backward_workspace(const BlockTrainBackwardParams& params);
Status block_train_backward(const BlockTrainBackwardParams& params, void* workspace, void* stream);
}  // namespace cuda

}  // namespace micro_kernels
