// The backward pass of a layer, step by step against the direction of block_forward. Sums of gradients are formed in
// the order in which autograd forms them for the separate operators, each rounded to the element type.

#include <algorithm>
#include <utility>
#include <vector>

#include "block_forward/row_steps.h"
#include "block_train/backward_steps.h"
#include "micro_kernels/combine.h"
#include "micro_kernels/permute.h"
#include "micro_kernels/swiglu.h"

namespace micro_kernels::cpu {
namespace {

constexpr double kEpsilon = 1e-9;  // of the renormalisation, as in route

class BackwardPass : BackwardSteps {
 public:
  BackwardPass(const BlockTrainBackwardParams& p, Arena arena, const ParallelFor& parallel_for)
      : BackwardSteps(p, arena, parallel_for) {}

  Status run() {
    const bool through_weights = p_.grad_y && decision_learns() && !weights_are_constant();
    if (active_ == 0) {
      clear_experts();
    } else if (p_.grad_y && (needs_.any || through_weights)) {
      MICRO_RETURN_IF_FAILS(feed_forward(through_weights));
      if (needs_.u) MICRO_RETURN_IF_FAILS(output_matrix());
      if (needs_.attention) MICRO_RETURN_IF_FAILS(attention());
      if (needs_.attention) MICRO_RETURN_IF_FAILS(inputs());
    }
    return router(through_weights && active_ > 0);
  }

 private:
  // ---- feed-forward part -------------------------------------------------------------------------------------------

  // Down to the gradient of u, in grad_out.
  Status feed_forward(bool through_weights) {
    const bool wants_out = through_weights || (s_.post_norm && needs_.any);
    const bool makes_out = wants_out && !saved_.out;
    const bool wants_inner = makes_out || (needs_.any && g_.down);
    MICRO_RETURN_IF_FAILS(norm_behind_attention());
    if ((wants_inner || (needs_.any && needs_.gated)) && !saved_.gate) MICRO_RETURN_IF_FAILS(make_gate_and_up());
    if (wants_inner) MICRO_RETURN_IF_FAILS(swiglu({gate(), up(), m_.inner, active_ * s_.inner, s_.dtype}, parallel_));
    if (makes_out) MICRO_RETURN_IF_FAILS(make_out());
    if (s_.post_norm && wants_out)
      MICRO_RETURN_IF_FAILS(norm(ffn_out(), p_.weights.post_ffn_norm, m_.normed, m_.inverse_out, s_.hidden));
    if (s_.post_norm && through_weights) add(m_.u, m_.normed, m_.out, active_);
    MICRO_RETURN_IF_FAILS(split_to_experts(through_weights));
    return needs_.any ? last_matrix() : Status::kOk;
  }

  // What goes into gate and up: the norm of u; with post_norm u itself, the sum of the input and a norm.
  Status norm_behind_attention() {
    MICRO_RETURN_IF_FAILS(norm(saved_.behind, p_.weights.post_attention_norm, m_.normed, m_.inverse_input, s_.hidden));
    if (s_.post_norm)
      add_rows({.a = p_.x,
                .a_index = saved_.tokens,
                .b = m_.normed,
                .y = m_.u,
                .rows = active_,
                .width = s_.hidden,
                .dtype = s_.dtype},
               parallel_);
    return Status::kOk;
  }

  const void* u() const { return s_.post_norm ? m_.u : saved_.behind; }
  const char* ffn_input() const { return s_.post_norm ? m_.u : m_.normed; }
  const void* gate() const { return saved_.gate ? saved_.gate : m_.gate; }
  const void* up() const { return saved_.gate ? saved_.up : m_.up; }
  const void* ffn_out() const { return saved_.out ? saved_.out : m_.ffn_out; }

  Status make_gate_and_up() {
    std::vector<LinearPart> parts;
    each_used([&](int64_t e, int64_t first, int64_t rows) {
      parts.push_back(product(ffn_input(), p_.weights.gate[e], m_.gate, first, rows, s_.hidden, s_.inner));
      parts.push_back(product(ffn_input(), p_.weights.up[e], m_.up, first, rows, s_.hidden, s_.inner));
    });
    return linear(parts.data(), count(parts), s_.dtype, parallel_);
  }

