// A whole layer on the CPU against the launchers of its operators, one after the other: the same bits, whatever the
// split into calls, the kind of cache, the storage of the weights and the number of threads.

#include <gtest/gtest.h>

#include <array>
#include <cstring>
#include <map>
#include <vector>

#include "block_forward_layer.h"
#include "micro_kernels/block_forward.h"

namespace micro_kernels {
namespace {

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

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

// Looking at a point changes no bit, whichever the others are; what is changed there is felt.
TYPED_TEST(BlockForward, ShownRowsAreTheLayersOwn) {
  constexpr int kPoints = 7;
  const auto x = random_values<TypeParam>(6 * kHidden, 12, 1);
  for (const bool whole : {true, false})
    for (const bool post : {true, false})
      for (const int64_t k : {1, 2}) {
        const Weights<TypeParam> w(whole, post);
        Call<TypeParam> plain(w, x, 2, 0, k, 3);
        ASSERT_EQ(run(plain.params(nullptr, nullptr)), Status::kOk);
        for (uint32_t points = 1; points < 1u << kPoints; ++points) {
          if ((points & (points - 1)) && points != (1u << kPoints) - 1 && points % 5 != 0) continue;
          Call<TypeParam> call(w, x, 2, 0, k, 3);
          uint32_t met = 0;
          bool sizes = true, changes = false;
          BlockHooks hooks{points, [&](const BlockRows& rows) {
                             met |= 1u << static_cast<int>(rows.point);
                             sizes = sizes && rows.count == (rows.experts ? 6 * k : 6);
                             if (changes) std::memset(rows.rows, 0, sizeof(TypeParam) * rows.count * rows.width);
                             return Status::kOk;
                           }};
          BlockForwardParams p = call.params(nullptr, nullptr);
          p.hooks = &hooks;
          ASSERT_EQ(run(p), Status::kOk);
          EXPECT_EQ(met, points);
          EXPECT_TRUE(sizes);
          expect_same(call, plain);
          changes = true;
          ASSERT_EQ(run(p), Status::kOk);
          EXPECT_FALSE(same_bits(points == 1 ? call.raw : call.y, points == 1 ? plain.raw : plain.y)) << points;
        }
      }
}

// The rows of tokens, and of pairs that the routing has, by point, token and expert (-1: none).
template <class T>
using ShownRows = std::map<std::array<int64_t, 3>, std::vector<T>>;

// Of a call whose layer shows `count` rows of pairs at a time.
template <class T>
ShownRows<T> shown_rows(BlockForwardParams p, uint32_t points, bool all_experts, int64_t count) {
  ShownRows<T> seen;
  const auto meet = [&](const BlockRows& rows) {
    const auto* row = static_cast<const T*>(rows.rows);
    for (int64_t n = 0; n < rows.count; ++n, row += rows.width) {
      if (rows.chosen && !rows.chosen[n]) continue;
      const int64_t token = rows.tokens ? rows.tokens[n] : n, expert = rows.experts ? rows.experts[n] : -1;
      EXPECT_TRUE(seen.emplace(std::array{static_cast<int64_t>(rows.point), token, expert},
                               std::vector<T>(row, row + rows.width))
                      .second);
    }
    EXPECT_EQ(rows.chosen != nullptr, rows.experts && all_experts);
    EXPECT_TRUE(!rows.experts || rows.count == count);
    return Status::kOk;
  };
  const BlockHooks hooks{points, meet, all_experts};
  p.hooks = &hooks;
  EXPECT_EQ(run(p, two_threads), Status::kOk);
  return seen;
}

// Every expert shows every real token, the routed rows as they are without the others, and the layer gives the same.
TYPED_TEST(BlockForward, AllExpertsRunAndTheResultStays) {
  constexpr int64_t kBatch = 2, kSlots = 4, kReal = 6;
  constexpr uint32_t kEverywhere = (1u << 7) - 1, kUnits = 1u << static_cast<int>(BlockPoint::kUnits);
  const auto x = random_values<TypeParam>(kBatch * kSlots * kHidden, 16, 1);
  for (const bool whole : {true, false})
    for (const bool post : {true, false})
      for (const bool lazy : {true, false})
        for (const int64_t k : {1, 2}) {
          if (lazy && !whole) continue;
          SCOPED_TRACE(testing::Message() << "whole " << whole << " post " << post << " lazy " << lazy << " k " << k);
          const Weights<TypeParam> w(whole, post);
          Call<TypeParam> usual(w, x, kBatch, 0, k, kSlots);
          usual.mask.assign(kBatch * kSlots, 1);
          usual.mask[0] = usual.mask[1] = 0;
          usual.real = usual.mask;
          Call<TypeParam> all = usual, unseen = usual;
          const auto show = [&](Call<TypeParam>& call, uint32_t points, bool all_experts) {
            Store<TypeParam> store(w, kBatch, kSlots);
            Late<TypeParam> late(kBatch, kSlots);
            BlockForwardParams p = call.params(store.keys.data(), store.values.data());
            if (lazy) late.use(p);
            return shown_rows<TypeParam>(p, points, all_experts, kReal * (all_experts ? kExperts : k));
          };
          ShownRows<TypeParam> want = show(usual, kEverywhere, false), got = show(all, kEverywhere, true);
          for (auto* rows : {&want, &got})  // what tokens that are not real show is nobody's business
            std::erase_if(*rows, [&](const auto& row) { return !usual.real[static_cast<size_t>(row.first[1])]; });
          ASSERT_EQ(want.size(), got.size());
          for (const auto& [place, row] : want) EXPECT_TRUE(same_bits(got[place], row));
          expect_same(all, usual);
          show(unseen, kUnits, true);
          expect_same(unseen, usual);
        }
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

TEST(BlockForward, DecodingTakesAtMostSixRegions) {
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
      EXPECT_LE(regions, 6);
      EXPECT_GE(regions, 4) << "products that are too large for one thread";
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
