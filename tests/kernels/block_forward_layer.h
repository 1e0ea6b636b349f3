#pragma once
// For the tests of the block: random parameters, one call, caches, and the same layer from the launchers of its
// operators, one after the other.

#include <gtest/gtest.h>

#include <cmath>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

#include "micro_kernels/block_forward.h"
#include "micro_kernels/combine.h"
#include "micro_kernels/permute.h"
#include "micro_kernels/plan.h"
#include "micro_kernels/rope.h"
#include "micro_kernels/swiglu.h"

namespace micro_kernels {

constexpr int64_t kExperts = 4, kHidden = 72, kHeads = 10, kGroups = 2, kHeadDim = 8, kInner = 80, kRouter = 66;
constexpr int64_t kQueries = kHeads * kHeadDim, kKeys = kGroups * kHeadDim, kPositions = 512;

template <class T>
constexpr DType kTag = std::is_same_v<T, double>  ? DType::kFloat64
                       : std::is_same_v<T, float> ? DType::kFloat32
                                                  : DType::kBFloat16;

inline void two_threads(int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
  if (count <= grain) return body(0, count);
  std::thread other([&] { body(0, count / 2); });
  body(count / 2, count);
  other.join();
}

template <class T>
std::vector<T> random_values(int64_t count, int seed, float scale, float mean = 0) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(mean, scale);
  std::vector<T> values;
  for (int64_t i = 0; i < count; ++i) values.push_back(T(normal(random)));
  return values;
}

// The parameters of a layer; matrices that FFN experts share have one copy.
template <class T>
struct Weights {
  bool whole_block, post_norm;
  std::vector<T> q, k, v, o, gate, up, down, router_in, router_out;
  std::vector<T> input_norm, post_attention_norm, post_ffn_norm, q_norm, k_norm;
  std::vector<Matrix> mq, mk, mv, mo, mgate, mup, mdown;

  Weights(bool whole, bool post) : whole_block(whole), post_norm(post) {
    const int64_t a = attention_experts();
    auto matrix = [seed = 1](int64_t count, float scale) mutable { return random_values<T>(count, seed++, scale); };
    q = matrix(a * kQueries * kHidden, 0.2f);
    k = matrix(a * kKeys * kHidden, 0.2f);
    v = matrix(a * kKeys * kHidden, 0.2f);
    o = matrix(a * kHidden * kQueries, 0.2f);
    gate = matrix(kExperts * kInner * kHidden, 0.2f);
    up = matrix(kExperts * kInner * kHidden, 0.2f);
    down = matrix(kExperts * kHidden * kInner, 0.2f);
    router_in = matrix(kRouter * kHidden, 0.3f);
    router_out = matrix(kExperts * kRouter, 0.3f);
    auto gain = [seed = 90](int64_t count) mutable { return random_values<T>(count, seed++, 0.2f, 1); };
    input_norm = gain(a * kHidden);
    post_attention_norm = gain(a * kHidden);
    post_ffn_norm = gain(a * kHidden);
    q_norm = gain(a * kQueries);
    k_norm = gain(a * kKeys);
    mq = plain(q, a);
    mk = plain(k, a);
    mv = plain(v, a);
    mo = plain(o, a);
    mgate = plain(gate, kExperts);
    mup = plain(up, kExperts);
    mdown = plain(down, kExperts);
  }

  int64_t attention_experts() const { return whole_block ? kExperts : 1; }
  static std::vector<Matrix> plain(const std::vector<T>& values, int64_t experts) {
    std::vector<Matrix> matrices(experts);
    const int64_t size = static_cast<int64_t>(values.size()) / experts;
    for (int64_t e = 0; e < experts; ++e) matrices[e].data = values.data() + e * size;
    return matrices;
  }
  BlockWeights params() const {
    return {.q = mq.data(),
            .k = mk.data(),
            .v = mv.data(),
            .o = mo.data(),
            .gate = mgate.data(),
            .up = mup.data(),
            .down = mdown.data(),
            .router_in = plain(router_in, 1)[0],
            .router_out = plain(router_out, 1)[0],
            .input_norm = post_norm ? nullptr : input_norm.data(),
            .post_attention_norm = post_attention_norm.data(),
            .post_ffn_norm = post_norm ? post_ffn_norm.data() : nullptr,
            .q_norm = post_norm ? q_norm.data() : nullptr,
            .k_norm = post_norm ? k_norm.data() : nullptr};
  }
};

// One call: its inputs, its results, and its parameters.
template <class T>
struct Call {
  using Acc = accumulator_t<T>;
  const Weights<T>& w;
  int64_t batch, slots, start, k, capacity;
  std::vector<T> x, y, raw, weights;
  std::vector<Acc> probs, effective, cos, sin;
  std::vector<int32_t> ids, position;
  std::vector<uint8_t> real, mask;  // empty: all
  int64_t regions = 0;

