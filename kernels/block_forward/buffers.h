#pragma once
// The working memory of one call: every array that the steps of a layer hand to each other. The same code measures it
// and hands it out.

#include <algorithm>
#include <cstdint>

#include "micro_kernels/block_forward.h"

namespace micro_kernels::cpu {

constexpr int64_t kLateRows = 256;  // keys that a lazy cache makes at once, at least

inline int64_t element_bytes(DType dtype) {
  return dispatch(dtype, []<class T>() { return static_cast<int64_t>(sizeof(T)); });
}
inline int64_t accumulator_bytes(DType dtype) { return dtype == DType::kFloat64 ? 8 : 4; }
inline DType accumulator_of(DType dtype) { return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32; }

// Whether every expert runs on every token.
inline bool runs_all(const BlockForwardParams& p) { return p.hooks && p.hooks->all_experts; }

// Sizes that follow from the parameters. Pairs are those of the plan: the routing's, or all of them.
struct Sizes {
  int64_t tokens, routed, pairs, queries, key_experts, key_rows;
  int64_t query_width, key_width;  // A D, G D

  explicit Sizes(const BlockForwardParams& p)
      : tokens(p.batch * p.slots),
        routed(tokens * p.route.k),
        pairs(runs_all(p) ? tokens * p.shape.experts : routed),
        queries(p.shape.whole_block ? pairs : tokens),
        key_experts(p.shape.whole_block ? p.shape.experts : 1),
        key_rows(std::max(key_experts * tokens, p.cache.x ? kLateRows : 0)),
        query_width(p.shape.heads * p.shape.head_dim),
        key_width(p.shape.groups * p.shape.head_dim) {}
};

// Pieces of 64-byte aligned memory, one behind the other. With base nullptr it only counts.
class Arena {
 public:
  explicit Arena(char* base) : base_(base) {}

  template <class T = char>
  T* take(int64_t count, int64_t bytes = sizeof(T)) {
    const int64_t at = used_;
    used_ += (count * bytes + 63) / 64 * 64;
    peak_ = std::max(peak_, used_);
    return base_ ? reinterpret_cast<T*>(base_ + at) : nullptr;
  }
  int64_t used() const { return used_; }
  void rewind(int64_t used) { used_ = used; }
  int64_t peak() const { return peak_; }

 private:
  char* base_;
  int64_t used_ = 0, peak_ = 0;
};

// Rows whose keys and values are made together, grouped by expert.
struct KeyRows {
  int32_t* source;    // row of the (normalised) input
  int32_t* expert;    //
  int32_t* batch;     // where they go
  int32_t* slot;      //
  int32_t* position;  // of the rotary tables
  int32_t* offsets;   // [key experts + 1]
};

// Pairs of a token and an expert, sorted by expert (micro_kernels/plan.h).
struct PlanRows {
  int32_t *tokens, *experts, *offsets, *inverse;
};

struct Buffers {
  // The decision.
  char *router_mid, *logits, *wide_x, *wide_weights;
  // The plan of the routed pairs, and that of an attention that all tokens share.
  int32_t *tokens, *experts, *offsets, *inverse, *everyone, *whole;
  // Only where every expert runs on every token: their ids, the routing's own plan beside the one above, which of that
  // one's rows it has, and these rows' outputs in its order.
  int32_t* all_ids;
  PlanRows routed;
  bool* chosen;
  char* routed_out;
  // Queries.
  int32_t *query_source, *query_position;
  char *rotated, *attention, *logsumexp;
  KeyRows keys;
  int32_t* first_late;  // [B, E] row of the list at which a row's keys of this call begin
  char *own_k, *own_v;  // where there is no cache
  char *ones, *inverse_rms;
  char* u;  // behind attention
  // Only until the attention, and only behind it.
  char *normed_x, *k, *k_other, *v, *q;
  char *normed, *inner, *out, *mixture;
  char *gate, *up;  // only where somebody wants to see them
  char* k_rotated;  // behind a norm
  char* behind;     // what the output matrix gives
  char* ffn_out;    // what the last matrix gives

  PlanRows plan() const { return {tokens, experts, offsets, inverse}; }
  // What goes into the feed-forward part, and with FFN experts into the router.
  const char* feed_forward_input(const BlockShape& s) const { return s.post_norm ? u : normed; }

