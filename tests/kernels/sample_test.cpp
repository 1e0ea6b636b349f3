// The choice of the next token against the definition in double, on whichever back end this program was built for.

#include "micro_kernels/sample.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <set>
#include <tuple>
#include <vector>

#include "backend.h"
#include "elements.h"
#include "offset.h"
#include "sample/philox.h"

namespace micro_kernels {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

// A call and its answer; fields may be changed before run().
struct Case {
  std::vector<double> logits;
  int64_t vocab;
  std::vector<int64_t> previous = {}, stop_ids = {}, seeds = {}, steps = {};
  int64_t top_k = 0, min_new_tokens = 0;
  double temperature = 0, top_p = 1, penalty = 1;

  int64_t rows() const { return static_cast<int64_t>(logits.size()) / vocab; }

  // offset: of the first logit, in elements.
  template <class T = float>
  std::vector<int64_t> run(int64_t offset = 0) const {
    const std::vector<T> stored = stored_as<T>();
    const OffsetBuffer<T> on_device(stored, offset);
    const Buffer<int64_t> previous_(previous), stop_ids_(stop_ids), seeds_(seeds), steps_(steps), ids(rows());
    SampleParams p = params<T>();
    p.logits = on_device.data();
    p.previous = previous_.data();
    p.stop_ids = stop_ids_.data();
    p.seeds = seeds_.data();
    p.steps = steps_.data();
    p.ids = ids.data();
    EXPECT_EQ(MICRO_RUN_WITH_WORKSPACE(sample, p), Status::kOk);
    return ids.read();
  }

  template <class T>
  std::vector<int64_t> run_on_cpu() const {
    const std::vector<T> stored = stored_as<T>();
    std::vector<int64_t> ids(static_cast<size_t>(rows()), -7);
    SampleParams p = params<T>();
    p.logits = stored.data();
    p.previous = previous.data();
    p.stop_ids = stop_ids.data();
    p.seeds = seeds.data();
    p.steps = steps.data();
    p.ids = ids.data();
    EXPECT_EQ(cpu::sample(p, serial), Status::kOk);
    return ids;
  }

 private:
  template <class T>
  std::vector<T> stored_as() const {
    std::vector<T> stored;
    for (const double z : logits) stored.push_back(static_cast<T>(static_cast<float>(z)));
    return stored;
  }

  template <class T>
  SampleParams params() const {
    return {
        .logits = nullptr,
        .previous = nullptr,
        .stop_ids = nullptr,
        .seeds = nullptr,
        .steps = nullptr,
        .ids = nullptr,
        .rows = rows(),
        .vocab = vocab,
        .previous_count = rows() ? static_cast<int64_t>(previous.size()) / rows() : 0,
        .stop_count = static_cast<int64_t>(stop_ids.size()),
        .min_new_tokens = min_new_tokens,
        .top_k = top_k,
        .top_p = top_p,
        .temperature = temperature,
        .repetition_penalty = penalty,
        .dtype = kDTypeOf<T>,
    };
  }
};

std::vector<double> random_logits(int64_t count, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0, 3);
  std::vector<double> z;
  for (int64_t i = 0; i < count; ++i) z.push_back(std::round(normal(random) * 8) / 8);  // ties; exact in every type
  return z;
}

// What may be drawn, and with which share, by the definition of sample.h: everything sorted, all in double.
std::vector<double> shares(std::vector<double> z, int64_t top_k, double top_p, double temperature) {
  const auto count = z.size();
  for (double& value : z) value /= temperature;
  std::vector<size_t> order(count);
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return z[a] > z[b]; });
  std::vector<double> share(count, 0);
  double sum = 0;
  for (size_t v = 0; v < count; ++v) {
    const bool kept = top_k == 0 || z[v] >= z[order[std::min(count, static_cast<size_t>(top_k)) - 1]];
    share[v] = kept ? std::exp(z[v] - z[order[0]]) : 0;
    sum += share[v];
  }
  double before = 0, left = 0;
  for (size_t rank = 0; rank < count; ++rank) {
    double& s = share[order[rank]];
    const double own = s;
    if (rank > 0 && before >= top_p * sum) s = 0;
    left += s;
    before += own;
  }
  for (double& s : share) s /= left;
  return share;
}

// ---- greedy --------------------------------------------------------------------------------------------------------

template <class T>
class GreedyOf : public testing::Test {};
TYPED_TEST_SUITE(GreedyOf, DeviceElementTypes);

TYPED_TEST(GreedyOf, IsTheLowestOfTheLargest) {
  for (const int64_t vocab : {1, 2, 7, 8, 15, 16, 17, 63, 64, 65, 1000, 5000}) {
    const Case one{random_logits(3 * vocab, static_cast<unsigned>(vocab)), vocab};
    for (const auto& ids : {one.run<TypeParam>(), one.run<TypeParam>(1)})
      for (int64_t r = 0; r < 3; ++r) {
        const auto row = one.logits.begin() + r * vocab;
        EXPECT_EQ(ids[static_cast<size_t>(r)], std::max_element(row, row + vocab) - row) << vocab;
      }
  }
}

