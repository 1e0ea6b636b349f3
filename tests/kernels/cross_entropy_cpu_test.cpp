// What concerns the cross-entropy's rows on the CPU alone: refusals, and the same arithmetic everywhere.

#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

#include "cross_entropy/cross_entropy_isa.h"
#include "micro_kernels/cross_entropy.h"
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
};

TEST(CrossEntropyOnCpu, LowAndHighPrecisionAgreeWithFloat32) {
  const Problem problem(5, 129);
  std::vector<BFloat16> low;
  std::vector<double> high;
  std::vector<float> rounded;
  for (const float x : problem.logits) {
    low.emplace_back(x);
    rounded.push_back(float(low.back()));
    high.push_back(rounded.back());
  }
  std::vector<float> losses(problem.rows), low_losses(problem.rows);
  std::vector<double> high_losses(problem.rows);
  const auto run = [&](void* logits, void* out, DType dtype) {
    return cpu::cross_entropy({logits, problem.targets.data(), out, problem.rows, problem.vocabulary, true, dtype},
                              serial);
  };
  ASSERT_EQ(run(rounded.data(), losses.data(), DType::kFloat32), Status::kOk);
  ASSERT_EQ(run(low.data(), low_losses.data(), DType::kBFloat16), Status::kOk);
  ASSERT_EQ(run(high.data(), high_losses.data(), DType::kFloat64), Status::kOk);
  EXPECT_EQ(losses, low_losses);  // the same arithmetic on the same values
  for (size_t i = 0; i < low.size(); ++i) EXPECT_EQ(float(low[i]), float(BFloat16(rounded[i])));
  for (int64_t i = 0; i < problem.rows; ++i)
    EXPECT_NEAR(losses[i], high_losses[i], 4e-6 * std::max(1.0, high_losses[i]));
}

TEST(CrossEntropyOnCpu, ATargetOutsideIsRefused) {
  std::vector<float> logits(6), losses(2);
  for (const int64_t bad : {int64_t{-1}, int64_t{3}}) {
    const std::vector<int64_t> targets = {0, bad};
    EXPECT_EQ(cpu::cross_entropy({logits.data(), targets.data(), losses.data(), 2, 3, true, DType::kFloat32}, serial),
              Status::kIndexOutOfRange);
  }
}

#if defined(__x86_64__)
TEST(CrossEntropyOnCpu, InstructionSetsAgree) {
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
