// Rows of cross-entropy against plain loops in double.

#include "micro_kernels/cross_entropy.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

#include "cross_entropy/cross_entropy_isa.h"
#include "micro_kernels/isa.h"

namespace micro_kernels {
namespace {

struct Problem {
  int64_t rows, vocabulary;
  std::vector<float> logits;
  std::vector<int64_t> targets;

  Problem(int64_t r, int64_t v) : rows(r), vocabulary(v) {
    std::mt19937 random(r * 1000 + v);
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < r * v; ++i) logits.push_back(normal(random) * (i % 7 == 0 ? 20.0f : 1.0f));
    for (int64_t i = 0; i < r; ++i) targets.push_back(random() % v);
  }

  double log_sum(int64_t row) const {
    double top = -INFINITY, sum = 0;
    for (int64_t v = 0; v < vocabulary; ++v) top = std::max(top, double(logits[row * vocabulary + v]));
    for (int64_t v = 0; v < vocabulary; ++v) sum += std::exp(logits[row * vocabulary + v] - top);
    return top + std::log(sum);
  }
};

class CrossEntropyTest : public testing::TestWithParam<std::pair<int64_t, int64_t>> {
 protected:
  const Problem problem_{GetParam().first, GetParam().second};
};

TEST_P(CrossEntropyTest, EqualsTheDefinition) {
  std::vector<float> logits = problem_.logits, losses(problem_.rows, NAN);
  ASSERT_EQ(cpu::cross_entropy({logits.data(), problem_.targets.data(), losses.data(), problem_.rows,
                                problem_.vocabulary, true, DType::kFloat32},
                               serial),
            Status::kOk);
  for (int64_t row = 0; row < problem_.rows; ++row) {
    const double log_sum = problem_.log_sum(row);
    for (int64_t v = 0; v < problem_.vocabulary; ++v) {
      const int64_t i = row * problem_.vocabulary + v;
      const double want = std::exp(problem_.logits[i] - log_sum) - (v == problem_.targets[row]);
      EXPECT_NEAR(logits[i], want, 2e-6);
    }
    const double want = log_sum - problem_.logits[row * problem_.vocabulary + problem_.targets[row]];
    EXPECT_NEAR(losses[row], want, 4e-6 * std::max(1.0, want));
  }
}

TEST_P(CrossEntropyTest, WithoutGradientTheLogitsStay) {
  std::vector<float> logits = problem_.logits, losses(problem_.rows, NAN);
  ASSERT_EQ(cpu::cross_entropy({logits.data(), problem_.targets.data(), losses.data(), problem_.rows,
                                problem_.vocabulary, false, DType::kFloat32},
                               serial),
            Status::kOk);
  EXPECT_EQ(logits, problem_.logits);
}

TEST_P(CrossEntropyTest, LowAndHighPrecisionAgreeWithFloat32) {
  std::vector<BFloat16> low;
  std::vector<double> high;
  std::vector<float> rounded;
  for (const float x : problem_.logits) {
    low.emplace_back(x);
    rounded.push_back(float(low.back()));
    high.push_back(rounded.back());
  }
  std::vector<float> losses(problem_.rows), low_losses(problem_.rows);
  std::vector<double> high_losses(problem_.rows);
  const auto run = [&](void* logits, void* out, DType dtype) {
    return cpu::cross_entropy({logits, problem_.targets.data(), out, problem_.rows, problem_.vocabulary, true, dtype},
                              serial);
  };
  ASSERT_EQ(run(rounded.data(), losses.data(), DType::kFloat32), Status::kOk);
  ASSERT_EQ(run(low.data(), low_losses.data(), DType::kBFloat16), Status::kOk);
  ASSERT_EQ(run(high.data(), high_losses.data(), DType::kFloat64), Status::kOk);
  EXPECT_EQ(losses, low_losses);  // the same arithmetic on the same values
  for (size_t i = 0; i < low.size(); ++i) EXPECT_EQ(float(low[i]), float(BFloat16(rounded[i])));
  for (int64_t i = 0; i < problem_.rows; ++i)
    EXPECT_NEAR(losses[i], high_losses[i], 4e-6 * std::max(1.0, high_losses[i]));
}

INSTANTIATE_TEST_SUITE_P(Shapes, CrossEntropyTest,
                         testing::Values(std::pair(0, 5), std::pair(1, 1), std::pair(2, 15), std::pair(3, 16),
                                         std::pair(3, 17), std::pair(5, 129), std::pair(2, 5000)),
                         [](const auto& info) {
                           return std::to_string(info.param.first) + "x" + std::to_string(info.param.second);
                         });

TEST(CrossEntropy, ATargetOutsideIsRefused) {
  std::vector<float> logits(6), losses(2);
  for (const int64_t bad : {int64_t{-1}, int64_t{3}}) {
    const std::vector<int64_t> targets = {0, bad};
    EXPECT_EQ(cpu::cross_entropy({logits.data(), targets.data(), losses.data(), 2, 3, true, DType::kFloat32}, serial),
              Status::kIndexOutOfRange);
  }
}

TEST(CrossEntropy, MinusInfinityHasProbabilityZeroAndNanReachesTheLoss) {
  std::vector<float> logits = {0, -INFINITY, 0, NAN, 1, 1}, losses(2);
  const std::vector<int64_t> targets = {0, 1};
  ASSERT_EQ(cpu::cross_entropy({logits.data(), targets.data(), losses.data(), 2, 3, true, DType::kFloat32}, serial),
            Status::kOk);
  EXPECT_FLOAT_EQ(losses[0], std::log(2.0f));
  EXPECT_EQ(logits[1], 0.0f);
  EXPECT_TRUE(std::isnan(losses[1]));
}

#if defined(__x86_64__)
TEST(CrossEntropy, InstructionSetsAgree) {
  const Problem problem(1, 1000);
  const auto run = [&](const cpu::CrossEntropyRows& rows) {
    std::vector<float> logits = problem.logits, wide(cpu::cross_entropy_scratch(1000));
    logits.push_back(rows.float32(logits.data(), 1000, problem.targets[0], true, wide.data()));
    return logits;
  };
  const std::vector<float> want = run(cpu::kCrossEntropyPlain);
  std::vector<std::vector<float>> others;
  if (cpu::isa_choice().best >= cpu::Isa::kAvx2) others.push_back(run(cpu::kCrossEntropyAvx2));
  if (cpu::isa_choice().best >= cpu::Isa::kAvx512) others.push_back(run(cpu::kCrossEntropyAvx512));
  if (others.empty()) GTEST_SKIP() << "this CPU has the plain instruction set only";
  for (const auto& got : others)
    for (size_t i = 0; i < want.size(); ++i) EXPECT_NEAR(got[i], want[i], 4e-6 * std::max(1.0f, std::abs(want[i])));
}
#endif

}  // namespace
}  // namespace micro_kernels
