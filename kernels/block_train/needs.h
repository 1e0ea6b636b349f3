#pragma once
// Which gradients of inner values the wanted ones need, and the sizes that follow from the parameters.

#include <cstdint>

#include "micro_kernels/block_train.h"

namespace micro_kernels {

// Backwards through the layer: each value's gradient is needed where one in front of it is.
struct Needs {
  bool inputs;  // the rows that queries, keys and values are made of
  bool q, k, v, attention;
  bool u;          // behind attention and residual
  bool ffn_input;  // in front of gate and up
  bool gated;      // gate and up
  bool ffn;        // behind the last matrix
  bool any;        // of the experts

  explicit Needs(const BlockTrainBackwardParams& p) {
    const BlockGradients& g = p.grad;
    const bool post_norm = p.shape.post_norm;
    inputs = g.x || g.input_norm;
    q = inputs || g.q || g.q_norm;
    k = inputs || g.k || g.k_norm;
    v = inputs || g.v;
    attention = q || k || v;
    u = attention || g.o || (post_norm && g.post_attention_norm);
    ffn_input = u || (!post_norm && g.post_attention_norm);
    gated = ffn_input || g.gate || g.up;
    ffn = gated || g.down || g.post_ffn_norm;
    any = p.grad_y && ffn;
  }
};

struct TrainSizes {
  int64_t tokens, pairs, query_width, key_width, key_rows;

  explicit TrainSizes(const BlockTrainBackwardParams& p)
      : tokens(p.batch * p.slots),
        pairs(tokens * p.route.k),
        query_width(p.shape.heads * p.shape.head_dim),
        key_width(p.shape.groups * p.shape.head_dim),
        key_rows(tokens * p.shape.experts) {}
};

}  // namespace micro_kernels
