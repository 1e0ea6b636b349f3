// Routing and its gradient against plain loops in double.

#include "micro_kernels/route.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <set>
#include <vector>

namespace micro_kernels {
namespace {

struct Shape {
  int64_t tokens, experts, k;
};

struct Outputs {
  std::vector<int32_t> ids;
  std::vector<float> weights, probs, effective;
  explicit Outputs(Shape s)
      : ids(s.tokens * s.k, -7),
        weights(s.tokens * s.k, NAN),
        probs(s.tokens * s.experts, NAN),
        effective(s.tokens * s.experts, NAN) {}
};

// Every kind of steering at once; expert 0 is never ablated.
struct Problem {
  Shape shape;
  std::vector<float> logits, bias;
  std::vector<char> ablate;
  std::vector<int32_t> force;

  explicit Problem(Shape s) : shape(s), ablate(s.tokens * s.experts) {
    std::mt19937 random(static_cast<unsigned>(s.tokens * 100 + s.experts));
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < s.tokens * s.experts; ++i) {
      logits.push_back(i % 7 == 0 ? 1.0f : normal(random) * (i % 5 == 0 ? 10.0f : 1.0f));  // ties and outliers
      ablate[i] = i % s.experts != 0 && random() % 4 == 0;
    }
    for (int64_t e = 0; e < s.experts; ++e) bias.push_back(0.5f * normal(random));
    for (int64_t t = 0; t < s.tokens; ++t)
      force.push_back(t % 6 == 5 ? static_cast<int32_t>(random() % s.experts) : -1);
  }

  RouteParams params(Outputs& out, WeightRule rule = WeightRule::kRenormalized) const {
    return {.logits = logits.data(),
            .rows = nullptr,
            .bias = bias.data(),
            .ablate = reinterpret_cast<const bool*>(ablate.data()),
            .force = force.data(),
            .replay = nullptr,
            .ids = out.ids.data(),
            .weights = out.weights.data(),
            .probs = out.probs.data(),
            .effective = out.effective.data(),
            .bias_stride = 0,
            .ablate_stride = shape.experts,
            .force_stride = 1,
            .tokens = shape.tokens,
            .experts = shape.experts,
            .k = shape.k,
            .rule = rule,
            .dtype = DType::kFloat32};
  }

  std::vector<double> oracle_probs(int64_t t) const {
    std::vector<double> p(shape.experts);
    double sum = 0;
    for (int64_t e = 0; e < shape.experts; ++e) {
      const int64_t i = t * shape.experts + e;
      if (force[t] >= 0)
        p[e] = e == force[t];
      else
        p[e] = ablate[i] ? 0.0 : std::exp(double(logits[i]) + bias[e]);
      sum += p[e];
    }
    for (double& value : p) value /= sum;
    return p;
  }
};

class RouteTest : public testing::TestWithParam<Shape> {
 protected:
  const Shape shape_ = GetParam();
  const Problem problem_{GetParam()};
};

TEST_P(RouteTest, ForwardEqualsTheDefinition) {
  Outputs out(shape_);
  ASSERT_EQ(cpu::route(problem_.params(out), serial), Status::kOk);
  for (int64_t t = 0; t < shape_.tokens; ++t) {
    const std::vector<double> want = problem_.oracle_probs(t);
    const float* p = out.probs.data() + t * shape_.experts;
    for (int64_t e = 0; e < shape_.experts; ++e) EXPECT_NEAR(p[e], want[e], 1e-6);
    std::vector<int32_t> order(shape_.experts);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [p](int32_t a, int32_t b) { return p[a] > p[b]; });
    double sum = 1e-9;
    for (int64_t i = 0; i < shape_.k; ++i) sum += p[order[i]];
    for (int64_t i = 0; i < shape_.k; ++i) {
      EXPECT_EQ(out.ids[t * shape_.k + i], order[i]);
      EXPECT_NEAR(out.weights[t * shape_.k + i], p[order[i]] / sum, 1e-6);
    }
  }
}