  Call(const Weights<T>& weights_, std::vector<T> x_, int64_t batch_, int64_t start_, int64_t k_, int64_t capacity_)
      : w(weights_), batch(batch_), start(start_), k(k_), capacity(capacity_), x(std::move(x_)) {
    const int64_t tokens = static_cast<int64_t>(x.size()) / kHidden;
    slots = tokens / batch;
    y.resize(x.size());
    raw.resize(tokens * kExperts);
    weights.resize(tokens * k);
    probs.resize(tokens * kExperts);
    effective.resize(tokens * kExperts);
    ids.resize(tokens * k);
    for (int64_t t = 0; t < tokens; ++t) position.push_back(static_cast<int32_t>(start + t % slots));
    for (int64_t i = 0; i < kPositions * kHeadDim / 2; ++i) {
      const double angle = i / (kHeadDim / 2) * std::pow(100.0, -static_cast<double>(i % (kHeadDim / 2)));
      cos.push_back(static_cast<Acc>(std::cos(angle)));
      sin.push_back(static_cast<Acc>(std::sin(angle)));
    }
  }

  int64_t tokens() const { return batch * slots; }
  HeadStrides strides() const {
    return {w.attention_experts() * kGroups * capacity * kHeadDim, kGroups * capacity * kHeadDim, capacity * kHeadDim,
            kHeadDim};
  }
  BlockForwardParams params(T* keys, T* values) {
    BlockForwardParams p{};
    p.shape = {.hidden = kHidden,
               .heads = kHeads,
               .groups = kGroups,
               .head_dim = kHeadDim,
               .inner = kInner,
               .experts = kExperts,
               .router_hidden = kRouter,
               .whole_block = w.whole_block,
               .post_norm = w.post_norm,
               .eps = 1e-5,
               .rounding = w.post_norm ? GainRounding::kAfterGain : GainRounding::kBeforeGain,
               .dtype = kTag<T>};
    p.weights = w.params();
    p.cache.k = keys;
    p.cache.v = values;
    p.cache.k_strides = p.cache.v_strides = strides();
    p.x = x.data();
    p.y = y.data();
    p.batch = batch;
    p.slots = slots;
    p.start = start;
    p.keys = start + slots;
    if (!real.empty()) p.real = reinterpret_cast<const bool*>(real.data());
    if (!mask.empty()) p.mask = mask.data(), p.mask_kind = AttentionMask::kKeys;
    p.cos = cos.data();
    p.sin = sin.data();
    p.positions = kPositions;
    p.position = position.data();
    p.scale = 0.35;
    p.route.ids = ids.data();
    p.route.weights = weights.data();
    p.route.probs = probs.data();
    p.route.effective = effective.data();
    p.route.k = k;
    p.raw = raw.data();
    p.regions = &regions;
    return p;
  }
};

inline Status run(const BlockForwardParams& p, const ParallelFor& parallel_for = serial) {
  std::vector<char> memory(cpu::block_forward_workspace(p) + 64, 0x7f);
  char* aligned = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64;
  return cpu::block_forward(p, aligned, parallel_for);
}

// The separate operators, one after the other.
template <class T>
struct Separate {
  const BlockForwardParams& p;
  const Weights<T>& w;
  int64_t tokens, pairs;
  std::vector<int32_t> rows, experts, offsets, inverse;

  Separate(const BlockForwardParams& params, const Weights<T>& weights)
      : p(params), w(weights), tokens(p.batch * p.slots), pairs(tokens * p.route.k) {}

