// The launches of a layer, one after the other on one stream. Nothing is read back: grids are those of the worst case,
// and how many rows an expert has is known to the kernels alone.

#include <numeric>

#include "block_forward/block_forward.cuh"
#include "block_forward/device_buffers.h"
#include "common/cuda/launch.cuh"
#include "micro_kernels/combine.h"
#include "micro_kernels/plan.h"
#include "micro_kernels/swiglu.h"

#define MICRO_RETURN_IF_FAILS(step) \
  if (const Status status = (step); status != Status::kOk) return status

namespace micro_kernels::cuda {
namespace {

dim3 rows_grid(int64_t rows) { return dim3(static_cast<unsigned>(ceil_div(rows, kRowWarps))); }

// Head sizes that the grouped product turns on its way out.
bool turns_in_product(int64_t head_dim) {
  return head_dim == 16 || head_dim == 32 || head_dim == 64 || head_dim == 128;
}

// What follows from the parameters.
struct Facts {
  int64_t tokens, pairs, queries, key_experts, query_width, key_width;
  bool turns, turns_values;  // queries and keys, or values too, take a step of their own behind the product
  bool at_once;              // the last product puts the result of a token's only expert where it belongs
  bool runs_router, folded;

  explicit Facts(const BlockForwardParams& p)
      : tokens(p.batch * p.slots),
        pairs(tokens * p.route.k),
        queries(p.shape.whole_block ? pairs : tokens),
        key_experts(p.shape.whole_block ? p.shape.experts : 1),
        query_width(p.shape.heads * p.shape.head_dim),
        key_width(p.shape.groups * p.shape.head_dim),
        turns(p.shape.post_norm || !turns_in_product(p.shape.head_dim) || (p.starts && p.real)),
        turns_values(p.starts && p.real),
        at_once(p.route.k == 1 && !(p.shape.whole_block && (p.shape.post_norm || (p.saved && p.saved->out)))),
        runs_router(!p.route.rows || p.raw),
        folded(p.shape.router_hidden == 0) {}
};

ExpertAttentionShape attention_shape(const BlockForwardParams& p, const Facts& n, const int32_t* tokens = nullptr,
                                     const int32_t* offsets = nullptr) {
  return {.tokens = tokens,
          .offsets = offsets,
          .mask = p.mask,
          .mask_kind = p.mask_kind,
          .masks = p.masks,
          .rows = n.queries,
          .heads = p.shape.heads,
          .groups = p.shape.groups,
          .head_dim = p.shape.head_dim,
          .batch = p.batch,
          .experts = n.key_experts,
          .slots = p.slots,
          .keys = p.keys,
          .start = p.start,
          .starts = p.starts,
          .scale = p.scale,
          .dtype = p.shape.dtype};
}

struct Buffers {
  char *mid, *logits, *inverse_x, *inverse_u, *ones, *q, *turned, *k, *v, *own_k, *own_v, *attention, *logsumexp;
  char *attention_workspace, *behind, *u, *normed, *inner, *ffn_out, *out, *mixture;
  int32_t *tokens, *experts, *offsets, *inverse, *everyone, *whole, *key_rows, *value_rows;

