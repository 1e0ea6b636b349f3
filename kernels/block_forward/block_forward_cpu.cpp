// The steps of a layer, one after the other, over one working memory. What can be computed at the same time stands in
// one list of products, because every list costs the threads one meeting.

#include <algorithm>
#include <cstring>
#include <vector>

#include "block_forward/buffers.h"
#include "block_forward/key_rows.h"
#include "block_forward/row_steps.h"
#include "micro_kernels/combine.h"
#include "micro_kernels/plan.h"
#include "micro_kernels/rope.h"
#include "micro_kernels/swiglu.h"

#define MICRO_RETURN_IF_FAILS(step) \
  if (const Status status = (step); status != Status::kOk) return status

namespace micro_kernels::cpu {
namespace {

class Layer {
 public:
  Layer(const BlockForwardParams& params, Arena arena, const ParallelFor& parallel_for)
      : p_(params), s_(params.shape), size_(params), m_(params, arena), element_(element_bytes(s_.dtype)) {
    parallel_ = [&parallel_for, regions = p_.regions](int64_t count, int64_t grain, const auto& body) {
      if (regions && count > grain) ++*regions;
      parallel_for(count, grain, body);
    };
    dispatch(s_.dtype,
             [&]<class T>() { std::fill_n(reinterpret_cast<T*>(m_.ones), s_.hidden, T(accumulator_t<T>(1))); });
  }

  Status run() { return s_.whole_block ? whole_block() : shared_attention(); }

 private:
  using Parts = std::vector<LinearPart>;

  static LinearPart product(const ConstRows& x, const Matrix& matrix, const Rows& y, int64_t rows, int64_t in,
                            int64_t out) {
    LinearPart part;
    part.x = x;
    part.matrix = matrix;
    part.y = y;
    part.rows = rows;
    part.in = in;
    part.out = out;
    return part;
  }

  // Plan rows of an attention: those of the experts, or all tokens for the one expert of a shared attention.
  struct Queries {
    const int32_t* tokens;
    const int32_t* offsets;
    int64_t rows;
  };

  // ---- two kinds of layers -----------------------------------------------------------------------------------------

  Status whole_block() {
    const bool eager = p_.cache.k && !p_.cache.x;
    Parts parts;
    add_router_in(p_.x, parts);
    if (eager) {
      MICRO_RETURN_IF_FAILS(normalise_inputs(nullptr));
      list_all_tokens(p_, nullptr, own_norms(), m_.keys);
      add_keys(eager_input(), parts);
    }
    MICRO_RETURN_IF_FAILS(multiply(parts));
    MICRO_RETURN_IF_FAILS(decide(p_.x));
    const Queries queries{m_.tokens, m_.offsets, m_.offsets[s_.experts]};
    parts.clear();
    if (p_.cache.x) {
      MICRO_RETURN_IF_FAILS(add_missing_keys(queries, parts));
    } else {
      if (!eager) {
        MICRO_RETURN_IF_FAILS(normalise_inputs(m_.offsets));
        list_all_tokens(p_, m_.offsets, own_norms(), m_.keys);
        add_keys(eager_input(), parts);
      }
      point_at_inputs(queries);
    }
    add_queries(queries, query_input(), parts);
    MICRO_RETURN_IF_FAILS(multiply(parts));
    MICRO_RETURN_IF_FAILS(finish_keys());
    MICRO_RETURN_IF_FAILS(attend(queries));
    MICRO_RETURN_IF_FAILS(leave_attention(queries));
    MICRO_RETURN_IF_FAILS(feed_forward({m_.feed_forward_input(s_), nullptr, s_.hidden}));
    return add_up_block(queries);
  }