  Status make_out() {
    std::vector<LinearPart> parts;
    each_used([&](int64_t e, int64_t first, int64_t rows) {
      parts.push_back(product(m_.inner, p_.weights.down[e], m_.ffn_out, first, rows, s_.inner, s_.hidden));
      if (!s_.post_norm) parts.back().residual = {at(saved_.behind, first, s_.hidden), nullptr, s_.hidden};
    });
    return linear(parts.data(), count(parts), s_.dtype, parallel_);
  }

  Status split_to_experts(bool through_weights) {
    return combine_backward({.grad = p_.grad_y,
                             .y = s_.post_norm ? m_.out : ffn_out(),
                             .weights = p_.routing,
                             .offsets = saved_.offsets,
                             .inverse = saved_.inverse,
                             .grad_y = needs_.any ? m_.grad_out : nullptr,
                             .grad_weights = through_weights ? m_.grad_weights : nullptr,
                             .token_count = size_.tokens,
                             .k = p_.route.k,
                             .hidden = s_.hidden,
                             .expert_count = s_.experts,
                             .dtype = s_.dtype},
                            parallel_);
  }

  Status last_matrix() {
    const char* grad = m_.grad_out;
    if (s_.post_norm) {
      const bool inside = needs_.gated || g_.down;
      MICRO_RETURN_IF_FAILS(norm_backward(grad, ffn_out(), p_.weights.post_ffn_norm, m_.inverse_out,
                                          inside ? m_.grad_ffn : nullptr, g_.post_ffn_norm, s_.hidden));
      grad = m_.grad_ffn;
    }
    if (g_.down)
      MICRO_RETURN_IF_FAILS(weight_gradient(grad, {m_.inner, nullptr, s_.inner}, g_.down, s_.inner, s_.hidden));
    if (!needs_.gated) return Status::kOk;
    MICRO_RETURN_IF_FAILS(input_gradient(grad, p_.weights.down, m_.grad_inner, s_.inner, s_.hidden));
    char *grad_gate = m_.inner, *grad_up = m_.grad_up_rows;
    MICRO_RETURN_IF_FAILS(swiglu_backward({.grad_y = m_.grad_inner,
                                           .gate = gate(),
                                           .up = up(),
                                           .grad_gate = grad_gate,
                                           .grad_up = grad_up,
                                           .count = active_ * s_.inner,
                                           .dtype = s_.dtype},
                                          parallel_));
    const ConstRows input{ffn_input(), nullptr, s_.hidden};
    if (g_.gate) MICRO_RETURN_IF_FAILS(weight_gradient(grad_gate, input, g_.gate, s_.hidden, s_.inner));
    if (g_.up) MICRO_RETURN_IF_FAILS(weight_gradient(grad_up, input, g_.up, s_.hidden, s_.inner));
    if (!needs_.ffn_input) return Status::kOk;
    MICRO_RETURN_IF_FAILS(input_gradient(grad_gate, p_.weights.gate, m_.grad_normed, s_.hidden, s_.inner));
    MICRO_RETURN_IF_FAILS(input_gradient(grad_up, p_.weights.up, m_.grad_normed_up, s_.hidden, s_.inner));
    return add_up_u();
  }

  // u is read by the residual, and by gate and up, here behind a norm.
  Status add_up_u() {
    if (s_.post_norm) {
      add(m_.grad_out, m_.grad_normed_up, m_.grad_out, active_);
      add(m_.grad_out, m_.grad_normed, m_.grad_out, active_);
      return Status::kOk;
    }
    add(m_.grad_normed_up, m_.grad_normed, m_.grad_normed, active_);
    MICRO_RETURN_IF_FAILS(norm_backward(m_.grad_normed, u(), p_.weights.post_attention_norm, m_.inverse_input,
                                        needs_.u ? m_.grad_normed_up : nullptr, g_.post_attention_norm, s_.hidden));
    if (needs_.u) add(m_.grad_out, m_.grad_normed_up, m_.grad_out, active_);
    return Status::kOk;
  }

