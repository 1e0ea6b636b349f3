// A whole layer against the launchers of its operators, one after the other: the same bits, whatever the split into
// calls, the kind of cache, the storage of the weights and the number of threads.

#include "micro_kernels/block_forward.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

#include "micro_kernels/combine.h"
#include "micro_kernels/permute.h"
#include "micro_kernels/plan.h"
#include "micro_kernels/rope.h"
#include "micro_kernels/swiglu.h"

namespace micro_kernels {
namespace {

constexpr int64_t kExperts = 4, kHidden = 72, kHeads = 10, kGroups = 2, kHeadDim = 8, kInner = 80, kRouter = 66;
constexpr int64_t kQueries = kHeads * kHeadDim, kKeys = kGroups * kHeadDim, kPositions = 512;

template <class T>
constexpr DType kTag = std::is_same_v<T, double>  ? DType::kFloat64
                       : std::is_same_v<T, float> ? DType::kFloat32
                                                  : DType::kBFloat16;

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

void two_threads(int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
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

Status run(const BlockForwardParams& p, const ParallelFor& parallel_for = serial) {
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

template <class T>
std::vector<T> slots_of(const std::vector<T>& x, int64_t batch, int64_t first, int64_t last) {
  const int64_t slots = static_cast<int64_t>(x.size()) / kHidden / batch;
  std::vector<T> part;
  for (int64_t b = 0; b < batch; ++b)
    part.insert(part.end(), x.begin() + (b * slots + first) * kHidden, x.begin() + (b * slots + last) * kHidden);
  return part;
}

template <class T>
void expect_same(const Call<T>& got, const Call<T>& want) {
  EXPECT_TRUE(same_bits(got.y, want.y));
  EXPECT_TRUE(same_bits(got.raw, want.raw));
  EXPECT_EQ(got.ids, want.ids);
  EXPECT_TRUE(same_bits(got.weights, want.weights));
  EXPECT_TRUE(same_bits(got.probs, want.probs));
  EXPECT_TRUE(same_bits(got.effective, want.effective));
}

template <class T>
struct BlockForward : testing::Test {};
using Types = testing::Types<float, double, BFloat16>;
TYPED_TEST_SUITE(BlockForward, Types);

// Prefill with a padded row, a chunk and a decoded token.
TYPED_TEST(BlockForward, IsTheSeparateOperators) {
  constexpr int64_t kBatch = 2, kCapacity = 12, kSplits[] = {0, 5, 8, 9};
  const auto x = random_values<TypeParam>(kBatch * 9 * kHidden, 7, 1);
  for (const bool whole : {true, false})
    for (const bool post : {true, false})
      for (const int64_t k : {1, 2, 4}) {
        SCOPED_TRACE(testing::Message() << "whole " << whole << " post " << post << " k " << k);
        const Weights<TypeParam> w(whole, post);
        Store<TypeParam> mine(w, kBatch, kCapacity), theirs(w, kBatch, kCapacity);
        for (int i = 0; i < 3; ++i) {
          const int64_t first = kSplits[i], last = kSplits[i + 1];
          Call<TypeParam> got(w, slots_of(x, kBatch, first, last), kBatch, first, k, kCapacity);
          got.mask.assign(kBatch * last, 1);
          got.mask[0] = got.mask[1] = 0;
          got.real.assign(got.tokens(), 1);
          if (first == 0) got.real[0] = got.real[1] = 0;
          Call<TypeParam> want = got;
          ASSERT_EQ(run(got.params(mine.keys.data(), mine.values.data())), Status::kOk);
          const BlockForwardParams p = want.params(theirs.keys.data(), theirs.values.data());
          Separate<TypeParam> separate(p, w);
          whole ? separate.whole_block(want.x) : separate.shared_attention(want.x);
          expect_same(got, want);
          EXPECT_TRUE(same_bits(mine.keys, theirs.keys));
          EXPECT_TRUE(same_bits(mine.values, theirs.values));
        }
      }
}

TYPED_TEST(BlockForward, SteeringIsTheRouterS) {
  constexpr int64_t kBatch = 2, kSlots = 3, kTokens = kBatch * kSlots;
  using Acc = accumulator_t<TypeParam>;
  const Weights<TypeParam> w(true, false);
  const auto x = random_values<TypeParam>(kTokens * kHidden, 8, 1);
  const std::vector<Acc> bias = random_values<Acc>(kTokens * kExperts, 3, 2);
  std::vector<Acc> rows(kTokens * kExperts, 0);
  for (int64_t t = 0; t < kTokens; ++t) rows[t * kExperts + t % 3] = t == 4 ? 0 : 1;  // token 4 has weight 0: idle
  const bool ablate[kExperts] = {true, false, false, false};
  const int32_t force[kTokens] = {-1, 3, -1, -1, 2, -1}, replay[kTokens] = {3, 2, 1, 0, 1, 2};
  for (int which = 0; which < 4; ++which) {
    Store<TypeParam> mine(w, kBatch, kSlots), theirs(w, kBatch, kSlots);
    Call<TypeParam> got(w, x, kBatch, 0, 1, kSlots), want = got;
    auto steered = [&](Call<TypeParam>& call, Store<TypeParam>& store) {
      BlockForwardParams p = call.params(store.keys.data(), store.values.data());
      if (which == 0) p.route.bias = bias.data(), p.route.bias_stride = kExperts;
      if (which == 1) p.route.ablate = ablate;
      if (which == 2) p.route.force = force, p.route.force_stride = 1;
      if (which == 3) p.route.rows = rows.data(), p.route.replay = replay;
      return p;
    };
    ASSERT_EQ(run(steered(got, mine)), Status::kOk);
    const BlockForwardParams p = steered(want, theirs);
    Separate<TypeParam>(p, w).whole_block(want.x);
    expect_same(got, want);
  }
}

TEST(BlockForward, GivenRowsNeedNoRouter) {
  const Weights<float> w(true, false);
  std::vector<float> rows(3 * kExperts, 0);
  for (int t = 0; t < 3; ++t) rows[t * kExperts + t] = 1;
  Call<float> with(w, random_values<float>(3 * kHidden, 9, 1), 1, 0, 1, 3), without = with;
  BlockForwardParams p = with.params(nullptr, nullptr);
  p.route.rows = rows.data();
  ASSERT_EQ(run(p), Status::kOk);
  p = without.params(nullptr, nullptr);
  p.route.rows = rows.data();
  p.raw = nullptr;
  p.weights.router_in = p.weights.router_out = {};
  ASSERT_EQ(run(p), Status::kOk);
  EXPECT_TRUE(same_bits(with.y, without.y));
}

TYPED_TEST(BlockForward, NoCacheIsAFreshCache) {
  const auto x = random_values<TypeParam>(2 * 5 * kHidden, 10, 1);
  for (const bool whole : {true, false})
    for (const bool post : {true, false}) {
      const Weights<TypeParam> w(whole, post);
      Store<TypeParam> store(w, 2, 5);
      Call<TypeParam> cached(w, x, 2, 0, 1, 5), free = cached;
      const int32_t expert = 2;  // one expert only: the others' keys are not made
      BlockForwardParams p = cached.params(store.keys.data(), store.values.data());
      p.route.force = &expert;
      ASSERT_EQ(run(p), Status::kOk);
      p = free.params(nullptr, nullptr);
      p.route.force = &expert;
      ASSERT_EQ(run(p), Status::kOk);
      expect_same(free, cached);
    }
}

// Every split into calls, and keys made late, give what one call with all keys gives.
TYPED_TEST(BlockForward, LazyIsEager) {
  constexpr int64_t kBatch = 2, kSlots = 12, kSplits[] = {0, 5, 6, 7, 11, 12};
  const auto x = random_values<TypeParam>(kBatch * kSlots * kHidden, 11, 1);
  for (const bool post : {true, false})
    for (const int64_t k : {1, 2}) {
      const Weights<TypeParam> w(true, post);
      Store<TypeParam> eager(w, kBatch, kSlots), lazy(w, kBatch, kSlots);
      Late<TypeParam> late(kBatch, kSlots);
      Call<TypeParam> want(w, x, kBatch, 0, k, kSlots);
      ASSERT_EQ(run(want.params(eager.keys.data(), eager.values.data())), Status::kOk);
      bool skipped = false;
      for (int i = 0; i < 5; ++i) {
        const int64_t first = kSplits[i], last = kSplits[i + 1];
        Call<TypeParam> got(w, slots_of(x, kBatch, first, last), kBatch, first, k, kSlots);
        BlockForwardParams p = got.params(lazy.keys.data(), lazy.values.data());
        late.use(p);
        ASSERT_EQ(run(p), Status::kOk);
        EXPECT_TRUE(same_bits(got.y, slots_of(want.y, kBatch, first, last))) << first;
        for (const int32_t filled : late.filled) {
          EXPECT_LE(filled, last);
          skipped = skipped || filled < last;
        }
      }
      EXPECT_TRUE(skipped) << "some expert lags behind";
    }
}

TEST(BlockForward, LongBacklogsAreWorkedOff) {
  constexpr int64_t kSlots = 301;
  const auto x = random_values<float>(kSlots * kHidden, 12, 1);
  for (const bool post : {true, false}) {
    const Weights<float> w(true, post);
    std::vector<int32_t> force(kSlots, 0);
    force.back() = 3;
    Store<float> eager(w, 1, kSlots), lazy(w, 1, kSlots);
    Call<float> want(w, x, 1, 0, 1, kSlots);
    BlockForwardParams p = want.params(eager.keys.data(), eager.values.data());
    p.route.force = force.data();
    p.route.force_stride = 1;
    ASSERT_EQ(run(p), Status::kOk);
    Late<float> late(1, kSlots);
    for (const auto& [first, last] : {std::pair<int64_t, int64_t>{0, 300}, {300, 301}}) {
      Call<float> got(w, slots_of(x, 1, first, last), 1, first, 1, kSlots);
      p = got.params(lazy.keys.data(), lazy.values.data());
      p.route.force = force.data() + first;
      p.route.force_stride = 1;
      late.use(p);
      ASSERT_EQ(run(p), Status::kOk);
      EXPECT_TRUE(same_bits(got.y, slots_of(want.y, 1, first, last)));
    }
    EXPECT_EQ(late.filled, (std::vector<int32_t>{300, 0, 0, 301}));
  }
}

// Rows of lengths 4, 2 and 0, right-padded, each behind slots of its own.
TYPED_TEST(BlockForward, RaggedRowsAreSingleRows) {
  constexpr int64_t kBatch = 3, kSlots = 4, kCapacity = 9;
  const std::vector<int32_t> starts{0, 3, 5};
  const int64_t lengths[] = {4, 2, 0};
  for (const bool whole : {true, false}) {
    std::vector<std::vector<TypeParam>> want;  // by the eager cache
    for (const bool lazy : {false, true}) {
      if (lazy && !whole) continue;
      const Weights<TypeParam> w(whole, false);
      Store<TypeParam> store(w, kBatch, kCapacity);
      Late<TypeParam> late(kBatch, kCapacity);
      const int64_t row_size = static_cast<int64_t>(store.keys.size()) / kBatch;
      const auto before = random_values<TypeParam>(kBatch * 5 * kHidden, 13, 1);
      const auto x = random_values<TypeParam>(kBatch * kSlots * kHidden, 14, 1);
      for (int64_t b = 0; b < kBatch; ++b) {
        const auto all = slots_of(before, kBatch, 0, starts[b]);
        const std::vector<TypeParam> own(all.begin() + b * starts[b] * kHidden,
                                         all.begin() + (b + 1) * starts[b] * kHidden);
        auto filled_to = [&](BlockForwardParams& p) {
          if (!lazy) return;
          late.use(p);
          p.cache.x = late.x.data() + b * kCapacity * kHidden;
          p.cache.filled = late.filled.data() + b * kExperts;
        };
        if (starts[b]) {
          Call<TypeParam> call(w, own, 1, 0, 1, kCapacity);
          BlockForwardParams p = call.params(store.keys.data() + b * row_size, store.values.data() + b * row_size);
          filled_to(p);
          ASSERT_EQ(run(p), Status::kOk);
        }
        if (lazy) continue;
        want.emplace_back();
        if (lengths[b] == 0) continue;
        Store<TypeParam> copy = store;
        Call<TypeParam> alone(w, {x.begin() + b * kSlots * kHidden, x.begin() + (b * kSlots + lengths[b]) * kHidden}, 1,
                              starts[b], 1, kCapacity);
        ASSERT_EQ(run(alone.params(copy.keys.data() + b * row_size, copy.values.data() + b * row_size)), Status::kOk);
        want.back() = alone.y;
      }
      Call<TypeParam> got(w, x, kBatch, 0, 1, kCapacity);
      got.real.clear();
      for (int64_t b = 0; b < kBatch; ++b)
        for (int64_t s = 0; s < kSlots; ++s) {
          got.real.push_back(s < lengths[b]);
          got.position[b * kSlots + s] = static_cast<int32_t>(starts[b] + s);
        }
      const Store<TypeParam> untouched = store;
      BlockForwardParams p = got.params(store.keys.data(), store.values.data());
      p.starts = starts.data();
      p.keys = kCapacity;
      if (lazy) late.use(p);
      ASSERT_EQ(run(p), Status::kOk);
      for (int64_t b = 0; b < kBatch; ++b) {
        const std::vector<TypeParam> mine(got.y.begin() + b * kSlots * kHidden,
                                          got.y.begin() + b * kSlots * kHidden + want[b].size());
        EXPECT_TRUE(same_bits(mine, want[b])) << "row " << b;
      }
      const auto tail = [&](const Store<TypeParam>& s) {
        return std::vector<TypeParam>(s.keys.begin() + 2 * row_size, s.keys.end());
      };
      EXPECT_TRUE(same_bits(tail(store), tail(untouched))) << "a row without tokens keeps its keys";
    }
  }
}

TEST(BlockForward, DecodingTakesSixRegions) {
  for (const bool whole : {true, false})
    for (const bool lazy : {false, true}) {
      if (lazy && !whole) continue;
      const Weights<float> w(whole, true);
      Store<float> store(w, 1, 8);
      Late<float> late(1, 8);
      int64_t regions = 0;
      for (const int64_t slot : {0, 1, 2, 3}) {
        Call<float> call(w, random_values<float>(kHidden, static_cast<int>(slot), 1), 1, slot, 1, 8);
        BlockForwardParams p = call.params(store.keys.data(), store.values.data());
        if (lazy) late.use(p);
        ASSERT_EQ(run(p), Status::kOk);
        regions = std::max(regions, call.regions);
      }
      EXPECT_EQ(regions, 6);
    }
}

TYPED_TEST(BlockForward, PackedWeightsAndThreadsChangeNoBit) {
  const Weights<TypeParam> plain(true, false);
  Weights<TypeParam> packed = plain;
  std::vector<std::vector<TypeParam>> memory;
  auto pack = [&](std::vector<Matrix>& matrices, const std::vector<Matrix>& from, int64_t in, int64_t out) {
    for (int64_t e = 0; e < kExperts; ++e) {
      memory.emplace_back(cpu::packed_elements(in, out));
      ASSERT_EQ(cpu::pack_weight(from[e].data, in, out, kTag<TypeParam>, memory.back().data(), serial), Status::kOk);
      matrices[e] = {memory.back().data(), nullptr, WeightFormat::kPacked};
    }
  };
  pack(packed.mq, plain.mq, kHidden, kQueries);
  pack(packed.mk, plain.mk, kHidden, kKeys);
  pack(packed.mo, plain.mo, kQueries, kHidden);
  pack(packed.mgate, plain.mgate, kHidden, kInner);
  pack(packed.mup, plain.mup, kHidden, kInner);
  pack(packed.mdown, plain.mdown, kInner, kHidden);
  const auto x = random_values<TypeParam>(2 * 7 * kHidden, 15, 1);
  Call<TypeParam> one(plain, x, 2, 0, 2, 7), two(packed, x, 2, 0, 2, 7);
  ASSERT_EQ(run(one.params(nullptr, nullptr)), Status::kOk);
  ASSERT_EQ(run(two.params(nullptr, nullptr), two_threads), Status::kOk);
  expect_same(two, one);
}

// Gains of one are what a missing gain means; a folded router has one matrix in the accumulator type.
TYPED_TEST(BlockForward, FoldedGainsAndRouter) {
  using Acc = accumulator_t<TypeParam>;
  Weights<TypeParam> w(true, false);
  w.input_norm.assign(w.input_norm.size(), TypeParam(Acc(1)));
  w.post_attention_norm = w.input_norm;
  std::vector<Acc> folded(kExperts * kHidden, 0);
  for (int64_t e = 0; e < kExperts; ++e)
    for (int64_t h = 0; h < kHidden; ++h)
      for (int64_t r = 0; r < kRouter; ++r)
        folded[e * kHidden + h] +=
            static_cast<Acc>(w.router_out[e * kRouter + r]) * static_cast<Acc>(w.router_in[r * kHidden + h]);
  Call<TypeParam> want(w, random_values<TypeParam>(6 * kHidden, 16, 1), 1, 0, 1, 6), got = want;
  for (const bool cached : {true, false}) {
    Store<TypeParam> a(w, 1, 6), b(w, 1, 6);
    ASSERT_EQ(run(want.params(cached ? a.keys.data() : nullptr, a.values.data())), Status::kOk);
    BlockForwardParams p = got.params(cached ? b.keys.data() : nullptr, b.values.data());
    p.weights.input_norm = p.weights.post_attention_norm = nullptr;
    p.shape.router_hidden = 0;
    p.weights.router_in = {};
    p.weights.router_out = {folded.data(), nullptr, WeightFormat::kPlain};
    std::vector<Acc> raw(6 * kExperts);
    p.raw = raw.data();
    ASSERT_EQ(run(p), Status::kOk);
    ASSERT_EQ(got.ids, want.ids) << "no near-tie among these";
    EXPECT_TRUE(same_bits(got.y, want.y));
    for (size_t i = 0; i < raw.size(); ++i)
      EXPECT_NEAR(raw[i], static_cast<double>(static_cast<Acc>(want.raw[i])),
                  kTag<TypeParam> == DType::kBFloat16 ? 0.2 : 1e-4);
  }
}

TEST(BlockForward, TheResultMayReplaceTheInput) {
  for (const bool whole : {true, false}) {
    const Weights<float> w(whole, false);
    Call<float> apart(w, random_values<float>(5 * kHidden, 17, 1), 1, 0, 2, 5), inside = apart;
    ASSERT_EQ(run(apart.params(nullptr, nullptr)), Status::kOk);
    BlockForwardParams p = inside.params(nullptr, nullptr);
    p.y = inside.x.data();
    ASSERT_EQ(run(p), Status::kOk);
    EXPECT_TRUE(same_bits(inside.x, apart.y));
  }
}

TEST(BlockForward, IndicesOutsideAreRefused) {
  const Weights<float> w(true, false);
  Call<float> call(w, random_values<float>(2 * kHidden, 18, 1), 1, 0, 1, 2);
  const int32_t force = kExperts;
  BlockForwardParams p = call.params(nullptr, nullptr);
  p.route.force = &force;
  EXPECT_EQ(run(p), Status::kIndexOutOfRange);
  call.position[1] = kPositions;
  EXPECT_EQ(run(call.params(nullptr, nullptr)), Status::kIndexOutOfRange);
}

}  // namespace
}  // namespace micro_kernels