  Status shared_attention() {
    for (int64_t t = 0; t < size_.tokens; ++t) m_.everyone[t] = static_cast<int32_t>(t);
    m_.whole[0] = 0;
    m_.whole[1] = static_cast<int32_t>(size_.tokens);
    const Queries queries{m_.everyone, m_.whole, size_.tokens};
    MICRO_RETURN_IF_FAILS(normalise_inputs(nullptr));
    list_all_tokens(p_, nullptr, own_norms(), m_.keys);
    Parts parts;
    add_keys(eager_input(), parts);
    point_at_inputs(queries);
    add_queries(queries, query_input(), parts);
    MICRO_RETURN_IF_FAILS(multiply(parts));
    MICRO_RETURN_IF_FAILS(finish_keys());
    MICRO_RETURN_IF_FAILS(attend(queries));
    MICRO_RETURN_IF_FAILS(leave_attention(queries));
    const char* n = m_.feed_forward_input(s_);
    parts.clear();
    add_router_in(n, parts);
    MICRO_RETURN_IF_FAILS(multiply(parts));
    MICRO_RETURN_IF_FAILS(decide(n));
    MICRO_RETURN_IF_FAILS(feed_forward({n, m_.tokens, s_.hidden}));
    return add_up_mixture();
  }

  // ---- the decision ------------------------------------------------------------------------------------------------

  bool runs_router() const { return !p_.route.rows || p_.raw; }
  bool folded() const { return s_.router_hidden == 0; }
  bool converts_router() const { return folded() && s_.dtype == DType::kBFloat16; }

  void add_router_in(const void* x, Parts& parts) const {
    if (!runs_router() || folded()) return;
    parts.push_back(product({x, nullptr, s_.hidden}, p_.weights.router_in, {m_.router_mid, nullptr, s_.router_hidden},
                            size_.tokens, s_.hidden, s_.router_hidden));
  }

  // Router logits, the decision, the plan.
  Status decide(const void* x) {
    RouteParams route_params = p_.route;
    route_params.tokens = size_.tokens;
    route_params.experts = s_.experts;
    route_params.dtype = folded() ? accumulator_of(s_.dtype) : s_.dtype;
    route_params.logits = p_.raw ? p_.raw : m_.logits;
    if (runs_router()) {
      void* logits = const_cast<void*>(route_params.logits);
      MICRO_RETURN_IF_FAILS(router_out(x, logits));
      MICRO_RETURN_IF_FAILS(
          show({BlockPoint::kRouter, logits, nullptr, nullptr, size_.tokens, s_.experts, route_params.dtype}));
    }
    if (converts_router()) route_params.weights = m_.wide_weights;
    MICRO_RETURN_IF_FAILS(route(route_params, parallel_));
    if (converts_router()) narrow(m_.wide_weights, p_.route.weights, size_.routed);
    if (!runs_all(p_)) return sort_pairs(p_.route.ids, p_.route.weights, p_.route.k, m_.plan());
    MICRO_RETURN_IF_FAILS(sort_pairs(p_.route.ids, p_.route.weights, p_.route.k, m_.routed));
    for (int64_t pair = 0; pair < size_.pairs; ++pair) m_.all_ids[pair] = static_cast<int32_t>(pair % s_.experts);
    MICRO_RETURN_IF_FAILS(sort_pairs(m_.all_ids, nullptr, s_.experts, m_.plan()));
    std::fill_n(m_.chosen, size_.pairs, false);
    for (int64_t n = 0; n < m_.routed.offsets[s_.experts]; ++n) m_.chosen[row_of_routed(n)] = true;
    return Status::kOk;
  }

  Status sort_pairs(const int32_t* ids, const void* weights, int64_t k, const PlanRows& to) {
    return plan({.ids = ids,
                 .weights = weights,
                 .mask = p_.real,
                 .tokens = to.tokens,
                 .experts = to.experts,
                 .offsets = to.offsets,
                 .inverse = to.inverse,
                 .token_count = size_.tokens,
                 .k = k,
                 .expert_count = s_.experts,
                 .dtype = s_.dtype},
                parallel_);
  }

  // Where every expert runs: the row at which the routing's row n is computed.
  int64_t row_of_routed(int64_t n) const { return m_.inverse[m_.routed.tokens[n] * s_.experts + m_.routed.experts[n]]; }

  Status router_out(const void* x, void* logits) {
    const int64_t in = folded() ? s_.hidden : s_.router_hidden;
    if (converts_router()) widen(x, m_.wide_x, size_.tokens * s_.hidden, parallel_);
    const void* input = converts_router() ? m_.wide_x : folded() ? x : m_.router_mid;
    const LinearPart part = product({input, nullptr, in}, p_.weights.router_out, {logits, nullptr, s_.experts},
                                    size_.tokens, in, s_.experts);
    return linear(&part, 1, folded() ? accumulator_of(s_.dtype) : s_.dtype, parallel_);
  }

