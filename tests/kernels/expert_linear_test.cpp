// The few-rows kernel against plain loops in double. The suite runs once per instruction set (MICRO_ISA).

#include "micro_kernels/expert_linear.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <string>
#include <vector>

namespace micro_kernels {
namespace {

struct Shape {
  int64_t rows, in, out;
};

template <class T>
constexpr DType kTag = std::is_same_v<T, double>  ? DType::kFloat64
                       : std::is_same_v<T, float> ? DType::kFloat32
                                                  : DType::kBFloat16;

// Not plain noise: every fifth value is an outlier.
template <class T>
std::vector<T> values(int64_t count, int seed) {
  std::mt19937 random(seed + count);
  std::normal_distribution<float> normal;
  std::vector<T> result;
  for (int64_t i = 0; i < count; ++i) result.push_back(T(normal(random) * (i % 5 == 0 ? 20.0f : 1.0f)));
  return result;
}

template <class T>
std::vector<T> run(const std::vector<T>& x, const std::vector<T>& weight, Shape s) {
  std::vector<T> y(s.rows * s.out);
  const LinearRows part{x.data(), weight.data(), y.data(), s.rows};
  EXPECT_EQ(cpu::few_rows_linear(&part, 1, s.in, s.out, kTag<T>, serial), Status::kOk);
  return y;
}

class FewRowsTest : public testing::TestWithParam<Shape> {
 protected:
  // `rounding`: of the sums and of the result, relative to the sum of the terms' sizes.
  template <class T>
  void equals_the_definition(double rounding) {
    const Shape s = GetParam();
    const std::vector<T> x = values<T>(s.rows * s.in, 1), weight = values<T>(s.out * s.in, 2), y = run(x, weight, s);
    for (int64_t r = 0; r < s.rows; ++r)
      for (int64_t o = 0; o < s.out; ++o) {
        double want = 0, size = 0;
        for (int64_t i = 0; i < s.in; ++i) {
          const double term = static_cast<accumulator_t<T>>(x[r * s.in + i]) *
                              static_cast<double>(static_cast<accumulator_t<T>>(weight[o * s.in + i]));
          want += term;
          size += std::abs(term);
        }
        ASSERT_NEAR(static_cast<accumulator_t<T>>(y[r * s.out + o]), want, rounding * size) << r << ", " << o;
      }
  }
};

TEST_P(FewRowsTest, Float32) { equals_the_definition<float>(1e-6); }
TEST_P(FewRowsTest, Float64) { equals_the_definition<double>(1e-14); }
TEST_P(FewRowsTest, BFloat16) { equals_the_definition<BFloat16>(4e-3); }

TEST_P(FewRowsTest, ARowDoesNotDependOnItsNeighbours) {
  const Shape s = GetParam();
  const std::vector<float> x = values<float>(s.rows * s.in, 1), weight = values<float>(s.out * s.in, 2);
  const std::vector<float> whole = run(x, weight, s);
  for (int64_t r = 0; r < s.rows; ++r) {
    const std::vector<float> row(x.begin() + r * s.in, x.begin() + (r + 1) * s.in);
    const std::vector<float> alone = run(row, weight, {1, s.in, s.out});
    EXPECT_EQ(alone, std::vector<float>(whole.begin() + r * s.out, whole.begin() + (r + 1) * s.out));
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, FewRowsTest,
                         testing::Values(Shape{0, 8, 4}, Shape{1, 1, 1}, Shape{1, 576, 33}, Shape{2, 31, 5},
                                         Shape{3, 33, 16}, Shape{4, 64, 17}, Shape{5, 100, 7}, Shape{8, 200, 130},
                                         Shape{13, 16, 3}),
                         [](const auto& info) {
                           return std::to_string(info.param.rows) + "x" + std::to_string(info.param.in) + "to" +
                                  std::to_string(info.param.out);
                         });

}  // namespace
}  // namespace micro_kernels