  Buffers(const BlockForwardParams& p, DeviceArena& arena) {
    const Facts n(p);
    const BlockShape& s = p.shape;
    const int64_t wide = accumulator_bytes(s.dtype), narrow = element_bytes(s.dtype);
    const BlockSaved kept = p.saved ? *p.saved : BlockSaved{};
    const auto elements = [&](bool needed, int64_t count, void* own = nullptr) {
      return own ? static_cast<char*>(own) : needed ? arena.take(count, narrow) : nullptr;
    };
    const auto sums = [&](int64_t count, void* own = nullptr) {
      return own ? static_cast<char*>(own) : arena.take(count, wide);
    };
    const auto integers = [&](int64_t count, int32_t* own = nullptr) { return own ? own : arena.integers(count); };
    mid = elements(!n.folded && n.runs_router, n.tokens * s.router_hidden, kept.router_mid);
    logits = sums(n.tokens * s.experts);
    inverse_x = sums(n.tokens);
    inverse_u = sums(n.queries);
    ones = elements(true, s.hidden);
    tokens = integers(n.pairs, kept.tokens);
    experts = integers(n.pairs, kept.experts);
    offsets = integers(s.experts + 1, kept.offsets);
    inverse = integers(n.pairs, kept.inverse);
    everyone = integers(s.whole_block ? 0 : n.tokens);
    whole = integers(2);
    key_rows = integers(n.tokens);
    value_rows = integers(n.tokens);
    own_k = elements(!p.cache.k, n.key_experts * n.tokens * n.key_width, s.post_norm ? nullptr : kept.k);
    own_v = elements(!p.cache.k, n.key_experts * n.tokens * n.key_width, kept.v);
    attention = elements(true, n.queries * n.query_width, kept.attention);
    logsumexp = sums(n.queries * s.heads, kept.logsumexp);
    u = elements(true, n.queries * s.hidden, s.post_norm ? nullptr : kept.behind);
    mixture = elements(!s.whole_block, n.tokens * s.hidden);

    // Only until the attention, and only behind it.
    const int64_t phase = arena.used();
    q = elements(true, n.queries * n.query_width, n.turns && !s.post_norm ? nullptr : kept.q);
    turned = n.turns ? elements(true, n.queries * n.query_width, s.post_norm ? nullptr : kept.q) : q;
    k = elements(n.turns, n.key_experts * n.tokens * n.key_width, s.post_norm ? kept.k : nullptr);
    v = elements(n.turns_values, n.key_experts * n.tokens * n.key_width);
    ExpertAttentionParams attention_params{};
    attention_params.shape = attention_shape(p, n);
    attention_workspace = arena.take(expert_attention_workspace(attention_params), 1);
    arena.rewind(phase);
    behind = elements(s.post_norm, n.queries * s.hidden, s.post_norm ? kept.behind : nullptr);
    normed = elements(!s.whole_block && !s.post_norm, n.tokens * s.hidden);
    inner = elements(true, n.pairs * s.inner);
    ffn_out = elements(!n.at_once, n.pairs * s.hidden, kept.out);
    out = s.whole_block && s.post_norm && p.route.k > 1 ? arena.take(n.pairs * s.hidden, narrow) : ffn_out;
  }
};

template <int N>
bool turns_in_vectors(const TurnStep& t) {
  for (const void* base : {t.queries.to, t.keys.to, t.values.to})
    if (reinterpret_cast<uintptr_t>(base) % 16 != 0) return false;
  for (const void* base : {t.queries.gain, t.keys.gain, t.cos, t.sin})
    if (reinterpret_cast<uintptr_t>(base) % 16 != 0) return false;
  for (const HeadStrides& s : {t.key_strides, t.value_strides})
    if (s.batch % N != 0 || s.expert % N != 0 || s.group % N != 0 || s.key % N != 0) return false;
  return t.head_dim / 2 % N == 0;
}

class Layer {
 public:
  Layer(const BlockForwardParams& params, void* workspace, void* stream)
      : p_(params), s_(params.shape), n_(params), arena_(workspace), m_(params, arena_), stream_(stream) {}

  Status run() {
    if (!supported()) return Status::kUnsupported;
    return s_.whole_block ? whole_block() : shared_attention();
  }