  // ---- keys and values ---------------------------------------------------------------------------------------------

  // Every expert reads the input behind a norm of its own.
  bool own_norms() const { return s_.whole_block && p_.weights.input_norm && !s_.post_norm; }
  ConstRows eager_input() const { return {s_.post_norm ? p_.x : m_.normed_x, m_.keys.source, s_.hidden}; }

  // The input behind the experts' norms; with `offsets`, only of experts that have a row.
  Status normalise_inputs(const int32_t* offsets) {
    if (s_.post_norm) return Status::kOk;
    if (!offsets || !own_norms())
      return norm(p_.x, p_.weights.input_norm, nullptr, own_norms() ? s_.experts : 1, m_.normed_x, size_.tokens,
                  s_.hidden);
    for (int64_t e = 0; e < s_.experts; ++e) {
      if (offsets[e] == offsets[e + 1]) continue;
      MICRO_RETURN_IF_FAILS(norm(p_.x, gain_of(p_.weights.input_norm, e), nullptr, 1,
                                 m_.normed_x + e * size_.tokens * s_.hidden * element_, size_.tokens, s_.hidden));
    }
    return Status::kOk;
  }

  void add_keys(const ConstRows& x, Parts& parts) const {
    for (int64_t e = 0; e < size_.key_experts; ++e) {
      const int64_t first = m_.keys.offsets[e], rows = m_.keys.offsets[e + 1] - first;
      if (rows == 0) continue;
      LinearPart part = product({x.data, x.index + first, x.stride}, p_.weights.k[e],
                                {m_.k + first * size_.key_width * element_, nullptr, size_.key_width}, rows, s_.hidden,
                                size_.key_width);
      parts.push_back(part);
      part.matrix = p_.weights.v[e];
      part.y.data = m_.v + first * size_.key_width * element_;
      parts.push_back(part);
    }
  }

  // Lazy: the keys of this call's slots, and those that its experts have missed, join the product of the queries; a
  // long backlog is worked off before.
  Status add_missing_keys(const Queries& queries, Parts& parts) {
    store_inputs(p_);
    MissingKeys missing = missing_keys(p_, queries.tokens, queries.offsets);
    if (total_slots(missing.late) + total_slots(missing.now) > size_.key_rows) {
      for (const std::vector<SlotRange>& batch : in_batches(missing.late, size_.key_rows)) {
        MICRO_RETURN_IF_FAILS(add_key_ranges(batch, parts));
        MICRO_RETURN_IF_FAILS(multiply(parts));
        MICRO_RETURN_IF_FAILS(finish_keys());
        parts.clear();
      }
      missing.late.clear();
    }
    MICRO_RETURN_IF_FAILS(add_key_ranges(joined(missing.late, missing.now), parts));
    for (const SlotRange& range : missing.now)
      p_.cache.filled[range.batch * s_.experts + range.expert] = static_cast<int32_t>(range.end);
    for (int64_t n = 0; n < queries.rows; ++n) {
      const int64_t token = queries.tokens[n];
      m_.query_source[n] =
          m_.first_late[token / p_.slots * s_.experts + m_.experts[n]] + static_cast<int32_t>(token % p_.slots);
    }
    return Status::kOk;
  }

  Status add_key_ranges(const std::vector<SlotRange>& ranges, Parts& parts) {
    list_ranges(p_, ranges, !s_.post_norm, m_.keys, m_.first_late);
    if (s_.post_norm) {
      add_keys({p_.cache.x, m_.keys.source, s_.hidden}, parts);
      return Status::kOk;
    }
    int64_t row = 0;
    for (const SlotRange& range : ranges) {
      const char* x = static_cast<const char*>(p_.cache.x) +
                      (range.batch * p_.cache.x_batch_stride + range.begin * s_.hidden) * element_;
      const int64_t rows = range.end - range.begin;
      MICRO_RETURN_IF_FAILS(norm(x, gain_of(p_.weights.input_norm, range.expert), nullptr, 1,
                                 m_.normed_x + row * s_.hidden * element_, rows, s_.hidden));
      row += rows;
    }
    add_keys({m_.normed_x, m_.keys.source, s_.hidden}, parts);
    return Status::kOk;
  }

