// The gradient of a whole layer on every back end, against the CPU's in float64.

#include "micro_kernels/block_train.h"

#include <gtest/gtest.h>

#include <cstring>

#include "layer_problem.h"

namespace micro_kernels {
namespace {

constexpr int64_t kBatch = 2, kSlots = 6, kTokens = kBatch * kSlots;

template <class T>
constexpr bool kOnHost = false;
template <class T>
constexpr bool kOnHost<HostArray<T>> = true;

// The launchers of a back end: the CPU's for arrays of the host, else this program's.
template <template <class> class Memory>
struct Launchers {
  static Status forward(const BlockForwardParams& p) {
#ifdef MICRO_TEST_CUDA
    if constexpr (!kOnHost<Memory<float>>) return MICRO_RUN_WITH_WORKSPACE(block_forward, p);
#endif
    std::vector<char> memory(cpu::block_forward_workspace(p) + 64, 0x7f);
    return cpu::block_forward(p, aligned(memory), serial);
  }
  static Status backward(const BlockTrainBackwardParams& p) {
#ifdef MICRO_TEST_CUDA
    if constexpr (!kOnHost<Memory<float>>) return MICRO_RUN_WITH_WORKSPACE(block_train_backward, p);
#endif
    std::vector<char> memory(cpu::block_train_backward_workspace(p) + 64, 0x7f);
    return cpu::block_train_backward(p, aligned(memory), serial);
  }
  static char* aligned(std::vector<char>& memory) {
    return memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64;
  }
};

struct Case {
  int64_t k;
  WeightRule rule;
  bool keeps_gate, keeps_out;
  bool odd = false;  // widths without vectors, heads that the grouped product does not turn
};

constexpr const char* kNames[] = {"x",  "q",    "k",         "v",          "o",          "gate",
                                  "up", "down", "router_in", "router_out", "input_norm", "post_attention_norm"};
constexpr void* BlockGradients::*kPlaces[] = {
    &BlockGradients::x,          &BlockGradients::q,          &BlockGradients::k,
    &BlockGradients::v,          &BlockGradients::o,          &BlockGradients::gate,
    &BlockGradients::up,         &BlockGradients::down,       &BlockGradients::router_in,
    &BlockGradients::router_out, &BlockGradients::input_norm, &BlockGradients::post_attention_norm};
constexpr size_t kLeaves = std::size(kPlaces);

// A layer of Rounded numbers in the type T: the forward that keeps what the backward reads, and a gradient for each
// result.
template <class T, template <class> class Memory, class Rounded>
struct Training {
  using Acc = accumulator_t<T>;
  LayerParameters<T, Memory, Rounded> layer;
  LayerSizes s;
  Case c;
  int64_t pairs;
  Memory<T> x, y, raw, weights, grad_y, grad_raw;
  Memory<Acc> probs, effective, cos, sin, grad_probs, logsumexp;
  Memory<int32_t> replay, ids, tokens, experts, offsets, inverse;
  Memory<T> q, k, v, attention, behind, mid, gate, up, out;
  Memory<uint8_t> real;
  BlockSaved saved{};

  static LayerSizes sizes(bool odd) {
    LayerSizes s;
    s.hidden = 40, s.heads = 2, s.groups = 1, s.inner = 24, s.router_hidden = 16;
    if (odd) s.hidden = 43, s.head_dim = 8, s.inner = 25, s.router_hidden = 17, s.experts = 5;
    return s;
  }
  template <class V>
  static std::vector<V> random(int64_t count, unsigned seed) {
    return rounded_to<V>(as_doubles(rounded_to<Rounded>(random_doubles(count, seed, 1))));
  }
  // Nobody goes to the last expert but with more than one expert for each token.
  static std::vector<int32_t> given_ids(int64_t k) {
    std::vector<int32_t> ids;
    for (int64_t t = 0; t < kTokens; ++t)
      for (int64_t i = 0; i < k; ++i) ids.push_back(static_cast<int32_t>((t * t + i) % (k + 2)));
    return ids;
  }
  static std::vector<Acc> table(int64_t half, bool sine) {
    std::vector<Acc> values;
    for (int64_t i = 0; i < kTokens * half; ++i) {
      const double angle = static_cast<double>(i / half) / static_cast<double>(1 + i % half);
      values.push_back(static_cast<Acc>(static_cast<float>(sine ? std::sin(angle) : std::cos(angle))));
    }
    return values;
  }

