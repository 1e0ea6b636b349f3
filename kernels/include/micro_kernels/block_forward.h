#pragma once
// One whole layer without gradient: router, plan, keys and values of the experts, attention, output, feed-forward,
// residuals and combination (model.md 2.4 - 2.8, 2.12). What the separate operators give, one after the other, on the
// CPU bit for bit; here they share buffers, and a decoded token passes six parallel regions, or nine launches.

#include <cstdint>
#include <functional>

#include "micro_kernels/expert_attention.h"
#include "micro_kernels/expert_linear.h"
#include "micro_kernels/rms_norm.h"
#include "micro_kernels/route.h"

namespace micro_kernels {

struct BlockShape {
  int64_t hidden, heads, groups, head_dim, inner;  // H, A, G, D (a multiple of 8), F
  int64_t experts;                                 // E
  int64_t router_hidden;                           // width of the router's first map; 0: one folded map H -> E
  bool whole_block;                                // false: FFN experts under one shared attention
  bool post_norm;                                  // OLMo-2: norms behind attention and feed-forward, q and k norms
  double eps;
  GainRounding rounding;
  DType dtype;
};

// Matrices are arrays [E], or [1] for what FFN experts share (attention). Gains are [E, .], or [1, .] for FFN experts;
// nullptr: the gain is folded into the matrices behind it (without post_norm: input_norm and post_attention_norm).
struct BlockWeights {
  const Matrix* q;
  const Matrix* k;
  const Matrix* v;
  const Matrix* o;
  const Matrix* gate;
  const Matrix* up;
  const Matrix* down;
  Matrix router_in;                 // [router_hidden, H]; unused where router_hidden is 0
  Matrix router_out;                // [E, router_hidden]; or, folded, [E, H] in the accumulator type
  const void* input_norm;           // [E, H]; not with post_norm
  const void* post_attention_norm;  // [E, H]: in front of the feed-forward part, or (post_norm) behind attention
  const void* post_ffn_norm;        // [E, H]; only with post_norm
  const void* q_norm;               // [E, A * D]; only with post_norm
  const void* k_norm;               // [E, G * D]; only with post_norm
};

// Keys and values [B, attention experts, G, J, D], written at the call's slots and read up to them. Tokens that are not
// real write theirs too, but not in a batch with starts of its own for each row.
// k == nullptr: there is no cache; start is 0, starts nullptr, and experts that nobody uses are skipped.
// Lazy (x given; whole-block experts only): the layer's input is kept per slot, and an expert's keys and values of a
// row are made up to the last slot that is routed to it; `filled` says how far they are.
struct BlockCache {
  void* k;
  void* v;
  HeadStrides k_strides, v_strides;
  void* x;                   // [B, J, H], or nullptr: keys and values of all experts at once
  int64_t x_batch_stride;    // elements, a multiple of H
  int32_t* filled;           // [B, E]: slots below are made; never above the row's start
  const int32_t* positions;  // [B, J] row of cos and sin of each slot, for keys made late; nullptr: the slot itself
  int64_t positions_stride;
};

// What a backward pass reads (block_train.h), in arrays of the caller; whole-block experts without a cache only.
// N = T * K rows in plan order; rows behind the last routed pair are not written.
struct BlockSaved {
  int32_t* tokens;   // the plan
  int32_t* experts;  //
  int32_t* offsets;  //
  int32_t* inverse;  //
  void* q;           // [N, A D] rotated; post_norm: in front of its norm
  void* k;           // [B, E, G, S, D] rotated; post_norm: [., G D] in front of its norm, T rows of each used expert
  void* v;           // [B, E, G, S, D]
  void* attention;   // [N, A D]
  void* logsumexp;   // [N, A], accumulator type
  void* behind;      // [N, H], behind attention and residual; post_norm: what the output matrix gives
  void* router_mid;  // [T, router_hidden]; from here on nullptr: not kept
  void* gate;        // [N, F], together with up
  void* up;          // [N, F]
  void* out;         // [N, H], the experts' outputs; post_norm: what the last matrix gives, in front of its norm
};

// Rows that a layer shows on its way, in the order of this list (with FFN experts the router comes behind attention).
enum class BlockPoint : int8_t { kRouter, kHeads, kAttention, kUp, kUnits, kFfn, kBlockOutput };

struct BlockRows {
  BlockPoint point;
  void* rows;              // [count, width], may be changed
  const int32_t* tokens;   // [count]; nullptr: the row's number, tokens that are not real included
  const int32_t* experts;  // [count]; nullptr: rows of tokens, of no expert
  int64_t count, width;
  DType dtype;                   // the element type; router logits of a folded map: the accumulator type
  const bool* chosen = nullptr;  // [count], whether the routing has the pair; nullptr: it has them all
};

// `meet` gets the rows of the points asked for, from the calling thread, and may change them. The layer then takes the
// steps around those points one by one: the same bits.
struct BlockHooks {
  uint32_t points = 0;  // 1 << point
  std::function<Status(const BlockRows&)> meet;
  bool all_experts = false;  // every expert runs on, and shows, every real token; y is still that of the routed pairs

  bool wants(BlockPoint point) const { return points >> static_cast<int>(point) & 1; }
};

struct BlockForwardParams {
  BlockShape shape;
  BlockWeights weights;
  BlockCache cache;
  const void* x;          // [B * S, H]
  void* y;                // [B * S, H], may be x; rows of tokens that are not real are 0 (whole block)
  int64_t batch, slots;   // B, S
  int64_t start;          // slot of a row's first token ...
  const int32_t* starts;  // ... or one per row, [B]; nullptr: start
  int64_t keys;           // J: key slots that exist after this call
  const bool* real;       // [B * S]; nullptr: all
  const void* mask;       // as ExpertAttentionShape
  AttentionMask mask_kind;
  int64_t masks;
  const void* cos;  // [positions, D / 2], accumulator type
  const void* sin;
  int64_t positions;        // rows of cos and sin
  const int32_t* position;  // [B * S], row of cos and sin; nullptr: the token's own number
  double scale;             // of the scores
  RouteParams route;        // steering, k, rule, and where ids [T, K], weights [T, K], probs [T, E], effective [T, E]
                            // go; logits, tokens, experts and dtype are filled in here
  void* raw;                // [T, E] router logits, element type (folded: accumulator type); nullptr: kept to itself,
                            // and where route.rows are given the router does not run
  int64_t* regions;         // counts parallel regions that had more than one piece of work; or nullptr
  const BlockSaved* saved = nullptr;  // a backward pass will follow
  bool tf32 = false;                  // CUDA only: factors of float32 may be rounded to 10 bits
  const BlockHooks* hooks = nullptr;  // CPU only, not together with saved
};

namespace cpu {
// Bytes of working memory, 64-byte aligned, that a call of this size needs.
int64_t block_forward_workspace(const BlockForwardParams& params);
// kIndexOutOfRange: force, replay or a position lies outside its range.
Status block_forward(const BlockForwardParams& params, char* workspace, const ParallelFor& parallel_for);
}  // namespace cpu

// Arrays of matrices lie on the host, what they point at, and everything else, on the device. The matrices of an array
// must be one tensor [E, out, in]. kUnsupported: packed matrices, a lazy cache, hooks, another rounding than the
// family's, or a cache whose rows an int32 cannot count.
namespace cuda {
int64_t block_forward_workspace(const BlockForwardParams& params);
Status block_forward(const BlockForwardParams& params, void* workspace, void* stream);
}  // namespace cuda

}  // namespace micro_kernels