TYPED_TEST(GreedyOf, EveryPlaceIsLookedAt) {
  constexpr int64_t kVocab = 83;
  Case one{std::vector<double>(kVocab * kVocab, -2.0), kVocab};
  for (size_t place = 0; place < kVocab; ++place) one.logits[place * kVocab + place] = -1.0;
  const std::vector<int64_t> ids = one.run<TypeParam>();
  for (int64_t place = 0; place < kVocab; ++place) EXPECT_EQ(ids[static_cast<size_t>(place)], place);
}

TEST(Greedy, NaNIsChosenOnlyWhereThereIsNothingElse) {
  EXPECT_EQ((Case{{NAN, -5, NAN, -4}, 4}.run()[0]), 3);
  EXPECT_EQ((Case{{NAN, -kInf, NAN, -kInf}, 4}.run()[0]), 1);
  EXPECT_EQ((Case{{NAN, NAN}, 2}.run()[0]), 0);
  EXPECT_EQ((Case{{NAN, 3, kInf, kInf}, 4}.run()[0]), 2);
  EXPECT_EQ((Case{{-0.0, 0.0}, 2}.run()[0]), 0);
}

TEST(Greedy, NoRowsAreNoWork) { EXPECT_TRUE((Case{{}, 5}.run().empty())); }

TEST(Greedy, PenaltyChangesEachIdOnce) {
  Case one{{4.0, 3.0, -1.0, -1.5}, 4};
  one.penalty = 2;
  one.previous = {0, 0, 0, -1, 9};  // twice is once, and ids outside are skipped
  EXPECT_EQ(one.run()[0], 1);       // 2 against 3
  one.logits = {4.0, 1.5, -1.0, -1.5};
  EXPECT_EQ(one.run()[0], 0);  // 2 against 1.5
  one.logits = {-kInf, -kInf, -1.0, -1.5};
  one.previous = {2, 2, 2, 2, 2};
  EXPECT_EQ(one.run()[0], 3);  // -2 against -1.5
}

TEST(Greedy, StopIdsAreBarredUntilTheRowIsLongEnough) {
  Case one{{1.0, 5.0, 4.0, 1.0, 5.0, 4.0}, 3};
  one.min_new_tokens = 3;
  one.stop_ids = {1, -1, 77};
  one.steps = {2, 3};
  EXPECT_EQ(one.run(), (std::vector<int64_t>{2, 1}));
}

// ---- drawing -------------------------------------------------------------------------------------------------------

struct Options {
  int64_t vocab, top_k;
  double top_p, temperature;
};

class Draw : public testing::TestWithParam<Options> {};