  std::vector<T> multiply(const std::vector<T>& x, const Matrix* matrices, const std::vector<int32_t>& bounds,
                          int64_t in, int64_t out) {
    std::vector<T> y(x.size() / in * out, T(0.0f));
    for (size_t e = 0; e + 1 < bounds.size(); ++e) {
      LinearPart part;
      part.x = {x.data() + bounds[e] * in, nullptr, in};
      part.matrix = matrices[e];
      part.y = {y.data() + bounds[e] * out, nullptr, out};
      part.rows = bounds[e + 1] - bounds[e];
      part.in = in;
      part.out = out;
      EXPECT_EQ(cpu::linear(&part, 1, kTag<T>, serial), Status::kOk);
    }
    return y;
  }
  std::vector<T> norm(const std::vector<T>& x, const std::vector<T>& gain, int64_t width, const int32_t* expert,
                      int64_t copies = 1) {
    const int64_t count = static_cast<int64_t>(x.size()) / width;
    std::vector<T> y(x.size() * copies);
    std::vector<accumulator_t<T>> rms(count);
    EXPECT_EQ(cpu::rms_norm({x.data(), gain.data(), expert, y.data(), rms.data(), count, copies, count, width,
                             static_cast<int64_t>(gain.size()) / width, p.shape.eps, p.shape.rounding, kTag<T>},
                            serial),
              Status::kOk);
    return y;
  }
  std::vector<T> rotate(const std::vector<T>& x, int64_t heads, const std::vector<int32_t>& positions) {
    std::vector<T> y(x.size());
    EXPECT_EQ(cpu::rope({x.data(), p.cos, p.sin, positions.data(), y.data(), static_cast<int64_t>(positions.size()),
                         p.positions, heads, kHeadDim, RopeDirection::kForward, kTag<T>},
                        serial),
              Status::kOk);
    return y;
  }
  std::vector<T> permuted(const std::vector<T>& x) {
    std::vector<T> y(pairs * kHidden);
    EXPECT_EQ(cpu::permute({x.data(), rows.data(), offsets.data(), y.data(), tokens, pairs, kHidden, kExperts, kTag<T>},
                           serial),
              Status::kOk);
    return y;
  }
  static std::vector<T> sum(const std::vector<T>& a, const std::vector<T>& b) {
    using Acc = accumulator_t<T>;
    std::vector<T> y;
    for (size_t i = 0; i < a.size(); ++i) y.push_back(T(static_cast<Acc>(a[i]) + static_cast<Acc>(b[i])));
    return y;
  }

  void decide(const std::vector<T>& x) {
    RouteParams route = p.route;
    const std::vector<int32_t> whole{0, static_cast<int32_t>(tokens)};
    const auto logits = multiply(multiply(x, &p.weights.router_in, whole, kHidden, kRouter), &p.weights.router_out,
                                 whole, kRouter, kExperts);
    if (p.raw) std::copy(logits.begin(), logits.end(), static_cast<T*>(p.raw));
    route.logits = logits.data();
    route.tokens = tokens;
    route.experts = kExperts;
    route.dtype = kTag<T>;
    ASSERT_EQ(cpu::route(route, serial), Status::kOk);
    rows.resize(pairs);
    experts.resize(pairs);
    offsets.resize(kExperts + 1);
    inverse.resize(pairs);
    ASSERT_EQ(cpu::plan({p.route.ids, p.route.weights, p.real, rows.data(), experts.data(), offsets.data(),
                         inverse.data(), tokens, p.route.k, kExperts, kTag<T>},
                        serial),
              Status::kOk);
  }

  // Keys and values of all experts at the call's slots, n [experts, T, H].
  void keep_keys(const std::vector<T>& n) {
    const int64_t count = w.attention_experts();
    std::vector<int32_t> bounds, positions;
    for (int64_t e = 0; e <= count; ++e) bounds.push_back(static_cast<int32_t>(e * tokens));
    for (int64_t r = 0; r < count * tokens; ++r) positions.push_back(p.position[r % tokens]);
    std::vector<int32_t> expert;
    for (int64_t r = 0; r < count * tokens; ++r) expert.push_back(static_cast<int32_t>(r / tokens));
    std::vector<T> k = multiply(n, p.weights.k, bounds, kHidden, kKeys),
                   v = multiply(n, p.weights.v, bounds, kHidden, kKeys);
    if (w.post_norm) k = norm(k, w.k_norm, kKeys, expert.data());
    k = rotate(k, kGroups, positions);
    const HeadStrides& s = p.cache.k_strides;
    for (int64_t r = 0; r < count * tokens; ++r) {
      const int64_t b = r % tokens / p.slots, slot = p.start + r % tokens % p.slots;
      for (int64_t g = 0; g < kGroups; ++g) {
        const int64_t at = b * s.batch + r / tokens * s.expert + g * s.group + slot * s.key;
        std::copy_n(k.data() + (r * kGroups + g) * kHeadDim, kHeadDim, static_cast<T*>(p.cache.k) + at);
        std::copy_n(v.data() + (r * kGroups + g) * kHeadDim, kHeadDim, static_cast<T*>(p.cache.v) + at);
      }
    }
  }

  std::vector<T> attention(std::vector<T> q, const std::vector<int32_t>& q_tokens,
                           const std::vector<int32_t>& q_offsets, const int32_t* expert) {
    if (w.post_norm) q = norm(q, w.q_norm, kQueries, expert);
    std::vector<int32_t> positions;
    for (const int32_t t : q_tokens) positions.push_back(p.position[t]);
    q = rotate(q, kHeads, positions);
    const int64_t count = static_cast<int64_t>(q_tokens.size());
    std::vector<T> out(q.size());
    std::vector<accumulator_t<T>> logsumexp(count * kHeads);
    EXPECT_EQ(cpu::expert_attention({.shape = {.tokens = q_tokens.data(),
                                               .offsets = q_offsets.data(),
                                               .mask = p.mask,
                                               .mask_kind = p.mask_kind,
                                               .masks = p.masks,
                                               .rows = count,
                                               .heads = kHeads,
                                               .groups = kGroups,
                                               .head_dim = kHeadDim,
                                               .batch = p.batch,
                                               .experts = w.attention_experts(),
                                               .slots = p.slots,
                                               .keys = p.keys,
                                               .start = p.start,
                                               .starts = nullptr,
                                               .scale = p.scale,
                                               .dtype = kTag<T>},
                                     .q = q.data(),
                                     .k = p.cache.k,
                                     .v = p.cache.v,
                                     .k_strides = p.cache.k_strides,
                                     .v_strides = p.cache.v_strides,
                                     .out = out.data(),
                                     .logsumexp = logsumexp.data()},
                                    serial),
              Status::kOk);
    return out;
  }

