// The launches of a layer's backward pass. As in the forward nothing is read back: experts without a token take part in
// every launch, and the kernels find that there is nothing to do.

#include <algorithm>
#include <array>

#include "block_forward/device_buffers.h"
#include "block_train/block_train.cuh"
#include "block_train/needs.h"
#include "common/cuda/launch.cuh"
#include "micro_kernels/swiglu.h"

#define MICRO_RETURN_IF_FAILS(step) \
  if (const Status status = (step); status != Status::kOk) return status

namespace micro_kernels::cuda {
namespace {

dim3 rows_grid(int64_t rows) { return dim3(static_cast<unsigned>(ceil_div(rows, kRowWarps))); }

// What is wanted, and what that takes.
struct Facts {
  Needs needs;
  TrainSizes size;
  bool learns;           // the decision has a gradient that somebody wants
  bool through_weights;  // one that comes from the experts' outputs
  bool experts;          // they have a gradient to pass on
  bool moves;            // the logits behind bias and ablation have a gradient
  bool router;           // the router's logits have one
  bool makes_out;        // the experts' outputs are made anew

  explicit Facts(const BlockTrainBackwardParams& p)
      : needs(p),
        size(p),
        learns(!p.given && (p.grad.logits || p.grad.router_in || p.grad.router_out || p.grad.x)),
        through_weights(p.grad_y && learns && !constant_weights(p)),
        experts(p.grad_y && (needs.any || through_weights)),
        moves(learns && (through_weights || p.route.grad_weights || p.route.grad_probs || p.route.grad_effective)),
        router(moves || p.grad_raw),
        makes_out(through_weights && !p.saved.out) {}

  // A renormalised weight of a token's only expert is 1 and stays 1 where the expert's probability is not tiny; a
  // forward that could not promise that has kept the outputs.
  static bool constant_weights(const BlockTrainBackwardParams& p) {
    return p.route.k == 1 && p.route.rule == WeightRule::kRenormalized && p.shape.dtype != DType::kFloat64 &&
           !p.saved.out;
  }
};

struct Buffers {
  char *grad_weights, *grad_z, *grad_logits, *grad_mid, *router_mid, *grad_router;
  char *normed_u, *inverse_u, *normed_x, *inverse_x, *grad_u, *grad_normed, *parts;
  char *grad_out, *gate, *up, *grad_gate, *grad_up, *activation, *out;
  char *grad_attention, *turned_q, *turned_k, *grad_q, *grad_k, *grad_v, *grad_rows, *grad_keys, *attention_workspace;

  Buffers(const BlockTrainBackwardParams& p, const Facts& f, DeviceArena& arena) {
    const TrainSizes& n = f.size;
    const BlockShape& s = p.shape;
    const int64_t wide = accumulator_bytes(s.dtype), narrow = element_bytes(s.dtype);
    const auto elements = [&](int64_t rows, int64_t width, bool needed = true) {
      return needed ? arena.take(rows * width, narrow) : nullptr;
    };
    const auto sums = [&](int64_t rows, int64_t width) { return arena.take(rows * width, wide); };
    grad_weights = elements(n.tokens, p.route.k);
    grad_z = sums(n.tokens, s.experts);
    grad_logits = elements(n.tokens, s.experts);
    grad_mid = elements(n.tokens, s.router_hidden, f.router);
    router_mid = elements(n.tokens, s.router_hidden, f.router && !p.saved.router_mid);
    grad_router = elements(n.tokens, s.hidden, f.router);
    normed_u = elements(n.pairs, s.hidden);
    inverse_u = sums(n.pairs, 1);
    normed_x = elements(n.key_rows, s.hidden);
    inverse_x = sums(n.tokens, 1);
    grad_u = elements(n.pairs, s.hidden);
    grad_normed = elements(n.pairs, s.hidden);
    parts = sums(2 * kGainParts * s.experts, s.hidden);

    // Only for the feed-forward part, and only behind it.
    const int64_t phase = arena.used();
    grad_out = elements(n.pairs, s.hidden);
    gate = elements(n.pairs, s.inner, !p.saved.gate);
    up = elements(n.pairs, s.inner, !p.saved.gate);
    grad_gate = elements(n.pairs, s.inner);
    grad_up = elements(n.pairs, s.inner);
    activation = elements(n.pairs, s.inner);
    out = elements(n.pairs, s.hidden, f.makes_out);
    arena.rewind(phase);
    grad_attention = elements(n.pairs, n.query_width);
    turned_q = elements(n.pairs, n.query_width);
    turned_k = elements(n.key_rows, n.key_width);
    grad_q = elements(n.pairs, n.query_width);
    grad_k = elements(n.key_rows, n.key_width);
    grad_v = elements(n.key_rows, n.key_width);
    grad_rows = elements(n.pairs, s.hidden);
    grad_keys = elements(n.key_rows, s.hidden);
    ExpertAttentionBackwardParams attention{};
    attention.shape.rows = n.pairs;
    attention.shape.heads = s.heads;
    attention.shape.head_dim = s.head_dim;
    attention.shape.batch = p.batch;
    attention.shape.experts = s.experts;
    attention.shape.groups = s.groups;
    attention.shape.slots = attention.shape.keys = p.slots;
    attention.shape.dtype = s.dtype;
    attention_workspace = arena.take(expert_attention_backward_workspace(attention), 1);
  }
};

class BackwardPass {
 public:
  BackwardPass(const BlockTrainBackwardParams& p, void* workspace, void* stream)
      : p_(p),
        s_(p.shape),
        g_(p.grad),
        saved_(p.saved),
        f_(p),
        n_(f_.size),
        arena_(workspace),
        m_(p, f_, arena_),
        stream_(stream) {}

