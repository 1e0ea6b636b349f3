// The plan against a stable sort of the pairs, for several orders of the work.

#include "micro_kernels/plan.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <random>
#include <vector>

namespace micro_kernels {
namespace {

struct Shape {
  int64_t tokens, k, experts;
};

struct Result {
  std::vector<int32_t> tokens, experts, offsets, inverse;
  bool operator==(const Result&) const = default;
};

struct Problem {
  Shape shape;
  std::vector<int32_t> ids;
  std::vector<float> weights;
  std::vector<char> mask;

  explicit Problem(Shape s) : shape(s), mask(s.tokens) {
    std::mt19937 random(static_cast<unsigned>(s.tokens * 10 + s.k));
    for (int64_t pair = 0; pair < s.tokens * s.k; ++pair) {
      ids.push_back(static_cast<int32_t>(random() % std::max<int64_t>(1, s.experts - 1)));  // the last one stays empty
      weights.push_back(random() % 5 == 0 ? (random() % 2 ? 0.0f : -0.0f) : 0.5f);
    }
    for (auto& m : mask) m = random() % 7 != 0;
  }

  bool idle(int64_t pair) const { return weights[pair] == 0 || !mask[pair / shape.k]; }

  Result oracle() const {
    const int64_t pairs = shape.tokens * shape.k;
    std::vector<int32_t> order(pairs);
    std::iota(order.begin(), order.end(), 0);
    const auto bin = [this](int32_t pair) { return idle(pair) ? static_cast<int32_t>(shape.experts) : ids[pair]; };
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return bin(a) < bin(b); });
    Result r{{}, {}, std::vector<int32_t>(shape.experts + 1, 0), std::vector<int32_t>(pairs)};
    for (int64_t row = 0; row < pairs; ++row) {
      r.tokens.push_back(static_cast<int32_t>(order[row] / shape.k));
      r.experts.push_back(ids[order[row]]);
      r.inverse[order[row]] = static_cast<int32_t>(row);
      for (int64_t e = bin(order[row]) + 1; e <= shape.experts; ++e) ++r.offsets[e];
    }
    return r;
  }

  Status run(Result& r, const ParallelFor& parallel_for) const {
    const int64_t pairs = shape.tokens * shape.k;
    r = {std::vector<int32_t>(pairs, -7), std::vector<int32_t>(pairs, -7), std::vector<int32_t>(shape.experts + 1, -7),
         std::vector<int32_t>(pairs, -7)};
    return cpu::plan(
        {ids.data(), weights.data(), reinterpret_cast<const bool*>(mask.data()), r.tokens.data(), r.experts.data(),
         r.offsets.data(), r.inverse.data(), shape.tokens, shape.k, shape.experts, DType::kFloat32},
        parallel_for);
  }
};

void backwards(int64_t count, int64_t, const std::function<void(int64_t, int64_t)>& body) {
  for (int64_t i = count; i-- > 0;) body(i, i + 1);
}

class PlanTest : public testing::TestWithParam<Shape> {
 protected:
  const Problem problem_{GetParam()};
};

TEST_P(PlanTest, EqualsAStableSort) {
  Result got;
  ASSERT_EQ(problem_.run(got, serial), Status::kOk);
  EXPECT_EQ(got, problem_.oracle());
}

TEST_P(PlanTest, DoesNotDependOnTheOrderOfTheWork) {
  Result forwards, reversed;
  ASSERT_EQ(problem_.run(forwards, serial), Status::kOk);
  ASSERT_EQ(problem_.run(reversed, backwards), Status::kOk);
  EXPECT_EQ(forwards, reversed);
}

TEST_P(PlanTest, AnIdOutsideIsRefused) {
  if (GetParam().tokens == 0) GTEST_SKIP() << "no pair, no id";
  for (const int32_t id : {-1, static_cast<int32_t>(GetParam().experts)}) {
    Problem problem = problem_;
    problem.ids.back() = id;
    Result r;
    EXPECT_EQ(problem.run(r, serial), Status::kIndexOutOfRange);
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, PlanTest,
                         testing::Values(Shape{0, 1, 4}, Shape{1, 1, 1}, Shape{31, 2, 4}, Shape{129, 4, 4},
                                         Shape{33, 3, 17}, Shape{20000, 2, 4}, Shape{40000, 1, 65}),
                         [](const auto& info) {
                           return std::to_string(info.param.tokens) + "_K" + std::to_string(info.param.k) + "_E" +
                                  std::to_string(info.param.experts);
                         });

TEST(Plan, WithoutWeightsAndMaskNothingIsIdle) {
  const std::vector<int32_t> ids{2, 0, 2};
  std::vector<int32_t> tokens(3), experts(3), offsets(4), inverse(3);
  ASSERT_EQ(cpu::plan({ids.data(), nullptr, nullptr, tokens.data(), experts.data(), offsets.data(), inverse.data(), 3,
                       1, 3, DType::kFloat32},
                      serial),
            Status::kOk);
  EXPECT_EQ(tokens, (std::vector<int32_t>{1, 0, 2}));
  EXPECT_EQ(offsets, (std::vector<int32_t>{0, 1, 1, 3}));
}

}  // namespace
}  // namespace micro_kernels
