#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "micro/route.h"
#include "micro/types.h"

namespace micro {

// The parameters of one layer, as the Python model holds them. E experts; what FFN experts share (attention and norms)
// has no axis E. A, G, D: query heads, key heads, head size; F: inner size; R: router width.
struct BlockParameters {
  at::Tensor q_proj, k_proj, v_proj, o_proj;  // [E, A D, H], [E, G D, H], [E, G D, H], [E, H, A D]
  at::Tensor gate_proj, up_proj, down_proj;   // [E, F, H], [E, F, H], [E, H, F]
  std::optional<at::Tensor> router_in;        // [R, H]; absent: the router is one folded map
  at::Tensor router_out;                      // [E, R]; folded: [E, H], float32 (float64 for float64)
  std::optional<at::Tensor> input_norm;       // [E, H]; Llama only
  at::Tensor post_attention_norm;             // [E, H]
  // These three together: norms behind attention and feed-forward part, norms of queries and keys, gains in the
  // accumulator type (OLMo-2).
  std::optional<at::Tensor> post_ffn_norm = {};  // [E, H]
  std::optional<at::Tensor> q_norm = {};         // [E, A D]
  std::optional<at::Tensor> k_norm = {};         // [E, G D]
};

// Where in its rows a call stands, and what it may see.
struct BlockCall {
  int64_t slots;                          // S
  int64_t start = 0;                      // C, slots cached before
  std::optional<at::Tensor> keys = {};    // [B, E or 1, G, J, D], written at slots C .. C + S - 1; absent: no cache
  std::optional<at::Tensor> values = {};  // like keys; D contiguous, any other strides
  std::optional<at::Tensor> mask = {};    // as expert_attention
  std::optional<at::Tensor> real = {};    // [T] bool: tokens that are no padding
};

struct BlockResult {
  at::Tensor y;                   // like x
  std::optional<at::Tensor> raw;  // [T, E] router logits; absent where the router did not run
  Routing routing;
};

// One layer of a mixture without gradient, on the CPU: router, keys and values of all experts, attention, feed-forward
// part, residuals (model.md 2.4 - 2.8; whole_block = false: 2.12). Bit for bit what rms_norm, stacked_linear, route,
// plan, permute, expert_linear, rope, expert_attention, swiglu and combine give in this order, without the memory
// traffic between them.
//
// x:        [B, S, H] or [T, H] with T = B * S, float32, float64 or bfloat16.
// cos, sin: [T, D / 2] float32 (float64 for float64); D a multiple of 8.
// heads:    A; G is the width of k_proj over D.
// routing:  k, and RouteOptions; with options.rows the router runs only if run_router.
//
// Without a cache, experts that nobody uses get no keys. Tokens that are not real give 0 (FFN experts: what attention
// gives). Throws ValueError or TypeError that names the argument, RuntimeError where a gradient is asked for.
//
//   micro::BlockResult layer = micro::block_forward(x, parameters, cos, sin, 8, true, 1e-5, {.slots = 1}, 1);
BlockResult block_forward(const at::Tensor& x, const BlockParameters& parameters, const at::Tensor& cos,
                          const at::Tensor& sin, int64_t heads, bool whole_block, double eps, const BlockCall& call,
                          int64_t k, const RouteOptions& options = {}, bool run_router = true);

}  // namespace micro