  // Norm (OLMo-2), rotation, and into the cache.
  Status finish_keys() {
    const int64_t rows = m_.keys.offsets[size_.key_experts];
    char *from = m_.k, *to = m_.k_other;
    if (s_.post_norm) {
      MICRO_RETURN_IF_FAILS(
          norm(from, p_.weights.k_norm, m_.keys.expert, size_.key_experts, to, rows, size_.key_width));
      from = m_.k_other, to = m_.k_rotated;
    }
    MICRO_RETURN_IF_FAILS(rotate(from, m_.keys.position, s_.groups, to, rows));
    StoreHeads store{.x = to,
                     .batch = m_.keys.batch,
                     .expert = m_.keys.expert,
                     .slot = m_.keys.slot,
                     .store = stored_keys(),
                     .strides = key_strides(p_.cache.k_strides),
                     .rows = rows,
                     .groups = s_.groups,
                     .head_dim = s_.head_dim,
                     .dtype = s_.dtype};
    store_heads(store, parallel_);
    store.x = m_.v;
    store.store = stored_values();
    store.strides = key_strides(p_.cache.v_strides);
    store_heads(store, parallel_);
    return Status::kOk;
  }

  void* stored_keys() const { return p_.cache.k ? p_.cache.k : m_.own_k; }
  void* stored_values() const { return p_.cache.k ? p_.cache.v : m_.own_v; }
  HeadStrides key_strides(const HeadStrides& cached) const {
    if (p_.cache.k) return cached;
    const int64_t group = p_.slots * s_.head_dim;
    return {size_.key_experts * s_.groups * group, s_.groups * group, group, s_.head_dim};
  }

  // ---- queries and attention ---------------------------------------------------------------------------------------

  void point_at_inputs(const Queries& queries) {
    for (int64_t n = 0; n < queries.rows; ++n)
      m_.query_source[n] = queries.tokens[n] + static_cast<int32_t>(own_norms() ? m_.experts[n] * size_.tokens : 0);
  }

  ConstRows query_input() const {
    return s_.post_norm ? ConstRows{p_.x, nullptr, s_.hidden} : ConstRows{m_.normed_x, m_.query_source, s_.hidden};
  }

  void add_queries(const Queries& queries, const ConstRows& x, Parts& parts) const {
    const int32_t* index = x.index ? x.index : queries.tokens;
    each_expert(queries.offsets, size_.key_experts, [&](int64_t e, int64_t first, int64_t rows) {
      parts.push_back(product({x.data, index + first, x.stride}, p_.weights.q[e],
                              {m_.q + first * size_.query_width * element_, nullptr, size_.query_width}, rows,
                              s_.hidden, size_.query_width));
    });
  }

  Status attend(const Queries& queries) {
    for (int64_t n = 0; n < queries.rows; ++n)
      m_.query_position[n] = p_.position ? p_.position[queries.tokens[n]] : queries.tokens[n];
    const char* q = m_.q;
    if (s_.post_norm) {
      MICRO_RETURN_IF_FAILS(norm(q, p_.weights.q_norm, experts_of(queries), size_.key_experts, m_.attention,
                                 queries.rows, size_.query_width));
      q = m_.attention;
    }
    MICRO_RETURN_IF_FAILS(rotate(q, m_.query_position, s_.heads, m_.rotated, queries.rows));
    return expert_attention({.shape = {.tokens = queries.tokens,
                                       .offsets = queries.offsets,
                                       .mask = p_.mask,
                                       .mask_kind = p_.mask_kind,
                                       .masks = p_.masks,
                                       .rows = queries.rows,
                                       .heads = s_.heads,
                                       .groups = s_.groups,
                                       .head_dim = s_.head_dim,
                                       .batch = p_.batch,
                                       .experts = size_.key_experts,
                                       .slots = p_.slots,
                                       .keys = p_.keys,
                                       .start = p_.start,
                                       .starts = p_.starts,
                                       .scale = p_.scale,
                                       .dtype = s_.dtype},
                             .q = m_.rotated,
                             .k = stored_keys(),
                             .v = stored_values(),
                             .k_strides = key_strides(p_.cache.k_strides),
                             .v_strides = key_strides(p_.cache.v_strides),
                             .out = m_.attention,
                             .logsumexp = m_.logsumexp},
                            parallel_);
  }

