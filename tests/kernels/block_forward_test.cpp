// A whole layer against float64: every kind of layer, of cache and of call, on every back end.

#include "micro_kernels/block_forward.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>

#include "layer_problem.h"

namespace micro_kernels {
namespace {

constexpr int64_t kBatch = 2, kSlots = 9, kTokens = kBatch * kSlots, kCapacity = 12;

#ifdef MICRO_TEST_CUDA
Status run(const BlockForwardParams& p) { return MICRO_RUN_WITH_WORKSPACE(block_forward, p); }
#else
Status run(const BlockForwardParams& p) {
  std::vector<char> memory(cpu::block_forward_workspace(p) + 64, 0x7f);
  char* aligned = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64;
  return cpu::block_forward(p, aligned, serial);
}
#endif

LayerInputs random_inputs(const LayerSizes& s, int64_t k) {
  LayerInputs in{};
  in.x = random_doubles(kTokens * s.hidden, 77, 1);
  in.batch = kBatch, in.slots = kSlots, in.k = k;
  in.scale = 1 / std::sqrt(static_cast<double>(s.head_dim));
  in.eps = 1e-5;
  for (int64_t i = 0; i < 2 * kSlots * s.head_dim / 2; ++i) {
    const double angle = static_cast<double>(i / (s.head_dim / 2)) *
                         std::pow(100.0, -static_cast<double>(i % (s.head_dim / 2)) / static_cast<double>(s.head_dim));
    in.cos.push_back(std::cos(angle));
    in.sin.push_back(std::sin(angle));
  }
  // Not the slot itself: positions are numbers of their own.
  for (int64_t t = 0; t < kTokens; ++t) in.position.push_back(static_cast<int32_t>(2 * kSlots - 1 - t % kSlots));
  return in;
}

// Keys and values [B, attention experts, G, capacity, D], or [B, G, experts, capacity, D]: strides are the caller's.
template <class T>
struct Cache {
  LayerSizes s;
  bool turned;
  Buffer<T> keys, values;

  Cache(const LayerSizes& sizes, bool groups_first) : s(sizes), turned(groups_first), keys(zeros()), values(zeros()) {}

  HeadStrides strides() const {
    const int64_t row = kCapacity * s.head_dim, all = s.attention_experts() * s.groups * row;
    if (turned) return {all, row, s.attention_experts() * row, s.head_dim};
    return {all, s.groups * row, row, s.head_dim};
  }
  void use(BlockForwardParams& p) const {
    p.cache.k = keys.data();
    p.cache.v = values.data();
    p.cache.k_strides = p.cache.v_strides = strides();
  }
  // The first `slots` slots as the oracle lays them out.
  static Doubles picked(const Cache& cache, const Buffer<T>& store, int64_t slots) {
    const Doubles all = as_doubles(store.read());
    const HeadStrides strides = cache.strides();
    Doubles result;
    for (int64_t b = 0; b < kBatch; ++b)
      for (int64_t e = 0; e < cache.s.attention_experts(); ++e)
        for (int64_t g = 0; g < cache.s.groups; ++g)
          for (int64_t slot = 0; slot < slots; ++slot) {
            const auto at =
                all.begin() + b * strides.batch + e * strides.expert + g * strides.group + slot * strides.key;
            result.insert(result.end(), at, at + cache.s.head_dim);
          }
    return result;
  }

 private:
  std::vector<T> zeros() const {
    return std::vector<T>(kBatch * s.attention_experts() * s.groups * kCapacity * s.head_dim, T(accumulator_t<T>(0)));
  }
};

template <class Value>
std::vector<Value> slots_of(const std::vector<Value>& rows, int64_t width, int64_t first, int64_t last) {
  const int64_t slots = static_cast<int64_t>(rows.size()) / width / kBatch;
  std::vector<Value> part;
  for (int64_t b = 0; b < kBatch; ++b)
    part.insert(part.end(), rows.begin() + (b * slots + first) * width, rows.begin() + (b * slots + last) * width);
  return part;
}

// The slots [first, last) of a problem as one call.
template <class T>
struct Call {
  using Acc = accumulator_t<T>;
  LayerSizes s;
  int64_t first, last, tokens, k;
  Buffer<T> x, y, raw, weights;
  Buffer<Acc> probs, effective, cos, sin;
  Buffer<int32_t> ids, position;
  std::optional<Buffer<int32_t>> replay;
  std::optional<Buffer<uint8_t>> real, mask;
  BlockForwardParams p{};