 private:
  // Keys that are made late need the host to count them; packed weights are the CPU's.
  bool supported() {
    if (p_.cache.x || p_.hooks || (!s_.post_norm && s_.rounding != GainRounding::kBeforeGain)) return false;
    const BlockWeights& w = p_.weights;
    const int64_t a = n_.key_experts, e = s_.experts, inner = s_.inner * s_.hidden;
    q_ = stacked(w.q, a, n_.query_width * s_.hidden, s_.dtype);
    k_ = stacked(w.k, a, n_.key_width * s_.hidden, s_.dtype);
    v_ = stacked(w.v, a, n_.key_width * s_.hidden, s_.dtype);
    o_ = stacked(w.o, a, n_.query_width * s_.hidden, s_.dtype);
    gate_ = stacked(w.gate, e, inner, s_.dtype);
    up_ = stacked(w.up, e, inner, s_.dtype);
    down_ = stacked(w.down, e, inner, s_.dtype);
    const bool router = w.router_in.format == WeightFormat::kPlain && w.router_out.format == WeightFormat::kPlain;
    return q_ && k_ && v_ && o_ && gate_ && up_ && down_ && router && places_fit();
  }

  // ---- two kinds of layers -----------------------------------------------------------------------------------------

  Status whole_block() {
    MICRO_RETURN_IF_FAILS(router_in(p_.x));
    TokenStep step = statistics(p_.x, n_.tokens, s_.post_norm ? nullptr : m_.inverse_x);
    step.places = places();
    step.ones = m_.ones;
    MICRO_RETURN_IF_FAILS(decide(step, p_.x));
    MICRO_RETURN_IF_FAILS(plan_pairs());
    MICRO_RETURN_IF_FAILS(make_queries_and_keys());
    MICRO_RETURN_IF_FAILS(expert_attention(attention(), m_.attention_workspace, stream_));
    MICRO_RETURN_IF_FAILS(leave_attention());
    if (!s_.post_norm) MICRO_RETURN_IF_FAILS(start(statistics(m_.u, n_.queries, m_.inverse_u)));
    MICRO_RETURN_IF_FAILS(feed_forward(m_.u, nullptr));
    return add_up_block();
  }

  Status shared_attention() {
    TokenStep step = statistics(p_.x, n_.tokens, s_.post_norm ? nullptr : m_.inverse_x);
    step.places = places();
    step.everyone = m_.everyone;
    step.whole = m_.whole;
    step.ones = m_.ones;
    MICRO_RETURN_IF_FAILS(start(step));
    MICRO_RETURN_IF_FAILS(make_queries_and_keys());
    MICRO_RETURN_IF_FAILS(expert_attention(attention(), m_.attention_workspace, stream_));
    MICRO_RETURN_IF_FAILS(leave_attention());
    if (!s_.post_norm) MICRO_RETURN_IF_FAILS(norm_mixture_input());
    const char* input = s_.post_norm ? m_.u : m_.normed;
    MICRO_RETURN_IF_FAILS(router_in(input));
    MICRO_RETURN_IF_FAILS(decide(statistics(nullptr, n_.tokens, nullptr), input));
    MICRO_RETURN_IF_FAILS(plan_pairs());
    MICRO_RETURN_IF_FAILS(feed_forward(input, m_.tokens));
    return add_up_mixture();
  }

  // ---- the decision ------------------------------------------------------------------------------------------------

  Status router_in(const void* x) {
    if (!n_.runs_router || n_.folded) return Status::kOk;
    LinearGroup g = product({x, nullptr, s_.hidden}, p_.weights.router_in.data, 0, {m_.mid, nullptr, s_.router_hidden},
                            s_.hidden, s_.router_hidden);
    g.rows = n_.tokens;
    return linear(&g, 1, s_.dtype, stream_, p_.tf32);
  }

  TokenStep statistics(const void* x, int64_t rows, void* inverse_rms) const {
    TokenStep step{};
    step.x = x;
    step.inverse_rms = inverse_rms;
    step.tokens = rows;
    step.hidden = s_.hidden;
    step.eps = s_.eps;
    return step;
  }

  Status decide(TokenStep step, const void* x) {
    step.decides = true;
    step.route = p_.route;
    step.route.tokens = n_.tokens;
    step.route.experts = s_.experts;
    step.route.dtype = s_.dtype;
    step.logits = p_.raw ? p_.raw : m_.logits;
    step.route.logits = step.logits;
    step.router_width = n_.folded ? s_.hidden : s_.router_hidden;
    if (n_.runs_router) step.router_input = n_.folded ? x : m_.mid;
    step.router_out = p_.weights.router_out.data;
    return start(step);
  }

