#pragma once
// Some queries, all keys of their expert, causal by slot (model.md 2.6, 2.7):
//   out[n, a] = sum_j softmax_j(scale * q[n, a] . k[b, e, g, j]) v[b, e, g, j],   g = a / (A / G)
// where row n of the plan belongs to expert e and token t = tokens[n] of row b = t / S at slot start[b] + t % S.
// Nothing of size S x J is ever stored.

#include <cstdint>

#include "micro_kernels/dtype.h"
#include "micro_kernels/parallel.h"
#include "micro_kernels/status.h"

namespace micro_kernels {

enum class AttentionMask : int8_t {
  kNone,   // causal by slot
  kKeys,   // causal, and mask[b, j] says which slots are real; a query at a slot that is not real sees nothing
  kPairs,  // mask[b, s, j] alone says what is visible
  kBias,   // mask[b, s, j] is added to the scores; -inf hides
};

// The plan, the keys and what may be seen: the same forward and backward.
struct ExpertAttentionShape {
  const int32_t* tokens;   // [N], ascending within each expert
  const int32_t* offsets;  // [E + 1]; on the device of the tensors
  const void* mask;        // nullptr, bool [B, J], bool [masks, S, J], accumulator type [masks, S, J]
  AttentionMask mask_kind;
  int64_t masks;                          // 1 or B: rows of a mask of kind kPairs or kBias
  int64_t rows, heads, groups, head_dim;  // N, A, G, D
  int64_t batch, experts, slots, keys;    // B, E, S, J
  int64_t start;                          // slot of a row's first token ...
  const int32_t* starts;                  // ... or one per row, [B]; nullptr: start for all
  double scale;
  DType dtype;  // of q, k, v, out and their gradients
};

// Elements between neighbours along B, E, G and J; D is contiguous.
struct HeadStrides {
  int64_t batch, expert, group, key;
};

struct ExpertAttentionParams {
  ExpertAttentionShape shape;
  const void* q;  // [N, A, D]
  const void* k;  // [B, E, G, J, D]
  const void* v;  // [B, E, G, J, D]
  HeadStrides k_strides;
  HeadStrides v_strides;
  void* out;        // [N, A, D]; idle rows and queries that see nothing are 0
  void* logsumexp;  // [N, A], accumulator type; -inf where nothing is seen
};

struct ExpertAttentionBackwardParams {
  ExpertAttentionShape shape;
  const void* grad_out;   // [N, A, D]
  const void* q;          // [N, A, D]
  const void* k;          // [B, E, G, J, D]
  const void* v;          // [B, E, G, J, D]
  const void* out;        // [N, A, D], of the forward
  const void* logsumexp;  // [N, A], of the forward
  HeadStrides k_strides;
  HeadStrides v_strides;
  void* grad_q;  // [N, A, D], or nullptr: not wanted
  void* grad_k;  // [B, E, G, J, D], or nullptr: not wanted
  void* grad_v;  // [B, E, G, J, D], or nullptr: not wanted
  HeadStrides grad_k_strides;
  HeadStrides grad_v_strides;
};

// kIndexOutOfRange on the CPU, a device assertion on CUDA: offsets that do not ascend from 0 to at most N, a token
// outside [0, B*S), tokens that do not ascend within an expert, or, with starts, a token at a slot outside [0, J).
namespace cpu {
Status expert_attention(const ExpertAttentionParams& params, const ParallelFor& parallel_for);
Status expert_attention_backward(const ExpertAttentionBackwardParams& params, const ParallelFor& parallel_for);
}  // namespace cpu

// Working memory on the device: so many bytes, aligned to 16, nullptr where none are needed. Up to four tokens of a
// batch row take kernels of their own, which split the keys: they agree with the others to rounding, and a token's bits
// depend neither on the batch nor on the tokens that come with it within either.
namespace cuda {
int64_t expert_attention_workspace(const ExpertAttentionParams& params);
Status expert_attention(const ExpertAttentionParams& params, void* workspace, void* stream);
int64_t expert_attention_backward_workspace(const ExpertAttentionBackwardParams& params);
Status expert_attention_backward(const ExpertAttentionBackwardParams& params, void* workspace, void* stream);
}  // namespace cuda

}  // namespace micro_kernels