  explicit Training(const Case& c_)
      : layer(sizes(c_.odd)),
        s(layer.sizes),
        c(c_),
        pairs(kTokens * c.k),
        x(random<T>(kTokens * s.hidden, 5)),
        y(kTokens * s.hidden),
        raw(kTokens * s.experts),
        weights(pairs),
        grad_y(random<T>(kTokens * s.hidden, 6)),
        grad_raw(random<T>(kTokens * s.experts, 7)),
        probs(kTokens * s.experts),
        effective(kTokens * s.experts),
        cos(table(s.head_dim / 2, false)),
        sin(table(s.head_dim / 2, true)),
        grad_probs(random<Acc>(kTokens * s.experts, 8)),
        logsumexp(pairs * s.heads),
        replay(given_ids(c.k)),
        ids(pairs),
        tokens(pairs),
        experts(pairs),
        offsets(s.experts + 1),
        inverse(pairs),
        q(pairs * s.query_width()),
        k(kTokens * s.experts * s.key_width()),
        v(kTokens * s.experts * s.key_width()),
        attention(pairs * s.query_width()),
        behind(pairs * s.hidden),
        mid(kTokens * s.router_hidden),
        gate(pairs * s.inner),
        up(pairs * s.inner),
        out(pairs * s.hidden),
        real([] {
          std::vector<uint8_t> all(kTokens, 1);
          all[0] = 0;
          return all;
        }()) {
    saved = {.tokens = tokens.data(),
             .experts = experts.data(),
             .offsets = offsets.data(),
             .inverse = inverse.data(),
             .q = q.data(),
             .k = k.data(),
             .v = v.data(),
             .attention = attention.data(),
             .logsumexp = logsumexp.data(),
             .behind = behind.data(),
             .router_mid = c.keeps_gate ? mid.data() : nullptr,
             .gate = c.keeps_gate ? gate.data() : nullptr,
             .up = c.keeps_gate ? up.data() : nullptr,
             .out = c.keeps_out ? out.data() : nullptr};
  }

  Status forward() {
    BlockForwardParams p{};
    p.shape = layer.shape();
    p.weights = layer.params();
    p.x = x.data();
    p.y = y.data();
    p.batch = kBatch;
    p.slots = p.keys = kSlots;
    p.real = reinterpret_cast<const bool*>(real.data());
    p.mask = real.data();
    p.mask_kind = AttentionMask::kKeys;
    p.cos = cos.data();
    p.sin = sin.data();
    p.positions = kTokens;
    p.scale = 0.25;
    p.route.replay = replay.data();
    p.route.ids = ids.data();
    p.route.weights = weights.data();
    p.route.probs = probs.data();
    p.route.effective = effective.data();
    p.route.k = c.k;
    p.route.rule = c.rule;
    p.raw = raw.data();
    p.saved = &saved;
    return Launchers<Memory>::forward(p);
  }

  BlockTrainBackwardParams backward_params() {
    BlockTrainBackwardParams p{};
    p.shape = layer.shape();
    p.weights = layer.params();
    p.saved = saved;
    p.x = x.data();
    p.batch = kBatch;
    p.slots = kSlots;
    p.mask = real.data();
    p.mask_kind = AttentionMask::kKeys;
    p.cos = cos.data();
    p.sin = sin.data();
    p.scale = 0.25;
    p.routing = weights.data();
    p.route.ids = ids.data();
    p.route.probs = probs.data();
    p.route.effective = effective.data();
    p.route.grad_probs = grad_probs.data();
    p.route.k = c.k;
    p.route.rule = c.rule;
    p.grad_y = grad_y.data();
    p.grad_raw = grad_raw.data();
    return p;
  }

  int64_t leaf_size(size_t leaf) const {
    const LayerWeights& w = layer.weights;
    const size_t all[] = {static_cast<size_t>(x.size()),
                          w.q.size(),
                          w.k.size(),
                          w.v.size(),
                          w.o.size(),
                          w.gate.size(),
                          w.up.size(),
                          w.down.size(),
                          w.router_in.size(),
                          w.router_out.size(),
                          w.input_norm.size(),
                          w.post_attention_norm.size()};
    return static_cast<int64_t>(all[leaf]);
  }