  std::vector<T> feed_forward(const std::vector<T>& n) {
    const auto gate = multiply(n, p.weights.gate, offsets, kHidden, kInner);
    const auto up = multiply(n, p.weights.up, offsets, kHidden, kInner);
    std::vector<T> inner(gate.size());
    EXPECT_EQ(cpu::swiglu({gate.data(), up.data(), inner.data(), static_cast<int64_t>(gate.size()), kTag<T>}, serial),
              Status::kOk);
    return multiply(inner, p.weights.down, offsets, kInner, kHidden);
  }
  std::vector<T> combined(const std::vector<T>& out) {
    std::vector<T> y(tokens * kHidden);
    EXPECT_EQ(cpu::combine({out.data(), p.route.weights, experts.data(), offsets.data(), inverse.data(), y.data(),
                            tokens, p.route.k, kHidden, kExperts, kTag<T>},
                           serial),
              Status::kOk);
    return y;
  }

  void whole_block(const std::vector<T>& x) {
    decide(x);
    std::vector<T> copies;
    for (int64_t e = 0; e < kExperts; ++e) copies.insert(copies.end(), x.begin(), x.end());
    keep_keys(w.post_norm ? copies : norm(x, w.input_norm, kHidden, nullptr, kExperts));
    const auto xs = permuted(x);
    const auto q = multiply(w.post_norm ? xs : norm(xs, w.input_norm, kHidden, experts.data()), p.weights.q, offsets,
                            kHidden, kQueries);
    auto a = multiply(attention(q, rows, offsets, experts.data()), p.weights.o, offsets, kQueries, kHidden);
    if (w.post_norm) a = norm(a, w.post_attention_norm, kHidden, experts.data());
    const auto u = sum(xs, a);
    auto f = feed_forward(w.post_norm ? u : norm(u, w.post_attention_norm, kHidden, experts.data()));
    if (w.post_norm) f = norm(f, w.post_ffn_norm, kHidden, experts.data());
    const auto y = combined(sum(u, f));
    std::copy(y.begin(), y.end(), static_cast<T*>(p.y));
  }

  void shared_attention(const std::vector<T>& x) {
    const auto n = w.post_norm ? x : norm(x, w.input_norm, kHidden, nullptr);
    keep_keys(n);
    std::vector<int32_t> all(tokens), whole{0, static_cast<int32_t>(tokens)};
    std::iota(all.begin(), all.end(), 0);
    const auto q = multiply(n, p.weights.q, whole, kHidden, kQueries);
    auto a = multiply(attention(q, all, whole, nullptr), p.weights.o, whole, kQueries, kHidden);
    if (w.post_norm) a = norm(a, w.post_attention_norm, kHidden, nullptr);
    const auto u = sum(x, a);
    const auto m = w.post_norm ? u : norm(u, w.post_attention_norm, kHidden, nullptr);
    decide(m);
    auto f = combined(feed_forward(permuted(m)));
    if (w.post_norm) f = norm(f, w.post_ffn_norm, kHidden, nullptr);
    const auto y = sum(u, f);
    std::copy(y.begin(), y.end(), static_cast<T*>(p.y));
  }
};

template <class T>
struct Store {
  std::vector<T> keys, values;
  Store(const Weights<T>& w, int64_t batch, int64_t capacity)
      : keys(batch * w.attention_experts() * kGroups * capacity * kHeadDim, T(0.0f)), values(keys) {}
};

// A lazy cache of whole-block experts.
template <class T>
struct Late {
  std::vector<T> x;
  std::vector<int32_t> filled, positions;
  int64_t capacity;
  Late(int64_t batch, int64_t capacity_)
      : x(batch * capacity_ * kHidden, T(0.0f)), filled(batch * kExperts, 0), capacity(capacity_) {}
  void use(BlockForwardParams& p) {
    p.cache.x = x.data();
    p.cache.x_batch_stride = capacity * kHidden;
    p.cache.filled = filled.data();
  }
};

}  // namespace micro_kernels