  Status start(const TokenStep& step) {
    return dispatch_device(s_.dtype, [&]<class T>() {
      if (n_.folded && step.decides) return start_as<T, accumulator_t<T>>(step);
      return start_as<T, T>(step);
    });
  }

  template <class T, class Logit>
  Status start_as(const TokenStep& step) {
    using Acc = accumulator_t<T>;
    const dim3 grid = rows_grid(step.tokens), block(kRowThreads);
    const bool vectors = in_vectors<T>(step.hidden, {step.x}) &&
                         in_vectors<T>(step.router_width, {step.router_input}) &&
                         in_vectors<Logit>(step.router_width, {step.router_out});
    if (!vectors) return launch(block_token_kernel<T, Logit, 1, 0>, grid, block, stream_, step);
    const RouteParams& r = step.route;
    const auto start_width = [&]<int kWidth>() {
      return launch(block_token_kernel<T, Logit, kVector<T>, kWidth>, grid, block, stream_, step);
    };
    return dispatch_width<T>(r.experts, start_width, static_cast<const Logit*>(r.logits),
                             static_cast<const Acc*>(r.rows), static_cast<const Acc*>(r.bias),
                             static_cast<const Acc*>(r.probs), static_cast<const Acc*>(r.effective));
  }

  Status plan_pairs() {
    return plan({.ids = p_.route.ids,
                 .weights = p_.route.weights,
                 .mask = p_.real,
                 .tokens = m_.tokens,
                 .experts = m_.experts,
                 .offsets = m_.offsets,
                 .inverse = m_.inverse,
                 .token_count = n_.tokens,
                 .k = p_.route.k,
                 .expert_count = s_.experts,
                 .dtype = s_.dtype},
                stream_);
  }

  // ---- queries, keys and values ------------------------------------------------------------------------------------

  HeadStrides strides_of(const HeadStrides& cached) const {
    if (p_.cache.k) return cached;
    const int64_t group = p_.slots * s_.head_dim;
    return {n_.key_experts * s_.groups * group, s_.groups * group, group, s_.head_dim};
  }
  void* stored_keys() const { return p_.cache.k ? p_.cache.k : m_.own_k; }
  void* stored_values() const { return p_.cache.k ? p_.cache.v : m_.own_v; }

  // The grouped product counts rows of a cache in the largest unit that divides both of its strides.
  // Of one batch row the batch stride says nothing: torch lets it be anything.
  int64_t unit_of(const HeadStrides& s) const {
    return std::max<int64_t>(1, p_.batch == 1 ? s.key : std::gcd(s.batch, s.key));
  }

  bool places_fit() const {
    for (const HeadStrides& s : {strides_of(p_.cache.k_strides), strides_of(p_.cache.v_strides)}) {
      const int64_t last = (p_.batch - 1) * s.batch + (p_.keys - 1) * s.key;
      if (s.batch < 0 || s.key < 0 || last / unit_of(s) > INT32_MAX) return false;
    }
    return true;
  }

  KeyPlaces places() const {
    const HeadStrides k = strides_of(p_.cache.k_strides), v = strides_of(p_.cache.v_strides);
    return {.keys = m_.key_rows,
            .values = m_.value_rows,
            .key_strides = k,
            .value_strides = v,
            .key_unit = unit_of(k),
            .value_unit = unit_of(v),
            .slots = p_.slots,
            .start = p_.start,
            .starts = p_.starts};
  }

  static LinearGroup product(const ConstRows& x, const void* weight, int64_t weight_expert_stride, const Rows& y,
                             int64_t in, int64_t out) {
    LinearGroup g;
    g.x = x;
    g.weight = weight;
    g.weight_expert_stride = weight_expert_stride;
    g.y = y;
    g.in = in;
    g.out = out;
    return g;
  }

