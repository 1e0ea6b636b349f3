#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace micro {

// Some queries, all keys of their expert, causal by slot (model.md 2.6, 2.7):
//
//   out[n, a] = sum_j softmax_j(scale * q[n, a] . k[b, e, g, j]) v[b, e, g, j],   g = a / (A / G)
//
// Row n of the plan belongs to the expert e with offsets[e] <= n < offsets[e + 1]; token t = tokens[n] stands in row
// b = t / slots at slot start + t % slots, and sees the slots up to its own.
//
// q:       [N, A, D], float32, float64 or bfloat16, CPU or CUDA; D at most 256; a size that is no multiple
//          of 8 costs a copy of q, k and v.
// k, v:    [B, E, G, J, D], same type and device; any strides with D contiguous (else a copy is made); J may be larger
//          than start + slots, as in a static cache. Slots that nobody may see are never read.
// tokens:  [N] int32, ascending within each expert (plan().tokens).
// offsets: [E + 1] int32.
// slots:   S, slots of this call. start: C, slots cached before it.
// mask:    absent; bool [B, J], true where the slot is real: a query at a slot that is not real sees nothing; or
//          [B or 1, S, J], bool (true = visible) or floating (added to the scores): these replace the causal rule. It
//          gets no gradient.
// scale:   absent: 1 / sqrt(D).
//
// Returns [N, A, D]; idle rows and queries that see no key are 0. Softmax runs in float32 (float64 for float64), and
// nothing of size S x J is stored. With bfloat16 and AVX512_BF16 the weights are rounded to bfloat16 before they
// multiply v. Differentiable once, in q, k and v. The result for a query does not depend on the other queries, the
// split of a sequence into calls, or the number of threads.
// Throws ValueError or TypeError that names the argument.
//
//   at::Tensor a = micro::expert_attention(q, k, v, plan.tokens, plan.offsets, S, cached, mask);
at::Tensor expert_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& tokens,
                            const at::Tensor& offsets, c10::SymInt slots, c10::SymInt start = 0,
                            const std::optional<at::Tensor>& mask = std::nullopt,
                            std::optional<double> scale = std::nullopt);

}  // namespace micro
