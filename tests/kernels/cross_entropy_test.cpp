// Rows of cross-entropy against plain loops in double, on whichever back end this program was built for.

#include "micro_kernels/cross_entropy.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "backend.h"
#include "elements.h"
#include "offset.h"

namespace micro_kernels {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

// Half a unit of the element type, relative: how a gradient is stored.
template <class T>
constexpr double kStored = 0x1p-24;
template <>
constexpr double kStored<double> = 0x1p-53;
template <>
constexpr double kStored<BFloat16> = 0x1p-8;
template <>
constexpr double kStored<Float16> = 0x1p-11;
// And absolute: the smallest step of half precision; the error of exponentials and their sums.
template <class T>
constexpr double kSums = std::is_same_v<T, double> ? 1e-14 : 2e-6;

template <class T>
struct Problem {
  int64_t rows, vocabulary;
  std::vector<T> logits;
  std::vector<int64_t> targets;

  Problem(int64_t r, int64_t v) : rows(r), vocabulary(v) {
    std::mt19937 random(static_cast<unsigned>(r * 1000 + v));
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < r * v; ++i) logits.push_back(T(normal(random) * (i % 7 == 0 ? 20.0f : 1.0f)));
    for (int64_t i = 0; i < r; ++i) targets.push_back(static_cast<int64_t>(random()) % v);
  }

  double logit(int64_t row, int64_t v) const { return static_cast<accumulator_t<T>>(logits[row * vocabulary + v]); }
  double log_sum(int64_t row) const {
    double top = -kInf, sum = 0;
    for (int64_t v = 0; v < vocabulary; ++v) top = std::max(top, logit(row, v));
    for (int64_t v = 0; v < vocabulary; ++v) sum += std::exp(logit(row, v) - top);
    return top + std::log(sum);
  }
};

template <class T>
struct Answer {
  Status status;
  std::vector<T> logits;
  std::vector<accumulator_t<T>> losses;
};

// offset: of the first logit, in elements; count: of rows that are there, or nullptr.
template <class T>
Answer<T> run(const Problem<T>& problem, bool write_gradient, int64_t offset = 0, const int32_t* count = nullptr) {
  const OffsetBuffer<T> logits(problem.logits, offset);
  const Buffer<int64_t> targets(problem.targets);
  const Buffer<accumulator_t<T>> losses(problem.rows);
  const Status status =
      MICRO_RUN(cross_entropy, CrossEntropyParams{logits.data(), targets.data(), losses.data(), problem.rows,
                                                  problem.vocabulary, write_gradient, kDTypeOf<T>, count});
  return {status, logits.read(), losses.read()};
}

struct Shape {
  int64_t rows, vocabulary;
};
const Shape kShapes[] = {{0, 5}, {1, 1}, {2, 15}, {3, 16}, {3, 17}, {5, 129}, {2, 5000}};

template <class T>
class CrossEntropy : public testing::Test {};
TYPED_TEST_SUITE(CrossEntropy, DeviceElementTypes);

TYPED_TEST(CrossEntropy, EqualsTheDefinition) {
  using T = TypeParam;
  for (const auto [rows, vocabulary] : kShapes) {
    const Problem<T> problem(rows, vocabulary);
    const Answer<T> got = run(problem, true);
    ASSERT_EQ(got.status, Status::kOk);
    for (int64_t row = 0; row < rows; ++row) {
      const double log_sum = problem.log_sum(row);
      for (int64_t v = 0; v < vocabulary; ++v) {
        const double want = std::exp(problem.logit(row, v) - log_sum) - (v == problem.targets[row]);
        ASSERT_NEAR(static_cast<accumulator_t<T>>(got.logits[row * vocabulary + v]), want,
                    kSums<T> + kStored<T> * std::abs(want))
            << row << ", " << v << " of " << vocabulary;
      }
      const double want = log_sum - problem.logit(row, problem.targets[row]);
      EXPECT_NEAR(got.losses[row], want, 2 * kSums<T> * std::max(1.0, std::abs(want)));
    }
  }
}