  // x of the layer through the matrices of the experts that have an attention.
  LinearGroup input_product(const int32_t* index, const void* weight, const Rows& y, int64_t out) const {
    LinearGroup g = product({p_.x, index, s_.hidden}, weight, s_.hidden * out, y, s_.hidden, out);
    g.experts = n_.key_experts;
    if (s_.post_norm) return g;
    g.gain = p_.weights.input_norm ? p_.weights.input_norm : m_.ones;
    g.gain_expert_stride = p_.weights.input_norm ? s_.hidden : 0;
    g.inverse_rms = m_.inverse_x;
    return g;
  }

  void turn(LinearGroup& g) const {
    if (n_.turns) return;
    g.cos = p_.cos;
    g.sin = p_.sin;
    g.position = p_.position;
    g.positions = p_.positions;
    g.head_dim = s_.head_dim;
  }

  // Of all tokens, into the cache or, `compact`, into rows [key experts, T]. Without a cache, of experts in use.
  LinearGroup key_product(const void* weight, void* store, const HeadStrides& strides, const int32_t* rows,
                          char* compact) const {
    LinearGroup g = input_product(nullptr, weight, {compact, nullptr, n_.key_width}, n_.key_width);
    g.rows = n_.tokens;
    g.used = s_.whole_block && !p_.cache.k ? m_.offsets : nullptr;
    g.y_expert_stride = n_.tokens * n_.key_width;
    if (compact) return g;
    g.y = {store, rows, unit_of(strides)};
    g.y_expert_stride = strides.expert;
    g.y_head_stride = strides.group;
    g.head_dim = s_.head_dim;
    return g;
  }

  Status make_queries_and_keys() {
    LinearGroup groups[3];
    LinearGroup& q = groups[0] = input_product(query_tokens(), q_, {m_.q, nullptr, n_.query_width}, n_.query_width);
    q.offsets = query_offsets();
    q.rows = n_.queries;
    turn(q);
    groups[1] = key_product(k_, stored_keys(), strides_of(p_.cache.k_strides), m_.key_rows, n_.turns ? m_.k : nullptr);
    turn(groups[1]);
    groups[2] = key_product(v_, stored_values(), strides_of(p_.cache.v_strides), m_.value_rows,
                            n_.turns_values ? m_.v : nullptr);
    MICRO_RETURN_IF_FAILS(linear(groups, 3, s_.dtype, stream_, p_.tf32));
    return n_.turns ? turn_rows() : Status::kOk;
  }

  Status turn_rows() {
    const int64_t key_rows = n_.key_experts * n_.tokens;
    const TurnStep step{
        .queries = {m_.q, m_.turned, p_.weights.q_norm, n_.queries, s_.heads, true},
        .keys = {m_.k, stored_keys(), p_.weights.k_norm, key_rows, s_.groups, true},
        .values = {m_.v, stored_values(), nullptr, n_.turns_values ? key_rows : 0, s_.groups, false},
        .query_tokens = query_tokens(),
        .query_experts = s_.whole_block ? m_.experts : nullptr,
        .key_strides = strides_of(p_.cache.k_strides),
        .value_strides = strides_of(p_.cache.v_strides),
        .tokens = n_.tokens,
        .slots = p_.slots,
        .start = p_.start,
        .starts = p_.starts,
        .real = p_.real,
        .cos = p_.cos,
        .sin = p_.sin,
        .position = p_.position,
        .positions = p_.positions,
        .head_dim = s_.head_dim,
        .eps = s_.eps,
        .rounding = s_.rounding,
        .backwards = false,
    };
    return start_turn(step, s_.dtype, stream_);
  }

  // ---- attention ---------------------------------------------------------------------------------------------------

  const int32_t* query_tokens() const { return s_.whole_block ? m_.tokens : m_.everyone; }
  const int32_t* query_offsets() const { return s_.whole_block ? m_.offsets : m_.whole; }