  Call(const LayerParameters<T>& layer, const LayerInputs& in, int64_t first_, int64_t last_)
      : s(layer.sizes),
        first(first_),
        last(last_),
        tokens(kBatch * (last - first)),
        k(in.k),
        x(rounded_to<T>(slots_of(in.x, s.hidden, first, last))),
        y(tokens * s.hidden),
        raw(tokens * s.experts),
        weights(tokens * k),
        probs(tokens * s.experts),
        effective(tokens * s.experts),
        cos(rounded_to<Acc>(in.cos)),
        sin(rounded_to<Acc>(in.sin)),
        ids(tokens * k),
        position(slots_of(in.position, 1, first, last)) {
    if (!in.ids.empty()) replay.emplace(slots_of(in.ids, k, first, last));
    if (!in.real.empty()) real.emplace(slots_of(in.real, 1, first, last));
    if (!in.real.empty()) mask.emplace(slots_of(in.real, 1, 0, last));
    p.shape = layer.shape();
    p.weights = layer.params();
    p.x = x.data();
    p.y = y.data();
    p.batch = kBatch;
    p.slots = last - first;
    p.start = first;
    p.keys = last;
    p.real = reinterpret_cast<const bool*>(data_of(real));
    p.mask = data_of(mask);
    p.mask_kind = mask ? AttentionMask::kKeys : AttentionMask::kNone;
    p.cos = cos.data();
    p.sin = sin.data();
    p.positions = 2 * kSlots;
    p.position = position.data();
    p.scale = in.scale;
    p.route.replay = data_of(replay);
    p.route.ids = ids.data();
    p.route.weights = weights.data();
    p.route.probs = probs.data();
    p.route.effective = effective.data();
    p.route.k = k;
    p.raw = raw.data();
  }