TYPED_TEST(CrossEntropy, WithoutGradientTheLogitsStay) {
  for (const auto [rows, vocabulary] : kShapes) {
    const Problem<TypeParam> problem(rows, vocabulary);
    const auto alone = run(problem, false), with_gradient = run(problem, true);
    ASSERT_EQ(alone.status, Status::kOk);
    expect_same_bits(alone.logits, problem.logits);
    expect_same_bits(alone.losses, with_gradient.losses);
  }
}

TYPED_TEST(CrossEntropy, NoBitDependsOnWhereTheRowsLie) {
  for (const auto [rows, vocabulary] : {Shape{3, 16}, Shape{3, 17}, Shape{2, 2048}}) {
    const Problem<TypeParam> problem(rows, vocabulary);
    const auto here = run(problem, true), there = run(problem, true, 1);
    ASSERT_EQ(there.status, Status::kOk);
    expect_same_bits(there.logits, here.logits);
    expect_same_bits(there.losses, here.losses);
  }
}

TYPED_TEST(CrossEntropy, RowsBehindTheCountAreNotTouched) {
  if (!kOnDevice) GTEST_SKIP() << "counts on the device are CUDA's";
  Problem<TypeParam> problem(5, 40);
  const auto all = run(problem, true);
  problem.targets[3] = -1;
  problem.targets[4] = 40;
  for (const int32_t there : {0, 3}) {
    const Buffer<int32_t> count(std::vector<int32_t>{there});
    const auto some = run(problem, true, 0, count.data());
    ASSERT_EQ(some.status, Status::kOk);
    for (int64_t i = 0; i < 5 * 40; ++i) {
      const auto want = i / 40 < there ? all.logits[i] : problem.logits[i];
      EXPECT_EQ(static_cast<accumulator_t<TypeParam>>(some.logits[i]), static_cast<accumulator_t<TypeParam>>(want));
    }
    for (int64_t row = 0; row < 5; ++row) EXPECT_EQ(some.losses[row], row < there ? all.losses[row] : 0);
  }
}

// Rows of special values among rows of several threads' length, so that most threads see nothing of them.
TYPED_TEST(CrossEntropy, InfinitiesAndNan) {
  using T = TypeParam;
  constexpr int64_t kVocabulary = 40;
  Problem<T> problem(6, kVocabulary);
  const auto fill = [&](int64_t row, double value) {
    for (int64_t v = 0; v < kVocabulary; ++v) problem.logits[row * kVocabulary + v] = T(static_cast<float>(value));
  };
  const auto set = [&](int64_t row, int64_t v, double value) {
    problem.logits[row * kVocabulary + v] = T(static_cast<float>(value));
  };
  problem.targets = {0, 1, 2, 3, 33, 5};
  fill(0, -kInf), set(0, 0, 0), set(0, 35, 0);  // two are as likely, the others impossible
  set(1, 39, NAN);
  fill(2, -kInf);
  set(3, 20, kInf);
  fill(4, 1), set(4, 33, -kInf);  // the target is impossible
  fill(5, -kInf), set(5, 39, NAN);
  const auto got = run(problem, true);
  ASSERT_EQ(got.status, Status::kOk);
  const auto gradient = [&](int64_t row, int64_t v) {
    return static_cast<accumulator_t<T>>(got.logits[row * kVocabulary + v]);
  };
  EXPECT_NEAR(got.losses[0], std::log(2.0), 1e-6);
  EXPECT_EQ(gradient(0, 0), -0.5);
  EXPECT_EQ(gradient(0, 1), 0);
  EXPECT_EQ(gradient(0, 35), 0.5);
  for (const int64_t row : {1, 2, 3, 5}) EXPECT_TRUE(std::isnan(got.losses[row])) << row;
  EXPECT_TRUE(std::isnan(gradient(1, 7)));
  EXPECT_EQ(got.losses[4], kInf);
  EXPECT_EQ(gradient(4, 33), -1);
  EXPECT_NEAR(gradient(4, 0), 1.0 / 39, 1e-4);
}

}  // namespace
}  // namespace micro_kernels