  Status run() {
    if (!supported()) return Status::kUnsupported;
    if (n_.tokens == 0) return clear_all();
    if (f_.experts) MICRO_RETURN_IF_FAILS(feed_forward());
    if (f_.router) MICRO_RETURN_IF_FAILS(grad_logits());
    if (f_.experts && f_.needs.attention) MICRO_RETURN_IF_FAILS(attention());
    MICRO_RETURN_IF_FAILS(inputs());
    MICRO_RETURN_IF_FAILS(input_weights());
    if (f_.experts) MICRO_RETURN_IF_FAILS(gains());
    return clear_unreached();
  }

 private:
  bool supported() {
    if (!s_.whole_block || s_.post_norm || s_.router_hidden == 0 || s_.rounding != GainRounding::kBeforeGain)
      return false;
    const BlockWeights& w = p_.weights;
    const int64_t e = s_.experts, inner = s_.inner * s_.hidden;
    q_ = stacked(w.q, e, n_.query_width * s_.hidden, s_.dtype);
    k_ = stacked(w.k, e, n_.key_width * s_.hidden, s_.dtype);
    v_ = stacked(w.v, e, n_.key_width * s_.hidden, s_.dtype);
    o_ = stacked(w.o, e, n_.query_width * s_.hidden, s_.dtype);
    gate_ = stacked(w.gate, e, inner, s_.dtype);
    up_ = stacked(w.up, e, inner, s_.dtype);
    down_ = stacked(w.down, e, inner, s_.dtype);
    return q_ && k_ && v_ && o_ && gate_ && up_ && down_ && w.input_norm && w.post_attention_norm;
  }

  // ---- feed-forward part -------------------------------------------------------------------------------------------

  // Down to the gradient of u.
  Status feed_forward() {
    if (f_.makes_out) MICRO_RETURN_IF_FAILS(make_out());
    MICRO_RETURN_IF_FAILS(split());
    if (!f_.needs.any) return Status::kOk;
    if (!saved_.gate) MICRO_RETURN_IF_FAILS(make_gate_and_up());
    LinearGradXGroup down = grad_x_group({m_.grad_out, nullptr, s_.hidden}, down_, s_.hidden, nullptr, s_.inner);
    down.grad_x.stride = s_.inner;
    down.gate = gate();
    down.up = up();
    down.grad_gate = m_.grad_gate;
    down.grad_up = m_.grad_up;
    down.activation = m_.activation;
    MICRO_RETURN_IF_FAILS(linear_grad_x(&down, 1, s_.dtype, stream_, p_.tf32));
    if (f_.needs.ffn_input) MICRO_RETURN_IF_FAILS(gate_and_up_inputs());
    return feed_forward_weights();
  }

  const void* gate() const { return saved_.gate ? saved_.gate : m_.gate; }
  const void* up() const { return saved_.gate ? saved_.up : m_.up; }