  // Gradients of all leaves, or of one.
  std::vector<Doubles> gradients(BlockTrainBackwardParams p, int only = -1) {
    std::vector<Memory<T>> found;
    for (size_t i = 0; i < kLeaves; ++i) {
      found.emplace_back(leaf_size(i));
      if (only < 0 || only == static_cast<int>(i)) p.grad.*kPlaces[i] = found.back().data();
    }
    EXPECT_EQ(Launchers<Memory>::backward(p), Status::kOk);
    std::vector<Doubles> values(kLeaves);
    for (size_t i = 0; i < kLeaves; ++i)
      if (only < 0 || only == static_cast<int>(i)) values[i] = as_doubles(found[i].read());
    return values;
  }
};

template <class T>
using Here = Training<T, Buffer, T>;
template <class T>
using Wide = Training<double, HostArray, T>;

void try_orders([[maybe_unused]] int count) {
#ifdef MICRO_EMULATED
  emu::set_seeds(count);
#endif
}

template <class T>
struct LayerGradient : testing::Test {
  LayerGradient() { try_orders(1); }
  ~LayerGradient() override { try_orders(0); }
};
TYPED_TEST_SUITE(LayerGradient, DeviceElementTypes);

// Twice the roundings of a forward.
template <class T>
void expect_gradients(const std::vector<Doubles>& got, const std::vector<Doubles>& want) {
  for (size_t i = 0; i < kLeaves; ++i)
    if (!got[i].empty()) expect_close(got[i], want[i], 2 * layer_bound<T>(), kNames[i]);
}

TYPED_TEST(LayerGradient, OfEveryWeightRuleAndPolicy) {
  using T = TypeParam;
  for (const Case& c :
       {Case{1, WeightRule::kRenormalized, true, false}, Case{1, WeightRule::kProbability, true, true},
        Case{2, WeightRule::kRenormalized, true, true}, Case{2, WeightRule::kStraightThrough, false, false},
        Case{1, WeightRule::kStraightThrough, true, true, true}}) {
    SCOPED_TRACE(testing::Message() << "k " << c.k << " rule " << static_cast<int>(c.rule) << " gate " << c.keeps_gate);
    Here<T> here(c);
    Wide<T> wide(c);
    try_orders(c.k == 1 ? 2 : 1);
    ASSERT_EQ(here.forward(), Status::kOk);
    ASSERT_EQ(wide.forward(), Status::kOk);
    expect_close(as_doubles(here.y.read()), as_doubles(wide.y.read()), layer_bound<T>(), "y");
    expect_gradients<T>(here.gradients(here.backward_params()), wide.gradients(wide.backward_params()));
  }
}

// What one leaf gets does not depend on which others are wanted.
TYPED_TEST(LayerGradient, OfOneLeafAtATime) {
  using T = TypeParam;
  Here<T> here({1, WeightRule::kProbability, true, true});
  ASSERT_EQ(here.forward(), Status::kOk);
  const auto all = here.gradients(here.backward_params());
  for (size_t i = 0; i < kLeaves; ++i)
    EXPECT_EQ(here.gradients(here.backward_params(), static_cast<int>(i))[i], all[i]) << kNames[i];
}

// Gradients that reach the router only, the experts only, or nothing.
TYPED_TEST(LayerGradient, OfOneResultAtATime) {
  using T = TypeParam;
  const Case c{1, WeightRule::kRenormalized, true, false};
  Here<T> here(c);
  Wide<T> wide(c);
  ASSERT_EQ(here.forward(), Status::kOk);
  ASSERT_EQ(wide.forward(), Status::kOk);
  for (const bool router : {false, true}) {
    auto mine = here.backward_params(), theirs = wide.backward_params();
    for (BlockTrainBackwardParams* p : {&mine, &theirs}) {
      if (router) p->grad_y = nullptr;
      if (!router) p->grad_raw = p->route.grad_probs = nullptr;
    }
    const std::vector<int> leaves = router ? std::vector<int>{0, 8, 9} : std::vector<int>{0, 1, 5, 8, 9, 10};
    for (const int leaf : leaves) {
      const auto got = here.gradients(mine, leaf), want = wide.gradients(theirs, leaf);
      expect_gradients<T>(got, want);
    }
  }
}

TEST(LayerGradientCalls, NoTokensGiveZeros) {
  Here<float> here({1, WeightRule::kRenormalized, true, false});
  BlockTrainBackwardParams p = here.backward_params();
  p.batch = 0;
  Buffer<int32_t> none(std::vector<int32_t>(here.s.experts + 1, 0));
  p.saved.offsets = none.data();
  Buffer<float> q(here.leaf_size(1)), router(here.leaf_size(8)), gain(here.leaf_size(10));
  p.grad.q = q.data();
  p.grad.router_in = router.data();
  p.grad.input_norm = gain.data();
  ASSERT_EQ(Launchers<Buffer>::backward(p), Status::kOk);
  for (const Buffer<float>* grad : {&q, &router, &gain})
    for (const float value : grad->read()) ASSERT_EQ(value, 0);
}

#ifdef MICRO_EMULATED
TEST(LayerGradientCalls, FewLaunches) {
  struct Kind {
    Case c;
    size_t forward, backward;
  };
  for (const Kind& kind : {Kind{{1, WeightRule::kRenormalized, true, false}, 10, 15},
                           Kind{{2, WeightRule::kRenormalized, true, true}, 11, 17}}) {
    Here<BFloat16> here(kind.c);
    emu::start_record(false);
    ASSERT_EQ(here.forward(), Status::kOk);
    EXPECT_EQ(emu::recorded().size(), kind.forward);
    auto p = here.backward_params();
    if (kind.c.k == 1) p.grad_raw = p.route.grad_probs = nullptr;
    emu::start_record(false);
    here.gradients(p);
    EXPECT_EQ(emu::recorded().size(), kind.backward);
  }
}

TEST(LayerGradientCalls, WhatCudaRefuses) {
  Here<float> here({1, WeightRule::kRenormalized, true, false});
  ASSERT_EQ(here.forward(), Status::kOk);
  BlockTrainBackwardParams behind = here.backward_params();
  behind.shape.post_norm = true;
  EXPECT_EQ(Launchers<Buffer>::backward(behind), Status::kUnsupported);
}
#endif

}  // namespace
}  // namespace micro_kernels