  // ---- attention ---------------------------------------------------------------------------------------------------

  Status output_matrix() {
    const char* grad = m_.grad_out;
    if (s_.post_norm) {
      const bool inside = needs_.attention || g_.o;
      MICRO_RETURN_IF_FAILS(norm_backward(grad, saved_.behind, p_.weights.post_attention_norm, m_.inverse_input,
                                          inside ? m_.grad_behind : nullptr, g_.post_attention_norm, s_.hidden));
      grad = m_.grad_behind;
    }
    if (g_.o)
      MICRO_RETURN_IF_FAILS(
          weight_gradient(grad, {saved_.attention, nullptr, size_.query_width}, g_.o, size_.query_width, s_.hidden));
    if (!needs_.attention) return Status::kOk;
    return input_gradient(grad, p_.weights.o, m_.grad_attention, size_.query_width, s_.hidden);
  }

  // Gradients of what the matrices of queries, keys and values give: grad_q, grad_k and grad_v.
  Status attention() {
    if (s_.post_norm) MICRO_RETURN_IF_FAILS(make_queries_and_keys());
    const int64_t group = p_.slots * s_.head_dim;
    const HeadStrides stored{s_.experts * s_.groups * group, s_.groups * group, group, s_.head_dim};
    const HeadStrides rows{p_.slots * size_.key_width, size_.tokens * size_.key_width, s_.head_dim, size_.key_width};
    MICRO_RETURN_IF_FAILS(expert_attention_backward({.shape = {.tokens = saved_.tokens,
                                                               .offsets = saved_.offsets,
                                                               .mask = p_.mask,
                                                               .mask_kind = p_.mask_kind,
                                                               .masks = p_.masks,
                                                               .rows = active_,
                                                               .heads = s_.heads,
                                                               .groups = s_.groups,
                                                               .head_dim = s_.head_dim,
                                                               .batch = p_.batch,
                                                               .experts = s_.experts,
                                                               .slots = p_.slots,
                                                               .keys = p_.slots,
                                                               .start = 0,
                                                               .starts = nullptr,
                                                               .scale = p_.scale,
                                                               .dtype = s_.dtype},
                                                     .grad_out = m_.grad_attention,
                                                     .q = s_.post_norm ? m_.rotated_q : saved_.q,
                                                     .k = s_.post_norm ? m_.rotated_k : saved_.k,
                                                     .v = saved_.v,
                                                     .out = saved_.attention,
                                                     .logsumexp = saved_.logsumexp,
                                                     .k_strides = s_.post_norm ? rows : stored,
                                                     .v_strides = stored,
                                                     .grad_q = needs_.q ? m_.turned_q : nullptr,
                                                     .grad_k = needs_.k ? m_.turned_k : nullptr,
                                                     .grad_v = needs_.v ? m_.grad_v : nullptr,
                                                     .grad_k_strides = rows,
                                                     .grad_v_strides = rows},
                                                    parallel_));
    if (needs_.q) MICRO_RETURN_IF_FAILS(queries_backward());
    if (needs_.k) MICRO_RETURN_IF_FAILS(keys_backward());
    return Status::kOk;
  }

  // Norms in front of the rotation: queries and keys anew, keys in rows [E, T].
  Status make_queries_and_keys() {
    MICRO_RETURN_IF_FAILS(norm(saved_.q, p_.weights.q_norm, m_.normed_rows, m_.inverse_q, size_.query_width));
    MICRO_RETURN_IF_FAILS(
        rotate(m_.normed_rows, saved_.tokens, s_.heads, m_.rotated_q, active_, RopeDirection::kForward));
    return each_slice([&](int64_t slice, int64_t e) {
      MICRO_RETURN_IF_FAILS(rms_norm({.x = at(saved_.k, slice * size_.tokens, size_.key_width),
                                      .gain = at(p_.weights.k_norm, e, size_.key_width),
                                      .expert = nullptr,
                                      .y = m_.normed_rows,
                                      .inverse_rms = wide_at(m_.inverse_k, slice * size_.tokens),
                                      .rows = size_.tokens,
                                      .copies = 1,
                                      .rows_per_expert = size_.tokens,
                                      .hidden = size_.key_width,
                                      .experts = 1,
                                      .eps = s_.eps,
                                      .rounding = s_.rounding,
                                      .dtype = s_.dtype},
                                     parallel_));
      return rotate(m_.normed_rows, nullptr, s_.groups, at(m_.rotated_k, e * size_.tokens, size_.key_width),
                    size_.tokens, RopeDirection::kForward);
    });
  }