  Buffers(const BlockForwardParams& p, Arena& arena) {
    const Sizes size(p);
    const BlockShape& s = p.shape;
    const int64_t wide = accumulator_bytes(s.dtype), narrow = element_bytes(s.dtype);
    const auto elements = [&](int64_t count) { return arena.take(count, narrow); };
    const auto integers = [&](int64_t count) { return arena.take<int32_t>(count); };
    const BlockSaved kept = p.saved ? *p.saved : BlockSaved{};
    const auto elements_or = [&](void* own, int64_t count) {
      return own ? static_cast<char*>(own) : arena.take(count, narrow);
    };
    const auto integers_or = [&](int32_t* own, int64_t count) { return own ? own : arena.take<int32_t>(count); };
    const bool converts = s.router_hidden == 0 && s.dtype == DType::kBFloat16;
    router_mid = elements_or(kept.router_mid, size.tokens * s.router_hidden);
    logits = arena.take(size.tokens * s.experts, wide);
    wide_x = arena.take(converts ? size.tokens * s.hidden : 0, wide);
    wide_weights = arena.take(converts ? size.routed : 0, wide);
    tokens = integers_or(kept.tokens, size.pairs);
    experts = integers_or(kept.experts, size.pairs);
    offsets = integers_or(kept.offsets, s.experts + 1);
    inverse = integers_or(kept.inverse, size.pairs);
    everyone = integers(s.whole_block ? 0 : size.tokens);
    whole = integers(2);
    const bool all = runs_all(p);
    const int64_t routed_pairs = all ? size.routed : 0;
    all_ids = integers(all ? size.pairs : 0);
    routed = {integers(routed_pairs), integers(routed_pairs), integers(all ? s.experts + 1 : 0),
              integers(routed_pairs)};
    chosen = arena.take<bool>(all ? size.pairs : 0);
    query_source = integers(size.queries);
    query_position = integers(size.queries);
    rotated = elements_or(s.post_norm ? nullptr : kept.q, size.queries * size.query_width);
    attention = elements_or(kept.attention, size.queries * size.query_width);
    logsumexp = kept.logsumexp ? static_cast<char*>(kept.logsumexp) : arena.take(size.queries * s.heads, wide);
    keys = {integers(size.key_rows), integers(size.key_rows), integers(size.key_rows),
            integers(size.key_rows), integers(size.key_rows), integers(size.key_experts + 1)};
    first_late = integers(p.cache.x ? p.batch * s.experts : 0);
    const int64_t own = p.cache.k ? 0 : size.key_experts * size.tokens * size.key_width;
    own_k = elements_or(s.post_norm ? nullptr : kept.k, own);
    own_v = elements_or(kept.v, own);
    ones = elements(s.hidden);
    inverse_rms = arena.take(std::max(size.pairs, size.key_rows), wide);
    u = elements_or(s.post_norm ? nullptr : kept.behind, size.queries * s.hidden);

    const int64_t phase = arena.used();
    normed_x = elements(s.post_norm ? 0 : size.key_rows * s.hidden);
    k = elements_or(s.post_norm ? kept.k : nullptr, size.key_rows * size.key_width);
    k_other = elements(size.key_rows * size.key_width);
    k_rotated = s.post_norm && kept.k ? elements(size.key_rows * size.key_width) : k;
    v = elements(size.key_rows * size.key_width);
    q = elements_or(s.post_norm ? kept.q : nullptr, size.queries * size.query_width);
    arena.rewind(phase);
    normed = elements(size.queries * s.hidden);
    inner = elements(size.pairs * s.inner);
    const bool shown = p.hooks && p.hooks->wants(BlockPoint::kUp);
    gate = kept.gate || shown ? elements_or(kept.gate, size.pairs * s.inner) : nullptr;
    up = kept.gate || shown ? elements_or(kept.up, size.pairs * s.inner) : nullptr;
    out = elements_or(s.post_norm ? nullptr : kept.out, size.pairs * s.hidden);
    routed_out = elements(routed_pairs * s.hidden);
    mixture = elements(s.whole_block ? 0 : size.tokens * s.hidden);
    behind = !s.post_norm ? u : kept.behind ? static_cast<char*>(kept.behind) : s.whole_block ? out : mixture;
    ffn_out = s.post_norm && kept.out ? static_cast<char*>(kept.out) : out;
  }
};

}  // namespace micro_kernels::cpu
