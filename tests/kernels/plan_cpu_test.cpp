// The CPU's plan: its chunks of pairs, in any order of the work.

#include <gtest/gtest.h>

#include <functional>
#include <vector>

#include "micro_kernels/plan.h"
#include "plan_oracle.h"

namespace micro_kernels {
namespace {

Status run(const PlanProblem& problem, Plan& r, const ParallelFor& parallel_for) {
  const PlanShape& s = problem.shape;
  const std::vector<int32_t> unset(s.tokens * s.k, -7);
  r = {unset, unset, std::vector<int32_t>(s.experts + 1, -7), unset};
  return cpu::plan(
      {problem.ids.data(), problem.weights.data(), reinterpret_cast<const bool*>(problem.mask.data()), r.tokens.data(),
       r.experts.data(), r.offsets.data(), r.inverse.data(), s.tokens, s.k, s.experts, DType::kFloat32},
      parallel_for);
}

void backwards(int64_t count, int64_t, const std::function<void(int64_t, int64_t)>& body) {
  for (int64_t i = count; i-- > 0;) body(i, i + 1);
}

class PlanChunksTest : public testing::TestWithParam<PlanShape> {};

TEST_P(PlanChunksTest, DoNotDependOnTheOrderOfTheWork) {
  const PlanProblem problem(GetParam());
  Plan forwards, reversed;
  ASSERT_EQ(run(problem, forwards, serial), Status::kOk);
  ASSERT_EQ(run(problem, reversed, backwards), Status::kOk);
  EXPECT_EQ(forwards, problem.oracle());
  EXPECT_EQ(forwards, reversed);
}

TEST_P(PlanChunksTest, AnIdOutsideIsRefused) {
  if (GetParam().tokens == 0) GTEST_SKIP() << "no pair, no id";
  for (const int32_t id : {-1, static_cast<int32_t>(GetParam().experts)}) {
    PlanProblem problem(GetParam());
    problem.ids.back() = id;
    Plan r;
    EXPECT_EQ(run(problem, r, serial), Status::kIndexOutOfRange);
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, PlanChunksTest,
                         testing::Values(PlanShape{0, 1, 4}, PlanShape{1, 1, 1}, PlanShape{33, 3, 17},
                                         PlanShape{20000, 2, 4}, PlanShape{40000, 1, 65}),
                         [](const auto& info) { return name_of(info.param); });

}  // namespace
}  // namespace micro_kernels