TEST_P(RouteTest, BackwardEqualsTheDefinition) {
  for (const WeightRule rule : {WeightRule::kRenormalized, WeightRule::kProbability, WeightRule::kStraightThrough}) {
    Outputs out(shape_);
    ASSERT_EQ(cpu::route(problem_.params(out, rule), serial), Status::kOk);
    std::mt19937 random(5);
    std::normal_distribution<float> normal;
    std::vector<float> delta(out.weights.size()), grad_probs(out.probs.size()), grad_effective(out.probs.size());
    for (auto* grad : {&delta, &grad_probs, &grad_effective})
      for (float& value : *grad) value = normal(random);
    std::vector<float> grad_z(out.probs.size(), NAN);
    ASSERT_EQ(cpu::route_backward({.grad_weights = delta.data(),
                                   .grad_probs = grad_probs.data(),
                                   .grad_effective = grad_effective.data(),
                                   .ids = out.ids.data(),
                                   .probs = out.probs.data(),
                                   .effective = out.effective.data(),
                                   .force = problem_.force.data(),
                                   .grad_z = grad_z.data(),
                                   .force_stride = 1,
                                   .tokens = shape_.tokens,
                                   .experts = shape_.experts,
                                   .k = shape_.k,
                                   .rule = rule,
                                   .dtype = DType::kFloat32},
                                  serial),
              Status::kOk);
    for (int64_t t = 0; t < shape_.tokens; ++t) {
      const float* p = out.probs.data() + t * shape_.experts;
      std::vector<double> dp(grad_probs.begin() + t * shape_.experts, grad_probs.begin() + (t + 1) * shape_.experts);
      double sum = 1e-9, mean_delta = 0, mean = 0;
      for (int64_t i = t * shape_.k; i < (t + 1) * shape_.k; ++i) sum += p[out.ids[i]];
      for (int64_t i = t * shape_.k; i < (t + 1) * shape_.k; ++i) mean_delta += p[out.ids[i]] / sum * delta[i];
      for (int64_t i = t * shape_.k; i < (t + 1) * shape_.k; ++i)
        dp[out.ids[i]] += rule == WeightRule::kRenormalized ? (delta[i] - mean_delta) / sum : delta[i];
      for (int64_t e = 0; e < shape_.experts; ++e) mean += p[e] * dp[e];
      for (int64_t e = 0; e < shape_.experts; ++e) {
        const int64_t i = t * shape_.experts + e;
        const bool constant = problem_.force[t] >= 0 || problem_.ablate[i];
        const double want = constant ? 0.0 : p[e] * (dp[e] - mean) + grad_effective[i];
        EXPECT_NEAR(grad_z[i], want, constant ? 0.0 : 1e-5 * std::max(1.0, std::abs(want)));
      }
    }
  }
}

TEST_P(RouteTest, NoIdLiesOutsideWhateverTheLogits) {
  Problem problem = problem_;
  const float strange[] = {NAN, INFINITY, -INFINITY};
  for (size_t i = 0; i < problem.logits.size(); i += 2) problem.logits[i] = strange[i % 3];
  Outputs out(shape_);
  ASSERT_EQ(cpu::route(problem.params(out), serial), Status::kOk);
  for (int64_t t = 0; t < shape_.tokens; ++t) {
    const auto row = out.ids.begin() + t * shape_.k;
    const std::set<int32_t> ids(row, row + shape_.k);
    EXPECT_EQ(static_cast<int64_t>(ids.size()), shape_.k);
    EXPECT_GE(*ids.begin(), 0);
    EXPECT_LT(*ids.rbegin(), shape_.experts);
  }
}

TEST_P(RouteTest, AnIdOutsideIsRefused) {
  if (shape_.tokens == 0) GTEST_SKIP() << "no token, no id";
  Outputs out(shape_);
  for (const int32_t id : {-2, static_cast<int32_t>(shape_.experts)}) {
    Problem problem = problem_;
    problem.force.back() = id;
    EXPECT_EQ(cpu::route(problem.params(out), serial), Status::kIndexOutOfRange);
    RouteParams replayed = problem_.params(out);
    const std::vector<int32_t> replay(shape_.tokens * shape_.k, id);
    replayed.replay = replay.data();
    EXPECT_EQ(cpu::route(replayed, serial), Status::kIndexOutOfRange);
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, RouteTest,
                         testing::Values(Shape{0, 4, 2}, Shape{1, 1, 1}, Shape{31, 4, 1}, Shape{33, 4, 4},
                                         Shape{129, 9, 2}, Shape{64, 65, 65}),
                         [](const auto& info) {
                           return std::to_string(info.param.tokens) + "_E" + std::to_string(info.param.experts) + "_K" +
                                  std::to_string(info.param.k);
                         });

}  // namespace
}  // namespace micro_kernels