  Status queries_backward() {
    MICRO_RETURN_IF_FAILS(rotate(m_.turned_q, saved_.tokens, s_.heads, m_.grad_q, active_, RopeDirection::kBackward));
    if (!s_.post_norm) return Status::kOk;
    const bool inside = needs_.inputs || g_.q;
    std::swap(m_.turned_q, m_.grad_q);
    return norm_backward(m_.turned_q, saved_.q, p_.weights.q_norm, m_.inverse_q, inside ? m_.grad_q : nullptr,
                         g_.q_norm, size_.query_width);
  }

  Status keys_backward() {
    MICRO_RETURN_IF_FAILS(rotate(m_.turned_k, nullptr, s_.groups, m_.grad_k, size_.key_rows, RopeDirection::kBackward));
    if (!s_.post_norm) return Status::kOk;
    const bool inside = needs_.inputs || g_.k;
    std::swap(m_.turned_k, m_.grad_k);
    clear_wide(m_.gains, s_.experts * size_.key_width);
    MICRO_RETURN_IF_FAILS(each_slice([&](int64_t slice, int64_t e) {
      return rms_norm_backward({.grad_y = at(m_.turned_k, e * size_.tokens, size_.key_width),
                                .x = at(saved_.k, slice * size_.tokens, size_.key_width),
                                .gain = at(p_.weights.k_norm, e, size_.key_width),
                                .expert = nullptr,
                                .inverse_rms = wide_at(m_.inverse_k, slice * size_.tokens),
                                .grad_x = inside ? at(m_.grad_k, e * size_.tokens, size_.key_width) : nullptr,
                                .grad_gain = g_.k_norm ? wide_at(m_.gains, e * size_.key_width) : nullptr,
                                .rows = size_.tokens,
                                .copies = 1,
                                .rows_per_expert = size_.tokens,
                                .hidden = size_.key_width,
                                .experts = 1,
                                .dtype = s_.dtype},
                               parallel_);
    }));
    if (g_.k_norm) round(m_.gains, g_.k_norm, s_.experts * size_.key_width);
    return Status::kOk;
  }

  // ---- what queries, keys and values are made of -------------------------------------------------------------------

  Status inputs() {
    if (!s_.post_norm) MICRO_RETURN_IF_FAILS(normalise_inputs());
    MICRO_RETURN_IF_FAILS(input_weights());
    if (!needs_.inputs) return Status::kOk;
    MICRO_RETURN_IF_FAILS(input_gradient(m_.grad_q, p_.weights.q, s_.post_norm ? m_.grad_gathered : m_.grad_rows,
                                         s_.hidden, size_.query_width));
    MICRO_RETURN_IF_FAILS(s_.post_norm ? raw_inputs_backward() : normed_inputs_backward());
    if (!g_.x) return Status::kOk;
    add(m_.grad_out, m_.grad_gathered, m_.grad_gathered, active_);
    MICRO_RETURN_IF_FAILS(permute_backward({.grad_y = m_.grad_gathered,
                                            .offsets = saved_.offsets,
                                            .inverse = saved_.inverse,
                                            .grad_x = m_.grad_x_other,
                                            .token_count = size_.tokens,
                                            .k = p_.route.k,
                                            .hidden = s_.hidden,
                                            .experts = s_.experts,
                                            .dtype = s_.dtype},
                                           parallel_));
    add(m_.grad_x, m_.grad_x_other, g_.x, size_.tokens);
    return Status::kOk;
  }

