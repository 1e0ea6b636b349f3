// The plan against a stable sort of the pairs, on whichever back end this program was built for.

#include "micro_kernels/plan.h"

#include <gtest/gtest.h>

#include <random>
#include <vector>

#include "backend.h"
#include "elements.h"
#include "plan_oracle.h"

namespace micro_kernels {
namespace {

template <class T>
class PlanTest : public testing::Test {
 protected:
  // With or without weights and mask; what is absent idles no pair.
  static Plan run(const PlanProblem& problem, bool weighted = true, bool masked = true) {
    const PlanShape s = problem.shape;
    const int64_t pairs = s.tokens * s.k;
    std::vector<T> narrow;
    for (const float weight : problem.weights) narrow.push_back(T(weight));
    const Buffer<T> weights(narrow);
    const Buffer<char> mask(problem.mask);
    const Buffer<int32_t> ids(problem.ids), tokens(pairs), experts(pairs), offsets(s.experts + 1), inverse(pairs);
    EXPECT_EQ(MICRO_RUN(plan, PlanParams{ids.data(), weighted ? weights.data() : nullptr,
                                         masked ? reinterpret_cast<const bool*>(mask.data()) : nullptr, tokens.data(),
                                         experts.data(), offsets.data(), inverse.data(), s.tokens, s.k, s.experts,
                                         kDTypeOf<T>}),
              Status::kOk);
    return {tokens.read(), experts.read(), offsets.read(), inverse.read()};
  }
};
TYPED_TEST_SUITE(PlanTest, DeviceElementTypes);

// Around warps and blocks; more experts than are counted in one pass; more pairs of a token than a block has threads.
const PlanShape kShapes[] = {{0, 1, 4},  {1, 1, 1},   {31, 2, 4},  {32, 1, 4},  {129, 4, 4}, {33, 3, 17},
                             {20, 8, 8}, {40, 1, 25}, {600, 2, 4}, {513, 1, 7}, {2, 700, 5}};

TYPED_TEST(PlanTest, EqualsAStableSort) {
  for (const PlanShape& shape : kShapes) {
    SCOPED_TRACE(name_of(shape));
    const PlanProblem problem(shape);
    EXPECT_EQ(this->run(problem), problem.oracle());
  }
}

TYPED_TEST(PlanTest, WithoutWeightsAndMaskNothingIsIdle) {
  PlanProblem problem({130, 2, 5});
  const std::vector<float> weights = problem.weights;
  problem.weights.assign(weights.size(), 1.0f);
  EXPECT_EQ(this->run(problem, false, true), problem.oracle());
  problem.mask.assign(problem.mask.size(), true);
  EXPECT_EQ(this->run(problem, false, false), problem.oracle());
  problem.weights = weights;
  EXPECT_EQ(this->run(problem, true, false), problem.oracle());
}

TYPED_TEST(PlanTest, OneExpertTakesAllAndAllMayBeIdle) {
  PlanProblem problem({300, 2, 4});
  for (const int32_t expert : {0, 3}) {
    problem.ids.assign(problem.ids.size(), expert);
    EXPECT_EQ(this->run(problem), problem.oracle());
  }
  problem.mask.assign(problem.mask.size(), false);
  const Plan plan = this->run(problem);
  EXPECT_EQ(plan, problem.oracle());
  EXPECT_EQ(plan.offsets, std::vector<int32_t>(5, 0));
}

TEST(Plan, AnIdOutsideIsRefused) {
  if (kOnDevice) GTEST_SKIP() << "a device assertion on CUDA";
  for (const int32_t id : {-1, 3}) {
    const Buffer<int32_t> ids(std::vector<int32_t>{2, 0, id}), tokens(3), experts(3), offsets(4), inverse(3);
    EXPECT_EQ(MICRO_RUN(plan, PlanParams{ids.data(), nullptr, nullptr, tokens.data(), experts.data(), offsets.data(),
                                         inverse.data(), 3, 1, 3, DType::kFloat32}),
              Status::kIndexOutOfRange);
  }
}

}  // namespace
}  // namespace micro_kernels