  // The experts' outputs, behind a norm that the next step makes once more, for its gradient.
  Status make_out() {
    MICRO_RETURN_IF_FAILS(rms_norm({.x = saved_.behind,
                                    .gain = p_.weights.post_attention_norm,
                                    .expert = saved_.experts,
                                    .y = m_.normed_u,
                                    .inverse_rms = m_.inverse_u,
                                    .rows = n_.pairs,
                                    .copies = 1,
                                    .rows_per_expert = n_.pairs,
                                    .hidden = s_.hidden,
                                    .experts = s_.experts,
                                    .eps = s_.eps,
                                    .rounding = s_.rounding,
                                    .dtype = s_.dtype},
                                   stream_));
    LinearGroup g = plan_group(m_.normed_u, gate_, m_.activation, s_.hidden, s_.inner);
    g.up = up_;
    MICRO_RETURN_IF_FAILS(linear(&g, 1, s_.dtype, stream_, p_.tf32));
    g = plan_group(m_.activation, down_, m_.out, s_.inner, s_.hidden);
    g.residual = {saved_.behind, nullptr, s_.hidden};
    return linear(&g, 1, s_.dtype, stream_, p_.tf32);
  }

  Status split() {
    SplitStep step{};
    step.tokens = saved_.tokens;
    step.experts = saved_.experts;
    step.offsets = saved_.offsets;
    step.inverse = saved_.inverse;
    step.grad_y = p_.grad_y;
    step.weights = p_.routing;
    step.grad_out = m_.grad_out;
    if (f_.through_weights) step.out = saved_.out ? saved_.out : m_.out;
    step.given_weights = p_.route.grad_weights;
    step.grad_weights = m_.grad_weights;
    step.u = saved_.behind;
    step.u_gain = p_.weights.post_attention_norm;
    step.normed_u = m_.normed_u;
    step.inverse_u = m_.inverse_u;
    step.x = p_.x;
    step.x_gain = p_.weights.input_norm;
    step.normed_x = g_.q || g_.k || g_.v ? m_.normed_x : nullptr;
    step.inverse_x = m_.inverse_x;
    step.tokens_count = n_.tokens;
    step.pairs = n_.pairs;
    step.k = p_.route.k;
    step.hidden = s_.hidden;
    step.expert_count = s_.experts;
    step.eps = s_.eps;
    return by_rows(n_.pairs + n_.tokens, {p_.grad_y, step.out, saved_.behind, p_.x, step.u_gain, step.x_gain},
                   [&]<class T, int N>(dim3 grid, dim3 block) {
                     return launch(train_split_kernel<T, N>, grid, block, stream_, step);
                   });
  }

  Status make_gate_and_up() {
    const LinearGroup both[] = {plan_group(m_.normed_u, gate_, m_.gate, s_.hidden, s_.inner),
                                plan_group(m_.normed_u, up_, m_.up, s_.hidden, s_.inner)};
    return linear(both, 2, s_.dtype, stream_, p_.tf32);
  }

  // u is read by the residual, and behind a norm by gate and up.
  Status gate_and_up_inputs() {
    LinearGradXGroup g = grad_x_group({m_.grad_gate, nullptr, s_.inner}, gate_, s_.inner, m_.grad_normed, s_.hidden);
    g.source_count = 2;
    g.sources[1] = g.sources[0];
    g.sources[1].grad_y.data = m_.grad_up;
    g.sources[1].weight = up_;
    MICRO_RETURN_IF_FAILS(linear_grad_x(&g, 1, s_.dtype, stream_, p_.tf32));
    if (!f_.needs.u) return Status::kOk;
    const GradNormStep step{.grad_out = m_.grad_out,
                            .grad_normed = m_.grad_normed,
                            .u = saved_.behind,
                            .gain = p_.weights.post_attention_norm,
                            .inverse_rms = m_.inverse_u,
                            .experts = saved_.experts,
                            .active = saved_.offsets + s_.experts,
                            .grad_u = m_.grad_u,
                            .rows = n_.pairs,
                            .hidden = s_.hidden};
    return by_rows(n_.pairs, {saved_.behind, step.gain}, [&]<class T, int N>(dim3 grid, dim3 block) {
      return launch(train_grad_norm_kernel<T, N>, grid, block, stream_, step);
    });
  }