  // Output matrix and residual: u, and without post_norm the norm of u.
  Status leave_attention(const Queries& queries) {
    MICRO_RETURN_IF_FAILS(show(BlockPoint::kHeads, m_.attention, queries, size_.query_width));
    const bool apart = !s_.post_norm && wants(BlockPoint::kAttention);
    Parts parts;
    each_expert(queries.offsets, size_.key_experts, [&](int64_t e, int64_t first, int64_t rows) {
      LinearPart part =
          product({m_.attention + first * size_.query_width * element_, nullptr, size_.query_width}, p_.weights.o[e],
                  {m_.behind + first * s_.hidden * element_, nullptr, s_.hidden}, rows, size_.query_width, s_.hidden);
      if (!s_.post_norm && !apart) part.residual = {p_.x, queries.tokens + first, s_.hidden};
      parts.push_back(part);
    });
    MICRO_RETURN_IF_FAILS(multiply(parts));
    if (apart) {
      MICRO_RETURN_IF_FAILS(show(BlockPoint::kAttention, m_.behind, queries, s_.hidden));
      add({.a = p_.x, .a_index = queries.tokens, .b = m_.behind, .y = m_.behind, .rows = queries.rows});
    }
    MICRO_RETURN_IF_FAILS(norm(m_.behind, p_.weights.post_attention_norm, experts_of(queries), size_.key_experts,
                               m_.normed, queries.rows, s_.hidden));
    if (!s_.post_norm) return Status::kOk;
    MICRO_RETURN_IF_FAILS(show(BlockPoint::kAttention, m_.normed, queries, s_.hidden));
    add({.a = p_.x, .a_index = queries.tokens, .b = m_.normed, .y = m_.u, .rows = queries.rows});
    return Status::kOk;
  }

  // ---- feed-forward and what follows -------------------------------------------------------------------------------

  bool one_expert() const { return p_.route.k == 1; }
  bool keeps_gate() const { return m_.gate != nullptr; }
  bool keeps_out() const { return p_.saved && p_.saved->out; }
  // The one expert's output goes to its token as soon as it is made.
  bool at_once() const {
    return one_expert() && !shows_outputs() && !(s_.whole_block && (s_.post_norm || keeps_out()));
  }
  bool shows_outputs() const { return runs_all(p_) || wants(BlockPoint::kFfn) || wants(BlockPoint::kBlockOutput); }

  // The experts' feed-forward parts into `ffn_out`, or at once to where they belong.
  Status feed_forward(const ConstRows& x) {
    Parts parts;
    each_expert(m_.offsets, s_.experts, [&](int64_t e, int64_t first, int64_t rows) {
      LinearPart part = product({x.data, x.index, x.stride}, p_.weights.gate[e],
                                {m_.inner + first * s_.inner * element_, nullptr, s_.inner}, rows, s_.hidden, s_.inner);
      if (x.index)
        part.x.index += first;
      else
        part.x.data = static_cast<const char*>(x.data) + first * s_.hidden * element_;
      if (keeps_gate()) {
        part.y.data = m_.gate + first * s_.inner * element_;
        parts.push_back(part);
        part.matrix = p_.weights.up[e];
        part.y.data = m_.up + first * s_.inner * element_;
      } else {
        part.up = p_.weights.up[e];
      }
      parts.push_back(part);
    });
    MICRO_RETURN_IF_FAILS(multiply(parts));
    if (keeps_gate()) {
      MICRO_RETURN_IF_FAILS(show(BlockPoint::kUp, m_.up, s_.inner));
      MICRO_RETURN_IF_FAILS(gate_kept());
    }
    MICRO_RETURN_IF_FAILS(show(BlockPoint::kUnits, m_.inner, s_.inner));
    parts.clear();
    each_expert(m_.offsets, s_.experts, [&](int64_t e, int64_t first, int64_t rows) {
      LinearPart part =
          product({m_.inner + first * s_.inner * element_, nullptr, s_.inner}, p_.weights.down[e],
                  {m_.ffn_out + first * s_.hidden * element_, nullptr, s_.hidden}, rows, s_.inner, s_.hidden);
      if (s_.whole_block && !s_.post_norm && !shows_outputs())
        part.residual = {m_.u + first * s_.hidden * element_, nullptr, s_.hidden};
      if (at_once()) {
        part.scale = {p_.route.weights, m_.tokens + first, 1};
        part.y = {s_.whole_block ? p_.y : m_.mixture, m_.tokens + first, s_.hidden};
      }
      parts.push_back(part);
    });
    return multiply(parts);
  }