  // The input behind the norms of the experts that are used, one slice each.
  Status normalise_inputs() {
    MICRO_RETURN_IF_FAILS(each_slice([&](int64_t slice, int64_t e) {
      std::fill_n(m_.slice_expert + slice * size_.tokens, size_.tokens, static_cast<int32_t>(e));
      for (int64_t n = saved_.offsets[e]; n < saved_.offsets[e + 1]; ++n)
        m_.source[n] = static_cast<int32_t>(slice * size_.tokens) + saved_.tokens[n];
      return Status::kOk;
    }));
    return rms_norm({.x = p_.x,
                     .gain = p_.weights.input_norm,
                     .expert = m_.slice_expert,
                     .y = m_.normed_x,
                     .inverse_rms = m_.inverse_x,
                     .rows = size_.tokens,
                     .copies = slices(),
                     .rows_per_expert = size_.tokens,
                     .hidden = s_.hidden,
                     .experts = s_.experts,
                     .eps = s_.eps,
                     .rounding = s_.rounding,
                     .dtype = s_.dtype},
                    parallel_);
  }

  Status input_weights() {
    if (g_.q) {
      const ConstRows rows =
          s_.post_norm ? ConstRows{p_.x, saved_.tokens, s_.hidden} : ConstRows{m_.normed_x, m_.source, s_.hidden};
      MICRO_RETURN_IF_FAILS(weight_gradient(m_.grad_q, rows, g_.q, s_.hidden, size_.query_width));
    }
    std::vector<LinearGradWeightPart> parts;
    const auto push = [&](const char* grad, void* grad_weight) {
      for (int64_t e = 0, slice = 0; grad_weight && e < s_.experts; ++e) {
        const bool used = saved_.offsets[e] < saved_.offsets[e + 1];
        const void* x = s_.post_norm ? p_.x : at(m_.normed_x, slice * size_.tokens, s_.hidden);
        parts.push_back({.grad_y = {at(grad, e * size_.tokens, size_.key_width), nullptr, size_.key_width},
                         .x = {x, nullptr, s_.hidden},
                         .grad_weight = at(grad_weight, e * size_.key_width, s_.hidden),
                         .rows = used ? size_.tokens : 0,
                         .in = s_.hidden,
                         .out = size_.key_width,
                         .accumulate = false});
        slice += used;
      }
    };
    push(m_.grad_k, g_.k);
    push(m_.grad_v, g_.v);
    return linear_grad_weight(parts.data(), count(parts), s_.dtype, parallel_);
  }