// u falls into the part of [0, 1) that belongs to the id that comes out.
template <class T>
void expect_definition(const Options& options, double slack) {
  constexpr int64_t kRows = kOnDevice ? 2 : 200;
  const std::vector<double> z = random_logits(options.vocab, 3);
  Case one{{}, options.vocab};
  for (int64_t r = 0; r < kRows; ++r) {
    one.logits.insert(one.logits.end(), z.begin(), z.end());
    one.seeds.push_back(r % 2 ? r : -r * 1'000'000'007);
    one.steps.push_back(r % 3);
  }
  one.top_k = options.top_k;
  one.top_p = options.top_p;
  one.temperature = options.temperature;
  const std::vector<int64_t> ids = one.run<T>();
  const std::vector<double> share = shares(z, options.top_k, options.top_p, options.temperature);
  for (size_t r = 0; r < kRows; ++r) {
    ASSERT_TRUE(ids[r] >= 0 && ids[r] < options.vocab);
    const auto id = static_cast<size_t>(ids[r]);
    EXPECT_GT(share[id], 0) << "a token that is not kept was drawn";
    const double u = sample_uniform(one.seeds[r], one.steps[r]);
    const double below = std::accumulate(share.begin(), share.begin() + ids[r], 0.0);
    EXPECT_GE(u, below - slack);
    EXPECT_LT(u, below + share[id] + slack);
  }
}

TEST_P(Draw, FollowsTheDefinitionInFloat64) { expect_definition<double>(GetParam(), 1e-12); }
TEST_P(Draw, FollowsTheDefinitionInFloat32) { expect_definition<float>(GetParam(), 1e-5); }
TEST_P(Draw, FollowsTheDefinitionInBFloat16) { expect_definition<BFloat16>(GetParam(), 1e-5); }
#ifdef MICRO_TEST_CUDA
TEST_P(Draw, FollowsTheDefinitionInFloat16) { expect_definition<Float16>(GetParam(), 1e-5); }
#endif

INSTANTIATE_TEST_SUITE_P(All, Draw,
                         testing::Values(Options{1, 0, 1, 1}, Options{5, 0, 1, 1}, Options{17, 0, 1, 0.5},
                                         Options{64, 3, 1, 1}, Options{64, 64, 1, 2}, Options{64, 1000, 1, 1},
                                         Options{100, 1, 1, 1}, Options{100, 0, 0.7, 1}, Options{100, 0, 0, 1},
                                         Options{100, 10, 0.6, 1.5}, Options{100, 0, 0.99999, 3},
                                         Options{3000, 0, 1, 1}, Options{3000, 40, 0.9, 0.8},
                                         Options{3000, 0, 0.999, 30}, Options{3000, 0, 0.3, 30}));

TEST(Draw, DependsOnSeedAndStepButNotOnTheBatch) {
  constexpr int64_t kVocab = 500, kRows = 6;
  Case all{random_logits(kRows * kVocab, 5), kVocab};
  all.temperature = 1;
  for (int64_t r = 0; r < kRows; ++r) {
    all.seeds.push_back(11 + r);
    all.steps.push_back(r);
  }
  const std::vector<int64_t> together = all.run();
  for (int64_t r = 0; r < kRows; ++r) {
    const auto begin = all.logits.begin() + r * kVocab;
    Case alone{{begin, begin + kVocab}, kVocab};
    alone.temperature = 1;
    alone.seeds = {11 + r};
    alone.steps = {r};
    EXPECT_EQ(alone.run()[0], together[static_cast<size_t>(r)]);
  }
  EXPECT_NE(sample_uniform(1, 0), sample_uniform(1, 1));
  EXPECT_NE(sample_uniform(1, 0), sample_uniform(2, 0));
  EXPECT_NE(sample_uniform(int64_t{1} << 40, 0), sample_uniform(0, 0));
  EXPECT_NE(sample_uniform(0, int64_t{1} << 40), sample_uniform(0, 0));
}

TEST(Draw, ExtremesAreDrawnFromWhatIsThere) {
  Case one{{NAN, -kInf, 2.0, NAN, -kInf}, 5, {}, {}, {1}, {2}};
  one.temperature = 1;
  EXPECT_EQ(one.run()[0], 2);
  one.logits = {NAN, -kInf, NAN, -kInf, NAN};
  EXPECT_EQ(one.run()[0], 1);
  one.logits = {NAN, NAN, NAN, NAN, NAN};
  EXPECT_EQ(one.run()[0], 0);
  one.logits = {3.0, kInf, NAN, kInf, -kInf};
  for (int64_t seed = 0; seed < 20; ++seed) {
    one.seeds = {seed};
    one.top_k = seed % 5;
    one.top_p = seed % 2 ? 0.7 : 1;
    const int64_t id = one.run()[0];
    EXPECT_TRUE(id == 1 || id == 3);
  }
}

// A row for each of `rows` seeds.
Case repeated(Case one, int64_t rows) {
  const Case row = one;
  one.logits.clear(), one.previous.clear();
  for (int64_t r = 0; r < rows; ++r) {
    one.logits.insert(one.logits.end(), row.logits.begin(), row.logits.end());
    one.previous.insert(one.previous.end(), row.previous.begin(), row.previous.end());
    one.seeds.push_back(r);
    one.steps.push_back(0);
  }
  return one;
}

TEST(Draw, PenaltyAndBarComeBeforeTheTemperature) {
  Case one{{4.0, 4.0, 4.0, 4.0}, 4, {1}, {2}};
  one.temperature = 0.02;
  one.penalty = 1.5;
  one.min_new_tokens = 1;
  constexpr int64_t kRows = kOnDevice ? 60 : 400;
  std::array<int, 4> drawn = {};
  for (const int64_t id : repeated(one, kRows).run()) ++drawn[static_cast<size_t>(id)];
  EXPECT_EQ(drawn[1] + drawn[2], 0);
  EXPECT_GT(std::min(drawn[0], drawn[3]), 0.35 * kRows);
}

// All are as likely, and a share of a quarter keeps the lowest quarter of the ids; one more where it does not come out.
TEST(Draw, OfEqualWeightsTheLowestIdsAreKept) {
  for (const int64_t vocab : {8, 1000, 1001}) {
    Case one{std::vector<double>(static_cast<size_t>(vocab), 1.5), vocab};
    one.temperature = 0.7;
    one.top_p = 0.25;
    const std::vector<int64_t> ids = repeated(one, kOnDevice ? 16 : 60).run();
    const int64_t kept = (vocab + 3) / 4;
    EXPECT_LT(*std::max_element(ids.begin(), ids.end()), kept);
    EXPECT_GE(*std::max_element(ids.begin(), ids.end()), kept / 2);
    EXPECT_LT(*std::min_element(ids.begin(), ids.end()), (kept + 1) / 2);
  }
}

TEST(Draw, AllThatEqualTheLeastOfTopKAreKept) {
  Case one{{0.0, -1.0, -0.0, 0.0, -1.0}, 5};
  one.temperature = 1;
  one.top_k = 1;
  std::array<int, 5> drawn = {};
  constexpr int64_t kRows = kOnDevice ? 30 : 90;
  for (const int64_t id : repeated(one, kRows).run()) ++drawn[static_cast<size_t>(id)];
  EXPECT_EQ(drawn[1] + drawn[4], 0);
  EXPECT_GT(std::min({drawn[0], drawn[2], drawn[3]}), kRows / 6);
}

// Scores one step of float32 apart, and almost the same weights: all of the k largest come, and nothing else.
TEST(Draw, TopKTellsNeighbouringNumbersApart) {
  constexpr int64_t kVocab = 40;
  Case one{{}, kVocab};
  for (int64_t v = 0; v < kVocab; ++v) one.logits.push_back(1 + static_cast<double>(8 + v * 7 % kVocab) * 0x1p-23);
  one.temperature = 1;
  for (const int64_t k : {2, 3}) {
    one.top_k = k;
    std::set<int64_t> drawn, wanted;
    for (const int64_t id : repeated(one, 24).run()) drawn.insert(id);
    for (int64_t v = 0; v < kVocab; ++v)
      if (v * 7 % kVocab >= kVocab - k) wanted.insert(v);
    EXPECT_EQ(drawn, wanted) << k;
  }
}

#ifdef MICRO_TEST_CUDA
// The same ids as the CPU chooses: arithmetic that differs in its last bits moves a draw only where u lies that close
// to a boundary, and for these seeds it does not.
template <class T>
class LikeTheCpu : public testing::Test {};
TYPED_TEST_SUITE(LikeTheCpu, ElementTypes);

TYPED_TEST(LikeTheCpu, EveryOptionTogether) {
  constexpr int64_t kVocab = 2'001, kRows = 3, kPrevious = 40;
  Case one{random_logits(kRows * kVocab, 21), kVocab};
  one.stop_ids = {0, 7, kVocab - 1, -5, kVocab};
  one.min_new_tokens = 3;
  one.penalty = 1.3;
  for (int64_t r = 0; r < kRows; ++r) {
    one.seeds.push_back(100 + r);
    one.steps.push_back(r);
    for (int64_t i = 0; i < kPrevious; ++i) one.previous.push_back((r * 977 + i * i * 31) % (kVocab + 100) - 50);
    one.logits[static_cast<size_t>(r * kVocab + 7)] = 40;  // barred in the first rows
  }
  EXPECT_EQ(one.run<TypeParam>(), one.template run_on_cpu<TypeParam>());
  for (const auto& [top_k, top_p, temperature] :
       {std::tuple(int64_t{0}, 1.0, 8.0), std::tuple(int64_t{50}, 1.0, 8.0), std::tuple(int64_t{0}, 0.95, 8.0),
        std::tuple(int64_t{300}, 0.8, 4.0), std::tuple(int64_t{kVocab - 1}, 0.999999, 1e3)}) {
    one.top_k = top_k;
    one.top_p = top_p;
    one.temperature = temperature;
    const std::vector<int64_t> ids = one.run<TypeParam>();
    EXPECT_EQ(ids, one.template run_on_cpu<TypeParam>()) << top_k << ", " << top_p;
    EXPECT_EQ(ids, one.run<TypeParam>(1)) << "depends on where the logits lie";
  }
}
#endif

// ---- random numbers ------------------------------------------------------------------------------------------------

TEST(Random, PhiloxGivesThePublishedWords) {
  EXPECT_EQ(philox({{0, 0, 0, 0}}, {{0, 0}}), (Philox{{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}}));
  constexpr uint32_t kOnes = 0xffffffff;
  EXPECT_EQ(philox({{kOnes, kOnes, kOnes, kOnes}}, {{kOnes, kOnes}}),
            (Philox{{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}}));
  EXPECT_EQ(philox({{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}}, {{0xa4093822, 0x299f31d0}}),
            (Philox{{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}}));
}

TEST(Random, UniformsAreSpreadOverTheUnitInterval) {
  std::array<int, 10> bins = {};
  for (int64_t step = 0; step < 10'000; ++step) {
    const double u = sample_uniform(42, step);
    ASSERT_TRUE(u >= 0 && u < 1);
    ++bins[static_cast<size_t>(u * 10)];
  }
  for (const int count : bins) EXPECT_NEAR(count, 1000, 150);  // 5 standard deviations
}

}  // namespace
}  // namespace micro_kernels
