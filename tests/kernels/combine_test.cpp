// The weighted sum and its gradients against plain loops in double.

#include "micro_kernels/combine.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <vector>

#include "elements.h"

namespace micro_kernels {
namespace {

struct Shape {
  int64_t tokens, k, hidden;
};

// Any permutation of the pairs, any experts, and an idle last fifth: the kernel asks no more of a plan.
struct Problem {
  static constexpr int64_t kExperts = 4;
  Shape shape;
  std::vector<int32_t> inverse, experts, offsets;
  std::vector<float> y, weights, grad;

  explicit Problem(Shape s) : shape(s), inverse(s.tokens * s.k), offsets(kExperts + 1, 0) {
    std::mt19937 random(static_cast<unsigned>(s.tokens + s.hidden));
    std::normal_distribution<float> normal;
    std::iota(inverse.begin(), inverse.end(), 0);
    std::shuffle(inverse.begin(), inverse.end(), random);
    for (size_t i = 0; i < inverse.size(); ++i) experts.push_back(static_cast<int32_t>(random() % kExperts));
    offsets[kExperts] = static_cast<int32_t>(rows() - rows() / 5);
    for (int64_t i = 0; i < rows() * s.hidden; ++i) y.push_back(normal(random) * (i % 5 == 0 ? 30.0f : 1.0f));
    for (int64_t i = 0; i < rows(); ++i) weights.push_back(normal(random));
    for (int64_t i = 0; i < s.tokens * s.hidden; ++i) grad.push_back(normal(random));
  }
  int64_t rows() const { return shape.tokens * shape.k; }
  bool active(int64_t pair) const { return inverse[pair] < offsets[kExperts]; }
  CombineParams forward(std::vector<float>& out) const {
    return {y.data(),     weights.data(), experts.data(), offsets.data(), inverse.data(), out.data(),
            shape.tokens, shape.k,        shape.hidden,   kExperts,       DType::kFloat32};
  }
  CombineBackwardParams backward(float* grad_y, float* grad_weights) const {
    return {grad.data(),  y.data(),     weights.data(), offsets.data(), inverse.data(), grad_y,
            grad_weights, shape.tokens, shape.k,        shape.hidden,   kExperts,       DType::kFloat32};
  }
};

class CombineTest : public testing::TestWithParam<Shape> {
 protected:
  const Problem problem_{GetParam()};
};

TEST_P(CombineTest, ForwardEqualsTheDefinition) {
  const Shape& s = problem_.shape;
  std::vector<float> out(s.tokens * s.hidden, NAN);
  ASSERT_EQ(cpu::combine(problem_.forward(out), serial), Status::kOk);
  for (int64_t t = 0; t < s.tokens; ++t) {
    for (int64_t h = 0; h < s.hidden; ++h) {
      double want = 0;
      for (int64_t pair = t * s.k; pair < (t + 1) * s.k; ++pair)
        if (problem_.active(pair))
          want += double(problem_.weights[pair]) * problem_.y[problem_.inverse[pair] * s.hidden + h];
      EXPECT_NEAR(out[t * s.hidden + h], want, 2e-5);
    }
  }
}

TEST_P(CombineTest, BackwardEqualsTheDefinitionAndIdlePairsGetZero) {
  const Shape& s = problem_.shape;
  std::vector<float> grad_y(problem_.rows() * s.hidden, NAN), grad_weights(problem_.rows(), NAN);
  ASSERT_EQ(cpu::combine_backward(problem_.backward(grad_y.data(), grad_weights.data()), serial), Status::kOk);
  for (int64_t pair = 0; pair < problem_.rows(); ++pair) {
    const int64_t row = problem_.inverse[pair], t = pair / s.k;
    double dot = 0, size = 0;
    for (int64_t h = 0; h < s.hidden; ++h) {
      const double g = problem_.grad[t * s.hidden + h], term = g * problem_.y[row * s.hidden + h];
      dot += term;
      size += std::abs(term);
      EXPECT_EQ(grad_y[row * s.hidden + h],
                problem_.active(pair) ? static_cast<float>(g) * problem_.weights[pair] : 0.0f);
    }
    if (problem_.active(pair))
      EXPECT_NEAR(grad_weights[pair], dot, 1e-6 * (1 + size));
    else
      EXPECT_EQ(grad_weights[pair], 0.0f);
  }
}

TEST_P(CombineTest, OneGradientAloneIsTheSame) {
  const Shape& s = problem_.shape;
  std::vector<float> both_y(problem_.rows() * s.hidden), both_w(problem_.rows());
  std::vector<float> alone_y(both_y.size(), NAN), alone_w(both_w.size(), NAN);
  ASSERT_EQ(cpu::combine_backward(problem_.backward(both_y.data(), both_w.data()), serial), Status::kOk);
  ASSERT_EQ(cpu::combine_backward(problem_.backward(alone_y.data(), nullptr), serial), Status::kOk);
  ASSERT_EQ(cpu::combine_backward(problem_.backward(nullptr, alone_w.data()), serial), Status::kOk);
  EXPECT_EQ(alone_y, both_y);
  EXPECT_EQ(alone_w, both_w);
}

TEST_P(CombineTest, ARowOutsideIsRefused) {
  if (problem_.rows() == 0) GTEST_SKIP() << "no row, no index";
  Problem problem = problem_;
  problem.inverse.back() = static_cast<int32_t>(problem.rows());
  std::vector<float> out(problem.shape.tokens * problem.shape.hidden), grad_weights(problem.rows());
  EXPECT_EQ(cpu::combine(problem.forward(out), serial), Status::kIndexOutOfRange);
  EXPECT_EQ(cpu::combine_backward(problem.backward(nullptr, grad_weights.data()), serial), Status::kIndexOutOfRange);
}

INSTANTIATE_TEST_SUITE_P(Shapes, CombineTest,
                         testing::Values(Shape{0, 2, 8}, Shape{1, 1, 1}, Shape{3, 2, 33}, Shape{31, 4, 300},
                                         Shape{129, 1, 64}, Shape{4, 3, 0}),
                         [](const auto& info) {
                           return std::to_string(info.param.tokens) + "_K" + std::to_string(info.param.k) + "_H" +
                                  std::to_string(info.param.hidden);
                         });

// Addition in bfloat16 is not associative: 256 + 1 + 1 is 256, 1 + 1 + 256 is 258.
TEST(Combine, ExpertsAreAddedInAscendingOrderWhateverTheirRank) {
  const std::vector<BFloat16> y{BFloat16(256.0f), BFloat16(1.0f), BFloat16(1.0f)}, weights(3, BFloat16(1.0f));
  const std::vector<int32_t> inverse{2, 0, 1}, offsets{0, 0, 0, 3};
  BFloat16 out;
  const auto sum_with = [&](std::vector<int32_t> experts) {
    EXPECT_EQ(cpu::combine({y.data(), weights.data(), experts.data(), offsets.data(), inverse.data(), &out, 1, 3, 1, 3,
                            DType::kBFloat16},
                           serial),
              Status::kOk);
    return static_cast<float>(out);
  };
  EXPECT_EQ(sum_with({0, 1, 2}), 256.0f);
  EXPECT_EQ(sum_with({2, 0, 1}), 258.0f);
}

// ---- bit for bit, in every element type and at sizes around those of a vector --------------------------------------

template <class T>
struct CombineBits : testing::Test {};
TYPED_TEST_SUITE(CombineBits, ElementTypes);

TYPED_TEST(CombineBits, EachSumIsRounded) {
  using T = TypeParam;
  using Acc = accumulator_t<T>;
  const auto wide = [](T value) { return static_cast<Acc>(value); };
  for (int64_t hidden : {1, 8, 15, 16, 17, 33, 300}) {
    SCOPED_TRACE(hidden);
    Problem plan(Shape{9, 3, hidden});
    for (size_t n = 0; n < plan.experts.size(); ++n) plan.experts[n] = static_cast<int32_t>(n);  // rows stand in order
    const std::vector<T> y = random_elements<T>(plan.rows() * hidden, 1), weights = random_elements<T>(plan.rows(), 2);
    std::vector<T> out(9 * hidden), want;
    CombineParams params = plan.forward(plan.grad);
    params.y = y.data();
    params.weights = weights.data();
    params.out = out.data();
    params.dtype = kDTypeOf<T>;
    ASSERT_EQ(cpu::combine(params, serial), Status::kOk);
    for (int64_t t = 0; t < 9; ++t) {
      std::vector<int64_t> pairs{t * 3, t * 3 + 1, t * 3 + 2};
      std::sort(pairs.begin(), pairs.end(), [&](int64_t a, int64_t b) { return plan.inverse[a] < plan.inverse[b]; });
      for (int64_t h = 0; h < hidden; ++h) {
        T sum(Acc(0));
        for (int64_t pair : pairs)
          if (plan.active(pair))
            sum = T(wide(sum) + wide(T(wide(y[plan.inverse[pair] * hidden + h]) * wide(weights[pair]))));
        want.push_back(sum);
      }
    }
    expect_same_bits(out, want);
  }
}

TYPED_TEST(CombineBits, BackwardEqualsTheDefinition) {
  using T = TypeParam;
  using Acc = accumulator_t<T>;
  const auto wide = [](T value) { return static_cast<Acc>(value); };
  for (int64_t hidden : {1, 8, 15, 16, 17, 33, 300}) {
    SCOPED_TRACE(hidden);
    const Problem plan(Shape{9, 3, hidden});
    const std::vector<T> y = random_elements<T>(plan.rows() * hidden, 1), weights = random_elements<T>(plan.rows(), 2);
    const std::vector<T> grad = random_elements<T>(9 * hidden, 3);
    std::vector<T> grad_y(y.size(), T(Acc(7))), want_y(y.size(), T(Acc(0)));
    std::vector<Acc> grad_weights(plan.rows()), want_weights(plan.rows());
    ASSERT_EQ(cpu::combine_backward({grad.data(), y.data(), weights.data(), plan.offsets.data(), plan.inverse.data(),
                                     grad_y.data(), grad_weights.data(), 9, 3, hidden, Problem::kExperts, kDTypeOf<T>},
                                    serial),
              Status::kOk);
    for (int64_t pair = 0; pair < plan.rows(); ++pair) {
      if (!plan.active(pair)) continue;
      const int64_t row = plan.inverse[pair] * hidden, token = pair / 3 * hidden;
      Acc part[16] = {};
      for (int64_t h = 0; h < hidden; ++h) {
        want_y[row + h] = T(wide(grad[token + h]) * wide(weights[pair]));
        part[h % 16] += wide(grad[token + h]) * wide(y[row + h]);
      }
      for (int64_t width = 8; width > 0; width /= 2)
        for (int64_t j = 0; j < width; ++j) part[j] += part[j + width];
      want_weights[pair] = part[0];
    }
    expect_same_bits(grad_y, want_y);
    expect_same_bits(grad_weights, want_weights);
  }
}

}  // namespace
}  // namespace micro_kernels