  Status gate_kept() {
    return swiglu(
        {.gate = m_.gate, .up = m_.up, .y = m_.inner, .count = m_.offsets[s_.experts] * s_.inner, .dtype = s_.dtype},
        parallel_);
  }

  // y = sum over a token's experts of weight * (u + feed-forward).
  Status add_up_block(const Queries& queries) {
    if (shows_outputs()) return add_up_shown(queries);
    if (s_.post_norm) {
      MICRO_RETURN_IF_FAILS(
          norm(m_.ffn_out, p_.weights.post_ffn_norm, m_.experts, s_.experts, m_.normed, queries.rows, s_.hidden));
      AddRows sum{.a = m_.u, .b = m_.normed, .y = m_.out, .rows = queries.rows};
      if (one_expert()) {
        sum.scale = p_.route.weights;
        sum.y = p_.y;
        sum.y_index = m_.tokens;
      }
      add(sum);
    }
    return one_expert() && (s_.post_norm || !keeps_out()) ? clear_idle(p_.y) : combine_experts(p_.y);
  }

  // The same, one step after the other.
  Status add_up_shown(const Queries& queries) {
    char* ffn = m_.ffn_out;
    if (s_.post_norm) {
      MICRO_RETURN_IF_FAILS(
          norm(ffn, p_.weights.post_ffn_norm, m_.experts, s_.experts, m_.normed, queries.rows, s_.hidden));
      ffn = m_.normed;
    }
    MICRO_RETURN_IF_FAILS(show(BlockPoint::kFfn, ffn, s_.hidden));
    add({.a = m_.u, .b = ffn, .y = m_.out, .rows = queries.rows});
    MICRO_RETURN_IF_FAILS(show(BlockPoint::kBlockOutput, m_.out, s_.hidden));
    return combine_experts(p_.y);
  }

  // y = u + sum over a token's experts of weight * feed-forward, behind a norm with post_norm.
  Status add_up_mixture() {
    MICRO_RETURN_IF_FAILS(show(BlockPoint::kFfn, m_.out, s_.hidden));
    MICRO_RETURN_IF_FAILS(show(BlockPoint::kBlockOutput, m_.out, s_.hidden));
    MICRO_RETURN_IF_FAILS(at_once() ? clear_idle(m_.mixture) : combine_experts(m_.mixture));
    const char* mixture = m_.mixture;
    if (s_.post_norm) {
      MICRO_RETURN_IF_FAILS(norm(mixture, p_.weights.post_ffn_norm, nullptr, 1, m_.normed, size_.tokens, s_.hidden));
      mixture = m_.normed;
    }
    add({.a = m_.u, .b = mixture, .y = p_.y, .rows = size_.tokens});
    return Status::kOk;
  }

  Status clear_idle(void* y) {
    const int64_t active = m_.offsets[s_.experts];
    clear_rows(y, m_.tokens + active, size_.pairs - active, s_.hidden, s_.dtype);
    return Status::kOk;
  }

  Status combine_experts(void* y) {
    const int64_t bytes = s_.hidden * element_;
    if (runs_all(p_))
      for (int64_t n = 0; n < m_.routed.offsets[s_.experts]; ++n)
        std::memcpy(m_.routed_out + n * bytes, m_.out + row_of_routed(n) * bytes, static_cast<size_t>(bytes));
    const PlanRows rows = runs_all(p_) ? m_.routed : m_.plan();
    return combine({.y = runs_all(p_) ? m_.routed_out : m_.out,
                    .weights = p_.route.weights,
                    .experts = rows.experts,
                    .offsets = rows.offsets,
                    .inverse = rows.inverse,
                    .out = y,
                    .token_count = size_.tokens,
                    .k = p_.route.k,
                    .hidden = s_.hidden,
                    .expert_count = s_.experts,
                    .dtype = s_.dtype},
                   parallel_);
  }

