#pragma once
// The working memory of a backward pass.

#include "block_forward/buffers.h"
#include "block_train/needs.h"
#include "micro_kernels/block_train.h"

namespace micro_kernels::cpu {

struct TrainBuffers {
  // The decision.
  char *grad_weights, *rounded_weights, *grad_z, *grad_logits, *grad_mid, *router_mid;
  // Rows of the plan.
  char* grad_out;           // of the experts' outputs; then of u
  char *u, *inverse_input;  // post_norm: u anew. 1 / rms of what the norm in front of or behind attention reads
  char* gains;              // gradient of gains, before it is rounded
  char* gains_rounded;
  // Feed-forward part.
  char *normed, *gate, *up, *inner, *grad_inner, *grad_up_rows, *out, *ffn_out, *inverse_out;
  char *grad_ffn, *grad_normed, *grad_normed_up;
  // Attention.
  char *grad_behind, *grad_attention, *rotated_q, *rotated_k, *normed_rows, *inverse_q, *inverse_k;
  char *grad_q, *grad_k, *grad_v, *turned_q, *turned_k;
  // Inputs.
  char *normed_x, *inverse_x, *gathered, *inverse_gathered, *grad_rows, *grad_gathered;
  char *grad_keys, *grad_values, *grad_x, *grad_x_other;
  int32_t *source, *slice_expert;

  TrainBuffers(const BlockTrainBackwardParams& p, Arena& arena) {
    const TrainSizes n(p);
    const BlockShape& s = p.shape;
    const int64_t wide = accumulator_bytes(s.dtype), narrow = element_bytes(s.dtype);
    const auto elements = [&](int64_t rows, int64_t width) { return arena.take(rows * width, narrow); };
    const auto sums = [&](int64_t rows, int64_t width) { return arena.take(rows * width, wide); };
    const int64_t widest = std::max(s.hidden, n.query_width);
    grad_weights = sums(n.tokens, p.route.k);
    rounded_weights = elements(n.tokens, p.route.k);
    grad_z = sums(n.tokens, s.experts);
    grad_logits = elements(n.tokens, s.experts);
    grad_mid = elements(n.tokens, s.router_hidden);
    router_mid = elements(n.tokens, s.router_hidden);
    gains = sums(s.experts, widest);
    gains_rounded = elements(s.experts, widest);
    grad_out = elements(n.pairs, s.hidden);
    u = elements(s.post_norm ? n.pairs : 0, s.hidden);
    inverse_input = sums(n.pairs, 1);

    const int64_t phase = arena.used();
    normed = elements(n.pairs, s.hidden);
    gate = elements(p.saved.gate ? 0 : n.pairs, s.inner);
    up = elements(p.saved.gate ? 0 : n.pairs, s.inner);
    inner = elements(n.pairs, s.inner);
    grad_inner = elements(n.pairs, s.inner);
    grad_up_rows = elements(n.pairs, s.inner);
    out = elements(n.pairs, s.hidden);
    ffn_out = elements(n.pairs, s.hidden);
    inverse_out = sums(n.pairs, 1);
    grad_ffn = elements(n.pairs, s.hidden);
    grad_normed = elements(n.pairs, s.hidden);
    grad_normed_up = elements(n.pairs, s.hidden);

    arena.rewind(phase);
    grad_behind = elements(s.post_norm ? n.pairs : 0, s.hidden);
    grad_attention = elements(n.pairs, n.query_width);
    rotated_q = elements(s.post_norm ? n.pairs : 0, n.query_width);
    rotated_k = elements(s.post_norm ? n.key_rows : 0, n.key_width);
    normed_rows = elements(s.post_norm ? std::max(n.pairs * n.query_width, n.key_rows * n.key_width) : 0, 1);
    inverse_q = sums(n.pairs, 1);
    inverse_k = sums(n.key_rows, 1);
    grad_q = elements(n.pairs, n.query_width);
    grad_k = elements(n.key_rows, n.key_width);
    grad_v = elements(n.key_rows, n.key_width);
    turned_q = elements(n.pairs, n.query_width);
    turned_k = elements(n.key_rows, n.key_width);
    normed_x = elements(s.post_norm ? 0 : n.key_rows, s.hidden);
    inverse_x = sums(n.tokens, 1);
    gathered = elements(n.pairs, s.hidden);
    inverse_gathered = sums(n.pairs, 1);
    grad_rows = elements(n.pairs, s.hidden);
    grad_gathered = elements(n.pairs, s.hidden);
    grad_keys = elements(s.post_norm ? n.tokens : n.key_rows, s.hidden);
    grad_values = elements(s.post_norm ? n.tokens : n.key_rows, s.hidden);
    grad_x = elements(n.tokens, s.hidden);
    grad_x_other = elements(n.tokens, s.hidden);
    source = arena.take<int32_t>(n.pairs);
    slice_expert = arena.take<int32_t>(n.key_rows);
  }
};

}  // namespace micro_kernels::cpu