  Status feed_forward_weights() {
    const int64_t h = s_.hidden;
    weight({m_.grad_out, nullptr, h}, {m_.activation, nullptr, s_.inner}, g_.down, s_.inner, h);
    weight({m_.grad_gate, nullptr, s_.inner}, {m_.normed_u, nullptr, h}, g_.gate, h, s_.inner);
    weight({m_.grad_up, nullptr, s_.inner}, {m_.normed_u, nullptr, h}, g_.up, h, s_.inner);
    weight({m_.grad_u, nullptr, h}, {saved_.attention, nullptr, n_.query_width}, g_.o, n_.query_width, h);
    return flush_weights();
  }

  // ---- attention ---------------------------------------------------------------------------------------------------

  Status attention() {
    LinearGradXGroup g =
        grad_x_group({m_.grad_u, nullptr, s_.hidden}, o_, s_.hidden, m_.grad_attention, n_.query_width);
    MICRO_RETURN_IF_FAILS(linear_grad_x(&g, 1, s_.dtype, stream_, p_.tf32));
    const int64_t group = p_.slots * s_.head_dim;
    const HeadStrides stored{s_.experts * s_.groups * group, s_.groups * group, group, s_.head_dim};
    MICRO_RETURN_IF_FAILS(expert_attention_backward({.shape = {.tokens = saved_.tokens,
                                                               .offsets = saved_.offsets,
                                                               .mask = p_.mask,
                                                               .mask_kind = p_.mask_kind,
                                                               .masks = p_.masks,
                                                               .rows = n_.pairs,
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
                                                     .q = saved_.q,
                                                     .k = saved_.k,
                                                     .v = saved_.v,
                                                     .out = saved_.attention,
                                                     .logsumexp = saved_.logsumexp,
                                                     .k_strides = stored,
                                                     .v_strides = stored,
                                                     .grad_q = f_.needs.q ? m_.turned_q : nullptr,
                                                     .grad_k = f_.needs.k ? m_.turned_k : nullptr,
                                                     .grad_v = f_.needs.v ? m_.grad_v : nullptr,
                                                     .grad_k_strides = key_rows(),
                                                     .grad_v_strides = key_rows()},
                                                    m_.attention_workspace, stream_));
    return f_.needs.q || f_.needs.k ? turn_back() : Status::kOk;
  }

  // Gradients of keys and values: rows [E, T, G D].
  HeadStrides key_rows() const {
    return {p_.slots * n_.key_width, n_.tokens * n_.key_width, s_.head_dim, n_.key_width};
  }

  Status turn_back() {
    TurnStep step{};
    step.queries = {m_.turned_q, m_.grad_q, nullptr, f_.needs.q ? n_.pairs : 0, s_.heads, true};
    step.keys = {m_.turned_k, m_.grad_k, nullptr, f_.needs.k ? n_.key_rows : 0, s_.groups, true};
    step.query_tokens = saved_.tokens;
    step.key_strides = step.value_strides = key_rows();
    step.tokens = n_.tokens;
    step.slots = p_.slots;
    step.cos = p_.cos;
    step.sin = p_.sin;
    step.positions = n_.tokens;
    step.head_dim = s_.head_dim;
    step.backwards = true;
    return start_turn(step, s_.dtype, stream_);
  }

  // ---- the decision ------------------------------------------------------------------------------------------------

  Status grad_logits() {
    RouteBackwardParams r = p_.route;
    r.grad_z = g_.logits ? g_.logits : m_.grad_z;
    if (f_.moves) {
      if (f_.through_weights) r.grad_weights = m_.grad_weights;
      r.tokens = n_.tokens;
      r.experts = s_.experts;
      r.dtype = s_.dtype;
      MICRO_RETURN_IF_FAILS(route_backward(r, stream_));
    }
    const GradLogitsStep step{.grad_z = f_.moves ? r.grad_z : nullptr,
                              .grad_raw = p_.grad_raw,
                              .grad_logits = m_.grad_logits,
                              .router_out = p_.weights.router_out.data,
                              .grad_mid = g_.router_in || g_.x ? m_.grad_mid : nullptr,
                              .tokens = n_.tokens,
                              .experts = s_.experts,
                              .width = s_.router_hidden};
    return by_rows(s_.router_hidden, n_.tokens, {step.router_out}, [&]<class T, int N>(dim3 grid, dim3 block) {
      return launch(train_grad_logits_kernel<T, N>, grid, block, stream_, step);
    });
  }

  // ---- what queries, keys, values and the router are made of -------------------------------------------------------

  Status inputs() {
    std::array<LinearGradXGroup, 3> groups;
    int64_t count = 0;
    const bool experts = f_.experts && f_.needs.inputs, router = f_.router && g_.x;
    if (experts) {
      groups[count++] = grad_x_group({m_.grad_q, nullptr, n_.query_width}, q_, n_.query_width, m_.grad_rows, s_.hidden);
      groups[count++] = key_inputs();
    }
    void* grad_router = experts ? m_.grad_router : g_.x;
    if (router) {
      LinearGradXGroup& g = groups[count++];
      g.sources[0].grad_y = {m_.grad_mid, nullptr, s_.router_hidden};
      g.sources[0].weight = p_.weights.router_in.data;
      g.sources[0].out = s_.router_hidden;
      g.grad_x = {grad_router, nullptr, s_.hidden};
      g.rows = n_.tokens;
      g.in = s_.hidden;
    }
    if (count > 0) MICRO_RETURN_IF_FAILS(linear_grad_x(groups.data(), count, s_.dtype, stream_, p_.tf32));
    return experts && g_.x ? grad_input(router ? grad_router : nullptr) : Status::kOk;
  }

  LinearGradXGroup key_inputs() const {
    LinearGradXGroup g;
    g.source_count = 2;
    for (LinearGradXSource* source : {&g.sources[0], &g.sources[1]}) {
      source->grad_y_expert_stride = n_.tokens * n_.key_width;
      source->weight_expert_stride = n_.key_width * s_.hidden;
      source->out = n_.key_width;
    }
    g.sources[0].grad_y = {m_.grad_v, nullptr, n_.key_width};
    g.sources[0].weight = v_;
    g.sources[1].grad_y = {m_.grad_k, nullptr, n_.key_width};
    g.sources[1].weight = k_;
    g.grad_x = {m_.grad_keys, nullptr, s_.hidden};
    g.grad_x_expert_stride = n_.tokens * s_.hidden;
    g.used = saved_.offsets;
    g.rows = n_.tokens;
    g.experts = s_.experts;
    g.in = s_.hidden;
    return g;
  }

  Status grad_input(const void* grad_router) {
    const GradInputStep step{.experts = saved_.experts,
                             .offsets = saved_.offsets,
                             .inverse = saved_.inverse,
                             .grad_keys = m_.grad_keys,
                             .grad_rows = m_.grad_rows,
                             .grad_u = m_.grad_u,
                             .grad_router = grad_router,
                             .x = p_.x,
                             .gain = p_.weights.input_norm,
                             .inverse_rms = m_.inverse_x,
                             .grad_x = g_.x,
                             .tokens = n_.tokens,
                             .k = p_.route.k,
                             .hidden = s_.hidden,
                             .expert_count = s_.experts};
    return by_rows(n_.tokens, {p_.x, step.gain, g_.x}, [&]<class T, int N>(dim3 grid, dim3 block) {
      return launch(train_grad_input_kernel<T, N>, grid, block, stream_, step);
    });
  }

  Status input_weights() {
    if (f_.experts && f_.needs.attention) {
      weight({m_.grad_q, nullptr, n_.query_width}, {m_.normed_x, saved_.tokens, s_.hidden}, g_.q, s_.hidden,
             n_.query_width)
          .x_expert_stride = n_.tokens * s_.hidden;
      key_weight(m_.grad_k, g_.k);
      key_weight(m_.grad_v, g_.v);
    }
    // Without a gradient of the logits the router's matrices have no rows: theirs are 0.
    const int64_t rows = f_.router ? n_.tokens : 0;
    token_weight({m_.grad_mid, nullptr, s_.router_hidden}, {p_.x, nullptr, s_.hidden}, g_.router_in, s_.hidden,
                 s_.router_hidden)
        .rows = rows;
    if (g_.router_out && f_.router) MICRO_RETURN_IF_FAILS(make_router_mid());
    token_weight({m_.grad_logits, nullptr, s_.experts}, {router_mid(), nullptr, s_.router_hidden}, g_.router_out,
                 s_.router_hidden, s_.experts)
        .rows = rows;
    return flush_weights();
  }

  const void* router_mid() const { return saved_.router_mid ? saved_.router_mid : m_.router_mid; }
  Status make_router_mid() {
    if (saved_.router_mid) return Status::kOk;
    LinearGroup g;
    g.x = {p_.x, nullptr, s_.hidden};
    g.weight = p_.weights.router_in.data;
    g.y = {m_.router_mid, nullptr, s_.router_hidden};
    g.rows = n_.tokens, g.in = s_.hidden, g.out = s_.router_hidden;
    return linear(&g, 1, s_.dtype, stream_, p_.tf32);
  }

  Status gains() {
    const GainStep step{.tokens = saved_.tokens,
                        .offsets = saved_.offsets,
                        .grad_keys = m_.grad_keys,
                        .grad_rows = m_.grad_rows,
                        .x = p_.x,
                        .inverse_x = m_.inverse_x,
                        .grad_normed = m_.grad_normed,
                        .u = saved_.behind,
                        .inverse_u = m_.inverse_u,
                        .parts = m_.parts,
                        .grad_x_gain = g_.input_norm,
                        .grad_u_gain = g_.post_attention_norm,
                        .tokens_count = n_.tokens,
                        .hidden = s_.hidden,
                        .experts = s_.experts};
    if (!g_.input_norm && !g_.post_attention_norm) return Status::kOk;
    return dispatch_device(s_.dtype, [&]<class T>() {
      const auto parts = [&]<int N>() {
        const dim3 grid(static_cast<unsigned>(ceil_div(s_.hidden, kGainThreads * N)), static_cast<unsigned>(s_.experts),
                        2 * kGainParts);
        return launch(train_gain_parts_kernel<T, N>, grid, dim3(kGainThreads), stream_, step);
      };
      const Status status = in_vectors<T>(s_.hidden, {p_.x, saved_.behind}) ? parts.template operator()<kVector<T>>()
                                                                            : parts.template operator()<1>();
      if (status != Status::kOk) return status;
      const dim3 grid(static_cast<unsigned>(ceil_div(s_.experts * s_.hidden, kGainThreads)), 2);
      return launch(train_gains_kernel<T>, grid, dim3(kGainThreads), stream_, step);
    });
  }

  // ---- zeros -------------------------------------------------------------------------------------------------------

  // What is wanted, and no gradient comes to.
  Status clear_unreached() {
    ClearStep step{};
    const int64_t narrow = element_bytes(s_.dtype);
    if (!f_.moves) step.add(g_.logits, n_.tokens * s_.experts * accumulator_bytes(s_.dtype));
    if (!f_.router && !f_.experts) step.add(g_.x, n_.tokens * s_.hidden * narrow);
    return start(step);
  }

  // There is no token.
  Status clear_all() {
    ClearStep step{};
    const int64_t narrow = element_bytes(s_.dtype), maps = s_.experts * s_.hidden * narrow;
    for (void* map : {g_.q, g_.o}) step.add(map, maps * n_.query_width);
    for (void* map : {g_.k, g_.v}) step.add(map, maps * n_.key_width);
    for (void* map : {g_.gate, g_.up, g_.down}) step.add(map, maps * s_.inner);
    for (void* gain : {g_.input_norm, g_.post_attention_norm}) step.add(gain, maps);
    step.add(g_.router_in, s_.router_hidden * s_.hidden * narrow);
    step.add(g_.router_out, s_.experts * s_.router_hidden * narrow);
    return start(step);
  }

  Status start(const ClearStep& step) {
    if (step.count == 0) return Status::kOk;
    return launch(train_clear_kernel<uint16_t>, dim3(kClearBlocks, static_cast<unsigned>(step.count)),
                  dim3(kRowThreads), stream_, step);
  }

  // ---- launchers with what all calls share -------------------------------------------------------------------------

  // body<T, N>(grid, block): vectors where rows of `width` from `bases` allow them.
  template <class Body>
  Status by_rows(int64_t width, int64_t rows, std::initializer_list<const void*> bases, const Body& body) {
    return dispatch_device(s_.dtype, [&]<class T>() {
      if (in_vectors<T>(width, bases)) return body.template operator()<T, kVector<T>>(rows_grid(rows), kRowThreads);
      return body.template operator()<T, 1>(rows_grid(rows), kRowThreads);
    });
  }
  template <class Body>
  Status by_rows(int64_t rows, std::initializer_list<const void*> bases, const Body& body) {
    return by_rows(s_.hidden, rows, bases, body);
  }

  LinearGroup plan_group(const void* x, const void* weight, void* y, int64_t in, int64_t out) const {
    LinearGroup g;
    g.x = {x, nullptr, in};
    g.weight = weight;
    g.weight_expert_stride = in * out;
    g.y = {y, nullptr, out};
    g.offsets = saved_.offsets;
    g.rows = n_.pairs, g.experts = s_.experts, g.in = in, g.out = out;
    return g;
  }

  LinearGradXGroup grad_x_group(const ConstRows& grad_y, const void* weight, int64_t out, void* grad_x,
                                int64_t in) const {
    LinearGradXGroup g;
    g.sources[0].grad_y = grad_y;
    g.sources[0].weight = weight;
    g.sources[0].weight_expert_stride = out * in;
    g.sources[0].out = out;
    g.grad_x = {grad_x, nullptr, in};
    g.offsets = saved_.offsets;
    g.rows = n_.pairs, g.experts = s_.experts, g.in = in;
    return g;
  }

  // Wanted gradients of matrices wait for the next launch; what is not wanted is a group that nobody looks at.
  LinearGradWeightGroup& weight(const ConstRows& grad_y, const ConstRows& x, void* grad_weight, int64_t in,
                                int64_t out) {
    LinearGradWeightGroup& g = grad_weight ? waiting_[waiting_count_++] : unwanted_;
    g = {};
    g.grad_y = grad_y;
    g.x = x;
    g.grad_weight = grad_weight;
    g.offsets = saved_.offsets;
    g.rows = n_.pairs, g.experts = s_.experts, g.in = in, g.out = out;
    return g;
  }
  LinearGradWeightGroup& token_weight(const ConstRows& grad_y, const ConstRows& x, void* grad_weight, int64_t in,
                                      int64_t out) {
    LinearGradWeightGroup& g = weight(grad_y, x, grad_weight, in, out);
    g.offsets = nullptr;
    g.rows = n_.tokens, g.experts = 1;
    return g;
  }
  void key_weight(const char* grad, void* grad_weight) {
    LinearGradWeightGroup& g = token_weight({grad, nullptr, n_.key_width}, {m_.normed_x, nullptr, s_.hidden},
                                            grad_weight, s_.hidden, n_.key_width);
    g.grad_y_expert_stride = n_.tokens * n_.key_width;
    g.x_expert_stride = n_.tokens * s_.hidden;
    g.used = saved_.offsets;
    g.experts = s_.experts;
  }
  Status flush_weights() {
    const int64_t all = waiting_count_;
    waiting_count_ = 0;
    for (int64_t first = 0; first < all; first += kMostGroups)
      MICRO_RETURN_IF_FAILS(linear_grad_weight(waiting_.data() + first, std::min<int64_t>(kMostGroups, all - first),
                                               s_.dtype, stream_, p_.tf32));
    return Status::kOk;
  }

  const BlockTrainBackwardParams& p_;
  const BlockShape& s_;
  const BlockGradients& g_;
  const BlockSaved& saved_;
  const Facts f_;
  const TrainSizes& n_;
  DeviceArena arena_;
  Buffers m_;
  void* stream_;
  std::array<LinearGradWeightGroup, 8> waiting_;
  int64_t waiting_count_ = 0;
  LinearGradWeightGroup unwanted_;
  const void *q_ = nullptr, *k_ = nullptr, *v_ = nullptr, *o_ = nullptr;
  const void *gate_ = nullptr, *up_ = nullptr, *down_ = nullptr;
};

}  // namespace

int64_t block_train_backward_workspace(const BlockTrainBackwardParams& params) {
  DeviceArena arena(nullptr);
  const Facts facts(params);
  Buffers measured(params, facts, arena);
  return arena.peak();
}

Status block_train_backward(const BlockTrainBackwardParams& params, void* workspace, void* stream) {
  return BackwardPass(params, workspace, stream).run();
}

}  // namespace micro_kernels::cuda