  // ---- rows that a caller wants to see ------------------------------------------------------------------------------

  bool wants(BlockPoint point) const { return p_.hooks && p_.hooks->wants(point); }
  Status show(const BlockRows& rows) { return wants(rows.point) ? p_.hooks->meet(rows) : Status::kOk; }

  // Rows of the plan.
  Status show(BlockPoint point, void* rows, int64_t width) {
    const bool* chosen = runs_all(p_) ? m_.chosen : nullptr;
    return show({point, rows, m_.tokens, m_.experts, m_.offsets[s_.experts], width, s_.dtype, chosen});
  }

  // Rows of the plan, or of all tokens.
  Status show(BlockPoint point, void* rows, const Queries&, int64_t width) {
    if (s_.whole_block) return show(point, rows, width);
    return show({point, rows, nullptr, nullptr, size_.tokens, width, s_.dtype});
  }

  // ---- launchers with what all calls share -------------------------------------------------------------------------

  // A missing gain is 1. Without `expert` and with several experts, every expert reads x (a copy each).
  Status norm(const void* x, const void* gain, const int32_t* expert, int64_t experts, void* y, int64_t rows,
              int64_t width) {
    if (rows == 0) return Status::kOk;
    return rms_norm({.x = x,
                     .gain = gain ? gain : m_.ones,
                     .expert = gain ? expert : nullptr,
                     .y = y,
                     .inverse_rms = m_.inverse_rms,
                     .rows = rows,
                     .copies = expert ? 1 : experts,
                     .rows_per_expert = rows,
                     .hidden = width,
                     .experts = gain ? experts : 1,
                     .eps = s_.eps,
                     .rounding = s_.rounding,
                     .dtype = s_.dtype},
                    parallel_);
  }

  Status rotate(const void* x, const int32_t* positions, int64_t heads, void* y, int64_t rows) {
    return rope({.x = x,
                 .cos = p_.cos,
                 .sin = p_.sin,
                 .tokens = positions,
                 .y = y,
                 .rows = rows,
                 .positions = p_.positions,
                 .heads = heads,
                 .head_dim = s_.head_dim,
                 .direction = RopeDirection::kForward,
                 .dtype = s_.dtype},
                parallel_);
  }

  void add(AddRows sum) {
    sum.width = s_.hidden;
    sum.dtype = s_.dtype;
    add_rows(sum, parallel_);
  }

  Status multiply(const Parts& parts) {
    if (parts.empty()) return Status::kOk;
    return linear(parts.data(), static_cast<int64_t>(parts.size()), s_.dtype, parallel_);
  }

  template <class Body>
  void each_expert(const int32_t* offsets, int64_t experts, const Body& body) const {
    for (int64_t e = 0; e < experts; ++e)
      if (offsets[e] < offsets[e + 1]) body(e, offsets[e], offsets[e + 1] - offsets[e]);
  }

  const int32_t* experts_of(const Queries&) const { return s_.whole_block ? m_.experts : nullptr; }
  const void* gain_of(const void* gains, int64_t e) const {
    return gains ? static_cast<const char*>(gains) + e * s_.hidden * element_ : nullptr;
  }

  const BlockForwardParams& p_;
  const BlockShape& s_;
  Sizes size_;
  Buffers m_;
  int64_t element_;
  ParallelFor parallel_;
};

}  // namespace

int64_t block_forward_workspace(const BlockForwardParams& params) {
  Arena arena(nullptr);
  Buffers measured(params, arena);
  return arena.peak();
}

Status block_forward(const BlockForwardParams& params, char* workspace, const ParallelFor& parallel_for) {
  if (params.batch * params.slots == 0) return Status::kOk;
  return Layer(params, Arena(workspace), parallel_for).run();
}

}  // namespace micro_kernels::cpu