  // Through the norms of the queries' rows and of the keys' and values'.
  Status normed_inputs_backward() {
    MICRO_RETURN_IF_FAILS(permute({.x = p_.x,
                                   .tokens = saved_.tokens,
                                   .offsets = saved_.offsets,
                                   .y = m_.gathered,
                                   .token_count = size_.tokens,
                                   .rows = active_,
                                   .hidden = s_.hidden,
                                   .experts = s_.experts,
                                   .dtype = s_.dtype},
                                  parallel_));
    dispatch(s_.dtype, [&]<class T>() {
      using Acc = accumulator_t<T>;
      for (int64_t n = 0; n < active_; ++n)
        reinterpret_cast<Acc*>(m_.inverse_gathered)[n] = reinterpret_cast<const Acc*>(m_.inverse_x)[saved_.tokens[n]];
    });
    MICRO_RETURN_IF_FAILS(norm_backward(m_.grad_rows, m_.gathered, p_.weights.input_norm, m_.inverse_gathered,
                                        g_.x ? m_.grad_gathered : nullptr, g_.input_norm, s_.hidden));
    std::vector<LinearSource> sources;
    for (const auto& [grad, matrices] : {std::pair{m_.grad_v, p_.weights.v}, {m_.grad_k, p_.weights.k}})
      for (const int64_t e : used_) sources.push_back(key_source(grad, matrices, e));
    std::vector<LinearGradXPart> parts;
    for (int64_t i = 0; i < count(sources); ++i)
      parts.push_back(
          {.sources = &sources[i],
           .source_count = 1,
           .grad_x = {at(i < slices() ? m_.grad_values : m_.grad_keys, i % slices() * size_.tokens, s_.hidden), nullptr,
                      s_.hidden},
           .rows = size_.tokens,
           .in = s_.hidden,
           .out = size_.key_width});
    MICRO_RETURN_IF_FAILS(linear_grad_x(parts.data(), count(parts), s_.dtype, parallel_));
    add(m_.grad_values, m_.grad_keys, m_.grad_keys, slices() * size_.tokens);
    MICRO_RETURN_IF_FAILS(rms_norm_backward({.grad_y = m_.grad_keys,
                                             .x = p_.x,
                                             .gain = p_.weights.input_norm,
                                             .expert = m_.slice_expert,
                                             .inverse_rms = m_.inverse_x,
                                             .grad_x = g_.x ? m_.grad_x : nullptr,
                                             .grad_gain = g_.input_norm ? m_.gains : nullptr,
                                             .rows = size_.tokens,
                                             .copies = slices(),
                                             .rows_per_expert = size_.tokens,
                                             .hidden = s_.hidden,
                                             .experts = s_.experts,
                                             .dtype = s_.dtype},
                                            parallel_));
    if (!g_.input_norm) return Status::kOk;
    round(m_.gains, m_.gains_rounded, s_.experts * s_.hidden);
    add(g_.input_norm, m_.gains_rounded, g_.input_norm, s_.experts);
    return Status::kOk;
  }

  // Post_norm: all matrices read the input as it is.
  Status raw_inputs_backward() {
    std::vector<LinearSource> values, keys;
    for (const int64_t e : used_) {
      values.push_back(key_source(m_.grad_v, p_.weights.v, e));
      keys.push_back(key_source(m_.grad_k, p_.weights.k, e));
    }
    const auto part = [&](const std::vector<LinearSource>& sources, char* grad_x) {
      return LinearGradXPart{.sources = sources.data(),
                             .source_count = count(sources),
                             .grad_x = {grad_x, nullptr, s_.hidden},
                             .rows = size_.tokens,
                             .in = s_.hidden,
                             .out = size_.key_width};
    };
    const LinearGradXPart parts[]{part(values, m_.grad_values), part(keys, m_.grad_keys)};
    MICRO_RETURN_IF_FAILS(linear_grad_x(parts, 2, s_.dtype, parallel_));
    add(m_.grad_values, m_.grad_keys, m_.grad_x, size_.tokens);
    return Status::kOk;
  }

  LinearSource key_source(const char* grad, const Matrix* matrices, int64_t e) const {
    return {{at(grad, e * size_.tokens, size_.key_width), nullptr, size_.key_width}, matrices[e].data};
  }

  // ---- the decision ------------------------------------------------------------------------------------------------

  bool decision_learns() const { return !p_.given && (g_.logits || g_.router_in || g_.router_out || g_.x); }

  // The renormalised weight of a token's only expert is 1 and stays 1, unless its probability is tiny
  // (model.md 2.10.4).
  bool weights_are_constant() const {
    const RouteBackwardParams& r = p_.route;
    if (r.k != 1 || r.rule != WeightRule::kRenormalized) return false;
    return dispatch(s_.dtype, [&]<class T>() {
      using Acc = accumulator_t<T>;
      const Acc* probs = static_cast<const Acc*>(r.probs);
      for (int64_t t = 0; t < size_.tokens; ++t) {
        const Acc q = probs[t * s_.experts + r.ids[t]];
        if (!(q / (q + static_cast<Acc>(kEpsilon)) == 1)) return false;
      }
      return true;
    });
  }