  ExpertAttentionParams attention() const {
    return {.shape = attention_shape(p_, n_, query_tokens(), query_offsets()),
            .q = m_.turned,
            .k = stored_keys(),
            .v = stored_values(),
            .k_strides = strides_of(p_.cache.k_strides),
            .v_strides = strides_of(p_.cache.v_strides),
            .out = m_.attention,
            .logsumexp = m_.logsumexp};
  }

  // Output matrix and residual: u.
  Status leave_attention() {
    LinearGroup g = product({m_.attention, nullptr, n_.query_width}, o_, n_.query_width * s_.hidden,
                            {s_.post_norm ? m_.behind : m_.u, nullptr, s_.hidden}, n_.query_width, s_.hidden);
    g.experts = n_.key_experts;
    g.offsets = query_offsets();
    g.rows = n_.queries;
    if (!s_.post_norm) g.residual = {p_.x, query_tokens(), s_.hidden};
    MICRO_RETURN_IF_FAILS(linear(&g, 1, s_.dtype, stream_, p_.tf32));
    if (!s_.post_norm) return Status::kOk;
    JoinStep sum = join(p_.x, m_.behind, p_.weights.post_attention_norm, m_.u, n_.queries);
    sum.a_index = query_tokens();
    sum.expert = s_.whole_block ? m_.experts : nullptr;
    return start(sum);
  }

  // ---- feed-forward and what follows -------------------------------------------------------------------------------

  Status norm_mixture_input() {
    const void* gain = p_.weights.post_attention_norm;
    return rms_norm({.x = m_.u,
                     .gain = gain ? gain : m_.ones,
                     .expert = nullptr,
                     .y = m_.normed,
                     .inverse_rms = m_.inverse_u,
                     .rows = n_.tokens,
                     .copies = 1,
                     .rows_per_expert = n_.tokens,
                     .hidden = s_.hidden,
                     .experts = 1,
                     .eps = s_.eps,
                     .rounding = s_.rounding,
                     .dtype = s_.dtype},
                    stream_);
  }

  LinearGroup expert_product(const ConstRows& x, const void* weight, const Rows& y, int64_t in, int64_t out) const {
    LinearGroup g = product(x, weight, in * out, y, in, out);
    g.experts = s_.experts;
    g.offsets = m_.offsets;
    g.rows = n_.pairs;
    return g;
  }

  // The experts' feed-forward parts into `ffn_out`, or at once to where they belong.
  Status feed_forward(const char* x, const int32_t* index) {
    LinearGroup g = expert_product({x, index, s_.hidden}, gate_, {m_.inner, nullptr, s_.inner}, s_.hidden, s_.inner);
    if (s_.whole_block && !s_.post_norm) {
      g.gain = p_.weights.post_attention_norm ? p_.weights.post_attention_norm : m_.ones;
      g.gain_expert_stride = p_.weights.post_attention_norm ? s_.hidden : 0;
      g.inverse_rms = m_.inverse_u;
    }
    if (p_.saved && p_.saved->gate) {
      LinearGroup both[2] = {g, g};
      both[0].y.data = p_.saved->gate;
      both[1].y.data = p_.saved->up;
      both[1].weight = up_;
      MICRO_RETURN_IF_FAILS(linear(both, 2, s_.dtype, stream_, p_.tf32));
      MICRO_RETURN_IF_FAILS(swiglu({p_.saved->gate, p_.saved->up, m_.inner, n_.pairs * s_.inner, s_.dtype}, stream_));
    } else {
      g.up = up_;
      MICRO_RETURN_IF_FAILS(linear(&g, 1, s_.dtype, stream_, p_.tf32));
    }
    return last_matrix();
  }

  Status last_matrix() {
    LinearGroup g =
        expert_product({m_.inner, nullptr, s_.inner}, down_, {m_.ffn_out, nullptr, s_.hidden}, s_.inner, s_.hidden);
    if (s_.whole_block && !s_.post_norm) g.residual = {m_.u, nullptr, s_.hidden};
    if (n_.at_once) {
      g.scale = {p_.route.weights, m_.tokens, 1};
      g.y = {s_.whole_block ? p_.y : m_.mixture, m_.tokens, s_.hidden};
    }
    return linear(&g, 1, s_.dtype, stream_, p_.tf32);
  }