  void expect(const LayerResults& want, double bound = layer_bound<T>()) const {
    const auto part = [&](const Doubles& rows, int64_t width) { return slots_of(rows, width, first, last); };
    expect_close(as_doubles(y.read()), part(want.y, s.hidden), bound, "y");
    expect_close(as_doubles(raw.read()), part(want.logits, s.experts), bound, "logits");
    expect_close(as_doubles(probs.read()), part(want.probs, s.experts), bound, "probabilities");
    expect_close(as_doubles(effective.read()), part(want.logits, s.experts), bound, "effective logits");
    expect_close(as_doubles(weights.read()), part(want.weights, k), bound, "weights");
    EXPECT_EQ(ids.read(), slots_of(want.ids, k, first, last));
  }
};

// The inputs as the kernels see them, and, from a first run of the oracle, its own experts to take: which of two nearly
// equal probabilities is the larger is not the question here.
template <class T>
LayerResults settle(const LayerParameters<T>& layer, LayerInputs& in) {
  in.x = as_doubles(rounded_to<T>(in.x));
  in.ids = LayerOracle(layer.sizes, layer.weights, in).run().ids;
  return LayerOracle(layer.sizes, layer.weights, in).run();
}

LayerSizes kind(bool whole, bool post) {
  LayerSizes s;
  s.whole_block = whole;
  s.post_norm = post;
  return s;
}

// Each launcher has been run in several orders of threads by a test of its own: here, where a call is a dozen launches,
// one order is enough but for the first calls of each kind.
void try_orders([[maybe_unused]] int count) {
#ifdef MICRO_EMULATED
  emu::set_seeds(count);
#endif
}

template <class T>
struct Layer : testing::Test {
  Layer() { try_orders(1); }
  ~Layer() override { try_orders(0); }
};
TYPED_TEST_SUITE(Layer, DeviceElementTypes);

// A prompt, a chunk and a token, with padding, keys and values in a cache with strides of its own.
TYPED_TEST(Layer, OfEveryKindInSeveralCalls) {
  using T = TypeParam;
  for (const bool whole : {true, false})
    for (const bool post : {true, false})
      for (const int64_t k : {1, 2}) {
        SCOPED_TRACE(testing::Message() << "whole " << whole << " post " << post << " k " << k);
        const LayerParameters<T> layer(kind(whole, post));
        LayerInputs in = random_inputs(layer.sizes, k);
        in.real.assign(kTokens, 1);
        in.real[0] = in.real[1] = 0;
        const LayerResults want = settle(layer, in);
        const Cache<T> cache(layer.sizes, k == 2);
        for (const auto& [first, last] : {std::pair<int64_t, int64_t>{0, 5}, {5, 8}, {8, 9}}) {
          Call<T> call(layer, in, first, last);
          cache.use(call.p);
          try_orders(first == 0 && k == 1 ? 2 : 1);
          ASSERT_EQ(run(call.p), Status::kOk);
          call.expect(want);
        }
        expect_close(Cache<T>::picked(cache, cache.keys, kSlots), want.keys, layer_bound<T>(), "keys");
        expect_close(Cache<T>::picked(cache, cache.values, kSlots), want.values, layer_bound<T>(), "values");
      }
}

// Head sizes that the grouped product turns on its way out, and one that it does not; widths without vectors.
TYPED_TEST(Layer, HeadSizesAndOddWidths) {
  using T = TypeParam;
  for (const auto& [head_dim, odd] : {std::pair<int64_t, int64_t>{8, 0}, {16, 1}, {128, 0}}) {
    SCOPED_TRACE(testing::Message() << "head size " << head_dim << " odd " << odd);
    LayerSizes sizes;
    sizes.heads = 2, sizes.groups = 1, sizes.head_dim = head_dim;
    sizes.hidden += 3 * odd, sizes.inner += odd, sizes.router_hidden += 5 * odd, sizes.experts += odd;
    const LayerParameters<T> layer(sizes);
    LayerInputs in = random_inputs(sizes, 2);
    const LayerResults want = settle(layer, in);
    Call<T> call(layer, in, 0, kSlots);
    ASSERT_EQ(run(call.p), Status::kOk);
    call.expect(want);
  }
}

// The largest logits win, where the oracle sees a clear winner and a clear loser.
TYPED_TEST(Layer, RoutesByItself) {
  using T = TypeParam;
  const LayerParameters<T> layer(kind(true, false));
  const LayerSizes& s = layer.sizes;
  LayerInputs in = random_inputs(s, 1);
  in.x = as_doubles(rounded_to<T>(in.x));
  Doubles logits = LayerOracle(s, layer.weights, in).run().logits;
  const auto clear = [&](int64_t t) {
    const auto row = logits.begin() + t * s.experts;
    std::sort(row, row + s.experts);
    return row[s.experts - 1] - row[s.experts - 2] > 0.2;
  };
  int64_t model = 0;  // what unclear tokens become copies of
  while (!clear(model)) ++model;
  for (int64_t t = 0; t < kTokens; ++t)
    if (!clear(t)) std::copy_n(in.x.begin() + model * s.hidden, s.hidden, in.x.begin() + t * s.hidden);
  const LayerResults want = LayerOracle(s, layer.weights, in).run();
  EXPECT_GT(*std::max_element(want.ids.begin(), want.ids.end()), *std::min_element(want.ids.begin(), want.ids.end()));
  Call<T> call(layer, in, 0, kSlots);
  ASSERT_EQ(run(call.p), Status::kOk);
  call.expect(want);
}

TYPED_TEST(Layer, SteeredByRowsAndForce) {
  using T = TypeParam;
  using Acc = accumulator_t<T>;
  const LayerParameters<T> layer(kind(true, false));
  LayerInputs in = random_inputs(layer.sizes, 1);
  in.x = as_doubles(rounded_to<T>(in.x));
  for (int64_t t = 0; t < kTokens; ++t)
    in.ids.push_back(static_cast<int32_t>(t % 3));  // nobody goes to the last expert
  const LayerResults want = LayerOracle(layer.sizes, layer.weights, in).run();
  std::vector<Acc> rows(kTokens * layer.sizes.experts, 0);
  for (int64_t t = 0; t < kTokens; ++t) rows[t * layer.sizes.experts + in.ids[t]] = 1;
  const Buffer<int32_t> force(in.ids);
  const Buffer<Acc> given(rows);
  Call<T> forced(layer, in, 0, kSlots), labelled(layer, in, 0, kSlots);
  forced.p.route.replay = labelled.p.route.replay = nullptr;
  forced.p.route.force = force.data();
  forced.p.route.force_stride = 1;
  ASSERT_EQ(run(forced.p), Status::kOk);
  labelled.p.route.rows = given.data();
  labelled.p.raw = nullptr;  // the router does not run
  labelled.p.weights.router_in = labelled.p.weights.router_out = {};
  ASSERT_EQ(run(labelled.p), Status::kOk);
  // Here the probability is 1, the oracle's is the router's: the 1e-9 of the renormalisation counts in float64.
  const double bound = std::max(layer_bound<T>(), 1e-7);
  for (const Call<T>* call : {&forced, &labelled}) {
    expect_close(as_doubles(call->y.read()), want.y, bound, "y");
    EXPECT_EQ(call->ids.read(), in.ids);
  }
  expect_same_bits(labelled.y.read(), forced.y.read());
}

// One map from the input to the logits, in the accumulator type; gains that are folded away are ones.
TYPED_TEST(Layer, FoldedRouterAndGains) {
  using T = TypeParam;
  using Acc = accumulator_t<T>;
  for (const bool whole : {true, false}) {
    SCOPED_TRACE(testing::Message() << "whole " << whole);
    LayerParameters<T> layer(kind(whole, false));
    const LayerSizes& s = layer.sizes;
    std::fill(layer.weights.input_norm.begin(), layer.weights.input_norm.end(), 1.0);
    std::fill(layer.weights.post_attention_norm.begin(), layer.weights.post_attention_norm.end(), 1.0);
    LayerInputs in = random_inputs(s, 1);
    const LayerResults want = settle(layer, in);
    Doubles folded;
    for (int64_t e = 0; e < s.experts; ++e)
      for (int64_t h = 0; h < s.hidden; ++h) {
        double sum = 0;
        for (int64_t r = 0; r < s.router_hidden; ++r)
          sum += layer.weights.router_out[e * s.router_hidden + r] * layer.weights.router_in[r * s.hidden + h];
        folded.push_back(sum);
      }
    const Buffer<Acc> map(rounded_to<Acc>(folded)), logits(kTokens * s.experts);
    Call<T> call(layer, in, 0, kSlots);
    call.p.shape.router_hidden = 0;
    call.p.weights.router_in = {};
    call.p.weights.router_out = {map.data()};
    call.p.weights.input_norm = call.p.weights.post_attention_norm = nullptr;
    call.p.raw = logits.data();
    ASSERT_EQ(run(call.p), Status::kOk);
    expect_close(as_doubles(call.y.read()), want.y, layer_bound<T>(), "y");
    expect_close(as_doubles(logits.read()), want.logits, layer_bound<T>(), "logits");
    EXPECT_EQ(call.ids.read(), want.ids);
  }
}

TYPED_TEST(Layer, TheResultMayReplaceTheInput) {
  using T = TypeParam;
  for (const bool whole : {true, false})
    for (const bool post : {true, false}) {
      SCOPED_TRACE(testing::Message() << "whole " << whole << " post " << post);
      const LayerParameters<T> layer(kind(whole, post));
      LayerInputs in = random_inputs(layer.sizes, 1);
      in.real.assign(kTokens, 1);
      in.real[0] = 0;
      settle(layer, in);
      Call<T> apart(layer, in, 0, kSlots), inside(layer, in, 0, kSlots);
      ASSERT_EQ(run(apart.p), Status::kOk);
      inside.p.y = inside.x.data();
      ASSERT_EQ(run(inside.p), Status::kOk);
      expect_same_bits(inside.x.read(), apart.y.read());
    }
}

// A row of the batch has the same bits whatever the other one holds, though the plan and its tiles are others.
TYPED_TEST(Layer, TheRestOfTheBatchChangesNoBit) {
  using T = TypeParam;
  const LayerParameters<T> layer(kind(true, false));
  const int64_t row = kSlots * layer.sizes.hidden;
  LayerInputs in = random_inputs(layer.sizes, 1), other = in;
  std::reverse(other.x.begin() + row, other.x.end());
  settle(layer, in);
  settle(layer, other);
  ASSERT_NE(in.ids, other.ids);
  const Cache<T> one(layer.sizes, false), two(layer.sizes, false);
  for (const auto& [first, last] : {std::pair<int64_t, int64_t>{0, 8}, {8, 9}}) {
    Call<T> a(layer, in, first, last), b(layer, other, first, last);
    one.use(a.p);
    two.use(b.p);
    ASSERT_EQ(run(a.p), Status::kOk);
    ASSERT_EQ(run(b.p), Status::kOk);
    std::vector<T> got = a.y.read(), want = b.y.read();
    got.resize(got.size() / kBatch);
    want.resize(want.size() / kBatch);
    expect_same_bits(got, want);
  }
}

// Rows behind slots of their own, the second one shorter than the call: what is not real keeps nothing.
TYPED_TEST(Layer, RowsWithStartsOfTheirOwn) {
  using T = TypeParam;
  for (const bool whole : {true, false})
    for (const bool post : {true, false}) {
      SCOPED_TRACE(testing::Message() << "whole " << whole << " post " << post);
      const LayerParameters<T> layer(kind(whole, post));
      LayerInputs in = random_inputs(layer.sizes, 1);
      const LayerResults want = settle(layer, in);
      const Cache<T> cache(layer.sizes, false);
      Call<T> before(layer, in, 0, 4);
      cache.use(before.p);
      ASSERT_EQ(run(before.p), Status::kOk);
      // Both rows go on at slot 4; the second has one more token, and three that are not there.
      Call<T> call(layer, in, 4, 8);
      cache.use(call.p);
      const Buffer<int32_t> starts(std::vector<int32_t>{4, 4});
      const Buffer<uint8_t> real(std::vector<uint8_t>{1, 1, 1, 1, 1, 0, 0, 0});
      call.p.starts = starts.data();
      call.p.start = 0;
      call.p.real = reinterpret_cast<const bool*>(real.data());
      const std::vector<T> kept = cache.keys.read();
      ASSERT_EQ(run(call.p), Status::kOk);
      const auto y = as_doubles(call.y.read()), all = slots_of(want.y, layer.sizes.hidden, 4, 8);
      const int64_t there = 5 * layer.sizes.hidden;
      expect_close({y.begin(), y.begin() + there}, {all.begin(), all.begin() + there}, layer_bound<T>(), "y");
      const std::vector<T> now = cache.keys.read();
      const HeadStrides strides = cache.strides();
      for (int64_t slot = 0; slot < 8; ++slot) {
        const int64_t at = strides.batch + slot * strides.key;
        const bool same = std::memcmp(&now[at], &kept[at], layer.sizes.head_dim * sizeof(T)) == 0;
        EXPECT_EQ(same, slot != 4) << "slot " << slot << " of the second row";
      }
    }
}

TEST(LayerCalls, NoTokensAreNoWork) {
  BlockForwardParams p{};
  p.shape = LayerParameters<float>(kind(true, false)).shape();
  p.batch = 0;
  p.slots = 4;
  p.route.k = 1;
  EXPECT_EQ(run(p), Status::kOk);
}

#ifdef MICRO_EMULATED
// A launch costs microseconds, in which a decoded token's whole layer could pass.
TEST(LayerCalls, FewLaunchesOnTheCallersStream) {
  struct Kind {
    bool whole, post;
    int64_t k;
    size_t launches;
  };
  for (const Kind& c :
       {Kind{true, false, 1, 9}, Kind{true, false, 2, 10}, Kind{true, true, 1, 11}, Kind{true, true, 2, 12},
        Kind{false, false, 1, 11}, Kind{false, false, 2, 12}, Kind{false, true, 1, 12}, Kind{false, true, 2, 13}}) {
    SCOPED_TRACE(testing::Message() << "whole " << c.whole << " post " << c.post << " k " << c.k);
    const LayerParameters<BFloat16> layer(kind(c.whole, c.post));
    LayerInputs in = random_inputs(layer.sizes, c.k);
    settle(layer, in);
    const Cache<BFloat16> cache(layer.sizes, false);
    Call<BFloat16> call(layer, in, 0, kSlots);
    cache.use(call.p);
    const Buffer<char> workspace(cuda::block_forward_workspace(call.p));
    int stream = 0;
    emu::start_record(false);
    ASSERT_EQ(cuda::block_forward(call.p, workspace.data(), &stream), Status::kOk);
    const auto launches = emu::recorded();
    EXPECT_EQ(launches.size(), c.launches);
    for (const auto& launch : launches) EXPECT_EQ(launch.stream, &stream) << launch.kernel;
  }
}

TEST(LayerCalls, WhatCudaRefuses) {
  const LayerParameters<float> layer(kind(true, false));
  LayerInputs in = random_inputs(layer.sizes, 1);
  settle(layer, in);
  const Cache<float> cache(layer.sizes, false);
  Call<float> call(layer, in, 0, kSlots);
  cache.use(call.p);
  BlockForwardParams late = call.p, packed = call.p, scattered = call.p, rounded = call.p, shown = call.p;
  const BlockHooks hooks;
  shown.hooks = &hooks;
  late.cache.x = call.x.data();
  std::vector<Matrix> other = layer.gate;
  other[1].format = WeightFormat::kPacked;
  packed.weights.gate = other.data();
  std::vector<Matrix> apart = layer.gate;
  apart[1] = layer.gate[0];
  scattered.weights.gate = apart.data();
  rounded.shape.rounding = GainRounding::kAfterGain;
  for (const BlockForwardParams* p : {&late, &packed, &scattered, &rounded, &shown})
    EXPECT_EQ(run(*p), Status::kUnsupported);
}
#endif

}  // namespace
}  // namespace micro_kernels