  Status router(bool through_weights) {
    const void* grad_logits = nullptr;
    MICRO_RETURN_IF_FAILS(decision(through_weights, grad_logits));
    if (!grad_logits) {
      clear(g_.router_in, s_.router_hidden * s_.hidden * element_);
      clear(g_.router_out, s_.experts * s_.router_hidden * element_);
      if (!p_.grad_y) clear(g_.x, size_.tokens * s_.hidden * element_);
      return Status::kOk;
    }
    const ConstRows grad{grad_logits, nullptr, s_.experts};
    if (g_.router_out) MICRO_RETURN_IF_FAILS(router_out_weight(grad));
    if (!g_.router_in && !g_.x) return Status::kOk;
    MICRO_RETURN_IF_FAILS(
        plain_input_gradient({grad, p_.weights.router_out.data}, m_.grad_mid, s_.router_hidden, s_.experts));
    const ConstRows grad_mid{m_.grad_mid, nullptr, s_.router_hidden};
    if (g_.router_in) {
      const LinearGradWeightPart part{grad_mid,  {p_.x, nullptr, s_.hidden}, g_.router_in, size_.tokens,
                                      s_.hidden, s_.router_hidden,           false};
      MICRO_RETURN_IF_FAILS(linear_grad_weight(&part, 1, s_.dtype, parallel_));
    }
    if (!g_.x) return Status::kOk;
    void* grad_x = p_.grad_y ? m_.grad_x_other : g_.x;
    MICRO_RETURN_IF_FAILS(
        plain_input_gradient({grad_mid, p_.weights.router_in.data}, grad_x, s_.hidden, s_.router_hidden));
    if (p_.grad_y) add(g_.x, m_.grad_x_other, g_.x, size_.tokens);
    return Status::kOk;
  }

  // The gradient of the router's logits in the element type; nullptr: it is zero.
  Status decision(bool through_weights, const void*& grad_logits) {
    RouteBackwardParams r = p_.route;
    const bool moves = decision_learns() && (through_weights || r.grad_weights || r.grad_probs || r.grad_effective);
    if (!moves) {
      if (g_.logits) clear_wide(static_cast<char*>(g_.logits), size_.tokens * s_.experts);
      grad_logits = p_.grad_raw;
      return Status::kOk;
    }
    if (through_weights) {
      round(m_.grad_weights, m_.rounded_weights, size_.pairs);
      if (r.grad_weights) add(r.grad_weights, m_.rounded_weights, m_.rounded_weights, size_.tokens, r.k);
      r.grad_weights = m_.rounded_weights;
    }
    r.grad_z = g_.logits ? g_.logits : m_.grad_z;
    r.tokens = size_.tokens;
    r.experts = s_.experts;
    r.dtype = s_.dtype;
    MICRO_RETURN_IF_FAILS(route_backward(r, parallel_));
    round(r.grad_z, m_.grad_logits, size_.tokens * s_.experts);
    if (p_.grad_raw) add(p_.grad_raw, m_.grad_logits, m_.grad_logits, size_.tokens, s_.experts);
    grad_logits = m_.grad_logits;
    return Status::kOk;
  }

  Status router_out_weight(const ConstRows& grad) {
    const void* mid = saved_.router_mid;
    if (!mid) {
      LinearPart part;
      part.x = {p_.x, nullptr, s_.hidden};
      part.matrix = p_.weights.router_in;
      part.y = {m_.router_mid, nullptr, s_.router_hidden};
      part.rows = size_.tokens, part.in = s_.hidden, part.out = s_.router_hidden;
      MICRO_RETURN_IF_FAILS(linear(&part, 1, s_.dtype, parallel_));
      mid = m_.router_mid;
    }
    const LinearGradWeightPart part{
        grad, {mid, nullptr, s_.router_hidden}, g_.router_out, size_.tokens, s_.router_hidden, s_.experts, false};
    return linear_grad_weight(&part, 1, s_.dtype, parallel_);
  }
};

}  // namespace

int64_t block_train_backward_workspace(const BlockTrainBackwardParams& params) {
  Arena arena(nullptr);
  TrainBuffers measured(params, arena);
  return arena.peak();
}

Status block_train_backward(const BlockTrainBackwardParams& params, char* workspace, const ParallelFor& parallel_for) {
  return BackwardPass(params, Arena(workspace), parallel_for).run();
}

}  // namespace micro_kernels::cpu