  // y = sum over a token's experts of weight * (u + feed-forward).
  Status add_up_block() {
    if (n_.at_once) return Status::kOk;
    if (!s_.post_norm) return combine_experts(m_.ffn_out, p_.y);
    JoinStep sum = join(m_.u, m_.ffn_out, p_.weights.post_ffn_norm, m_.out, n_.pairs);
    sum.expert = m_.experts;
    sum.active = m_.offsets + s_.experts;
    if (p_.route.k > 1) {
      MICRO_RETURN_IF_FAILS(start(sum));
      return combine_experts(m_.out, p_.y);
    }
    sum.scale = p_.route.weights;
    sum.y = p_.y;
    sum.y_index = m_.tokens;
    return start(sum);
  }

  // y = u + sum over a token's experts of weight * feed-forward, behind a norm with post_norm.
  Status add_up_mixture() {
    if (!n_.at_once) MICRO_RETURN_IF_FAILS(combine_experts(m_.ffn_out, m_.mixture));
    return start(join(m_.u, m_.mixture, s_.post_norm ? p_.weights.post_ffn_norm : nullptr, p_.y, n_.tokens));
  }

  Status combine_experts(const char* rows, void* y) {
    return combine({.y = rows,
                    .weights = p_.route.weights,
                    .experts = m_.experts,
                    .offsets = m_.offsets,
                    .inverse = m_.inverse,
                    .out = y,
                    .token_count = n_.tokens,
                    .k = p_.route.k,
                    .hidden = s_.hidden,
                    .expert_count = s_.experts,
                    .dtype = s_.dtype},
                   stream_);
  }

  JoinStep join(const void* a, const void* b, const void* gain, void* y, int64_t rows) const {
    JoinStep step{};
    step.a = a;
    step.b = b;
    step.gain = gain;
    step.y = y;
    step.rows = rows;
    step.hidden = s_.hidden;
    step.eps = s_.eps;
    step.rounding = s_.rounding;
    return step;
  }

  Status start(const JoinStep& step) {
    const dim3 grid = rows_grid(step.rows), block(kRowThreads);
    return dispatch_device(s_.dtype, [&]<class T>() {
      if (in_vectors<T>(step.hidden, {step.a, step.b, step.gain, step.y}))
        return launch(block_join_kernel<T, kVector<T>>, grid, block, stream_, step);
      return launch(block_join_kernel<T, 1>, grid, block, stream_, step);
    });
  }

  const BlockForwardParams& p_;
  const BlockShape& s_;
  Facts n_;
  DeviceArena arena_;
  Buffers m_;
  void* stream_;
  const void *q_ = nullptr, *k_ = nullptr, *v_ = nullptr, *o_ = nullptr;
  const void *gate_ = nullptr, *up_ = nullptr, *down_ = nullptr;
};

}  // namespace

Status start_turn(const TurnStep& step, DType dtype, void* stream) {
  const dim3 grid = rows_grid(step.queries.rows + step.keys.rows + step.values.rows), block(kRowThreads);
  return dispatch_device(dtype, [&]<class T>() {
    // Half a head is a multiple of four elements.
    constexpr int kN = std::min(4, kVector<T>);
    if (turns_in_vectors<kN>(step)) return launch(block_turn_kernel<T, kN>, grid, block, stream, step);
    return launch(block_turn_kernel<T, 1>, grid, block, stream, step);
  });
}

int64_t block_forward_workspace(const BlockForwardParams& params) {
  DeviceArena arena(nullptr);
  Buffers measured(params, arena);
  return arena.peak();
}

Status block_forward(const BlockForwardParams& params, void* workspace, void* stream) {
  if (params.batch * params.slots == 0) return Status::kOk;
  return Layer(params, workspace, stream).run();
}

}  // namespace micro_kernels::cuda
