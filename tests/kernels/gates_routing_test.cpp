// Bytes of routing, the plan and the losses over routing decisions, with four experts.

#include <gtest/gtest.h>

#include <random>
#include <vector>

#include "backend.h"
#include "elements.h"
#include "gates.h"
#include "micro_kernels/label_loss.h"
#include "micro_kernels/load_balancing_loss.h"
#include "micro_kernels/plan.h"
#include "micro_kernels/route.h"
#include "micro_kernels/routing_entropy.h"
#include "micro_kernels/z_loss.h"

namespace micro_kernels {
namespace {

constexpr int64_t kTokens = 1024, kExperts = 4, kLayers = 2, kRows = kLayers * kTokens;

template <class T>
class GatesRouting : public testing::Test {
 protected:
  using Acc = accumulator_t<T>;
  static constexpr double kScores = kTokens * kExperts * double{sizeof(T)};
  static constexpr double kWide = kTokens * kExperts * double{sizeof(Acc)};

  static std::vector<int32_t> random_ids(int64_t count) {
    std::mt19937 random(3);
    std::vector<int32_t> ids;
    for (int64_t i = 0; i < count; ++i) ids.push_back(static_cast<int32_t>(random() % kExperts));
    return ids;
  }
};
using GatedTypes = testing::Types<float, BFloat16>;
TYPED_TEST_SUITE(GatesRouting, GatedTypes);

TYPED_TEST(GatesRouting, Route) {
  using T = TypeParam;
  using Acc = accumulator_t<T>;
  const Buffer<T> logits(random_elements<T>(kTokens * kExperts, 1));
  const Buffer<Acc> probs(kTokens * kExperts), effective(kTokens * kExperts), grad_z(kTokens * kExperts);
  for (const int64_t k : {1, 2}) {
    const Buffer<int32_t> ids(kTokens * k);
    const Buffer<T> weights(kTokens * k);
    const double choices = kTokens * k * (4.0 + sizeof(T));
    RouteParams forward{};
    forward.logits = logits.data();
    forward.ids = ids.data();
    forward.weights = weights.data();
    forward.probs = probs.data();
    forward.effective = effective.data();
    forward.tokens = kTokens;
    forward.experts = kExperts;
    forward.k = k;
    forward.dtype = kDTypeOf<T>;
    expect_launches({{TestFixture::kScores + 2 * TestFixture::kWide + choices}},
                    [&] { return MICRO_RUN(route, forward); });
    RouteBackwardParams backward{};
    backward.grad_weights = weights.data();
    backward.ids = ids.data();
    backward.probs = probs.data();
    backward.effective = effective.data();
    backward.grad_z = grad_z.data();
    backward.tokens = kTokens;
    backward.experts = kExperts;
    backward.k = k;
    backward.dtype = kDTypeOf<T>;
    // The choices are looked at up to four times: checked, summed, averaged, added.
    expect_launches({{3 * TestFixture::kWide + choices, (k == 1 ? 3 * 4.0 + sizeof(T) : 2 * 4.0) * kTokens}},
                    [&] { return MICRO_RUN(route_backward, backward); });
  }
}

// Each of the blocks reads all pairs; it then looks twice more at its own. Rows are written where they belong, which
// is not dense: the limit on sectors does not hold here, only that on what they sum to.
TYPED_TEST(GatesRouting, Plan) {
  using T = TypeParam;
  const Buffer<int32_t> ids(TestFixture::random_ids(kTokens)), tokens(kTokens), experts(kTokens), offsets(kExperts + 1),
      inverse(kTokens);
  const Buffer<T> weights(std::vector<T>(kTokens, T(1.0f)));
  const auto launches = counted_launches([&] {
    return MICRO_RUN(plan, PlanParams{ids.data(), weights.data(), nullptr, tokens.data(), experts.data(),
                                      offsets.data(), inverse.data(), kTokens, 1, kExperts, kDTypeOf<T>});
  });
  ASSERT_EQ(launches.size(), 1u);
  const double pairs = kTokens * (4.0 + sizeof(T)), rows = kTokens * 3 * 4.0, blocks = 2;
  const emu::Accounts& a = launches[0].accounts;
  EXPECT_LE(32.0 * static_cast<double>(a.distinct_sectors), kMostTraffic * (pairs + rows + 32));
  // Read by all blocks, again by the block that places them, their ids once more, and once to be checked.
  EXPECT_LE(32.0 * static_cast<double>(a.sectors),
            kMostTraffic * ((blocks + 1) * pairs + 2 * 4.0 * kTokens + 3 * rows));
}

// What small numbers cost: a sector for a launch, and one more for every warp that reads them.
constexpr double kSector = 32, kWarps = kRows / 32.0;
constexpr double kBlocks = kLayers * kTokens / 256.0;
constexpr double kSums = (kBlocks + kTokens / 256.0) * sizeof(double);  // of the blocks, and their numbers of tokens
constexpr double kSumSectors = kBlocks * 2 * kSector;                   // each is written by itself

TYPED_TEST(GatesRouting, ZLoss) {
  using T = TypeParam;
  using Acc = accumulator_t<T>;
  const Buffer<T> logits(random_elements<T>(kRows * kExperts, 1)), grad(kRows * kExperts);
  const Buffer<Acc> loss(1), slope(std::vector<Acc>{1});
  const double scores = kLayers * TestFixture::kScores;
  expect_launches({{scores + kSums, kSumSectors}, {kSums + kSector}}, [&] {
    return MICRO_RUN_WITH_WORKSPACE(
        z_loss, ZLossParams{logits.data(), nullptr, loss.data(), kLayers, kTokens, kExperts, kDTypeOf<T>});
  });
  expect_launches({{2 * scores + kSector, kWarps * kSector}}, [&] {
    return MICRO_RUN(z_loss_backward, ZLossBackwardParams{slope.data(), logits.data(), nullptr, grad.data(), kLayers,
                                                          kTokens, kExperts, kDTypeOf<T>});
  });
}

TYPED_TEST(GatesRouting, LabelLoss) {
  using T = TypeParam;
  using Acc = accumulator_t<T>;
  const Buffer<T> logits(random_elements<T>(kRows * kExperts, 1)), grad(kRows * kExperts);
  const Buffer<Acc> loss(1), slope(std::vector<Acc>{1});
  const std::vector<int32_t> experts = TestFixture::random_ids(kTokens);
  const Buffer<int64_t> labels(std::vector<int64_t>(experts.begin(), experts.end()));
  const double scores = kLayers * TestFixture::kScores, of_labels = kTokens * 8.0;
  // A layer looks at the labels twice: are they experts, and which.
  expect_launches(
      {{scores + of_labels + kSums, kSumSectors + (2 * kLayers - 1) * of_labels}, {kBlocks * sizeof(double) + kSector}},
      [&] {
        return MICRO_RUN_WITH_WORKSPACE(
            label_loss, LabelLossParams{logits.data(), labels.data(), nullptr, nullptr, loss.data(), kLayers, kTokens,
                                        kExperts, kDTypeOf<T>});
      });
  expect_launches({{2 * scores + of_labels + kSector, (kLayers - 1) * of_labels + kWarps * kSector}}, [&] {
    return MICRO_RUN(label_loss_backward,
                     LabelLossBackwardParams{slope.data(), logits.data(), labels.data(), nullptr, nullptr, grad.data(),
                                             kLayers, kTokens, kExperts, kDTypeOf<T>});
  });
}

TYPED_TEST(GatesRouting, RoutingEntropy) {
  using T = TypeParam;
  using Acc = accumulator_t<T>;
  const Buffer<T> probs(std::vector<T>(kRows * kExperts, T(0.25f))), grad(kRows * kExperts);
  const Buffer<Acc> entropy(kLayers), slopes(std::vector<Acc>(kLayers, Acc(1)));
  const double scores = kLayers * TestFixture::kScores;
  expect_launches({{scores + kSums, kSumSectors}, {kSums + kSector, kLayers * kSector}}, [&] {
    return MICRO_RUN_WITH_WORKSPACE(routing_entropy, RoutingEntropyParams{probs.data(), nullptr, entropy.data(),
                                                                          kLayers, kTokens, kExperts, kDTypeOf<T>});
  });
  expect_launches({{2 * scores + kSector, kWarps * kSector}}, [&] {
    return MICRO_RUN(routing_entropy_backward,
                     RoutingEntropyBackwardParams{slopes.data(), probs.data(), nullptr, grad.data(), kLayers, kTokens,
                                                  kExperts, kDTypeOf<T>});
  });
}

using GatesLoadBalancing = GatesRouting<float>;
TEST_F(GatesLoadBalancing, LoadBalancingLoss) {
  const Buffer<float> probs(std::vector<float>(kRows * kExperts, 0.25f)), grad(kRows * kExperts);
  const Buffer<int32_t> ids(random_ids(kRows));
  const Buffer<float> loss(1), slope(kLayers * kExperts), grad_loss(std::vector<float>{1});
  const double scores = kLayers * kScores;
  const auto launches = counted_launches([&] {
    return MICRO_RUN_WITH_WORKSPACE(
        load_balancing_loss, LoadBalancingLossParams{probs.data(), ids.data(), nullptr, loss.data(), slope.data(),
                                                     kLayers, kTokens, 1, kExperts, true, DType::kFloat32});
  });
  ASSERT_EQ(launches.size(), 2u);
  const double sums = kBlocks * 2 * kExperts * sizeof(double);  // of every block: choices and probabilities
  expect_traffic(launches[0], {scores + kRows * 4.0 + sums + kTokens / 256 * sizeof(double), kSumSectors});
  expect_launches({{scores + 2 * kSector, 2 * kWarps * kSector}}, [&] {
    return MICRO_RUN(load_balancing_loss_backward,
                     LoadBalancingLossBackwardParams{grad_loss.data(), slope.data(), nullptr, grad.data(), kLayers,
                                                     kTokens, kExperts, DType::kFloat32});
  });
}

}  // namespace
}  // namespace micro_kernels
