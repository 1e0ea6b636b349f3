// The gather and its gradient against plain loops in double.

#include "micro_kernels/permute.h"

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

// A plan of one expert: any permutation of the pairs, of which the last fifth is idle.
struct Problem {
  Shape shape;
  std::vector<int32_t> tokens, inverse, offsets{0, 0};
  std::vector<float> x, grad_y;

  explicit Problem(Shape s) : shape(s), inverse(s.tokens * s.k) {
    std::mt19937 random(static_cast<unsigned>(s.tokens + s.hidden));
    std::normal_distribution<float> normal;
    std::iota(inverse.begin(), inverse.end(), 0);
    std::shuffle(inverse.begin(), inverse.end(), random);
    tokens.resize(inverse.size());
    for (size_t pair = 0; pair < inverse.size(); ++pair)
      tokens[inverse[pair]] = static_cast<int32_t>(static_cast<int64_t>(pair) / s.k);
    offsets[1] = static_cast<int32_t>(rows() - rows() / 5);
    for (int64_t i = 0; i < s.tokens * s.hidden; ++i) x.push_back(normal(random) * (i % 5 == 0 ? 30.0f : 1.0f));
    for (int64_t i = 0; i < rows() * s.hidden; ++i) grad_y.push_back(normal(random));
  }
  int64_t rows() const { return shape.tokens * shape.k; }
};

class PermuteTest : public testing::TestWithParam<Shape> {
 protected:
  const Problem problem_{GetParam()};
};

TEST_P(PermuteTest, RowsAreCopiedAndIdleRowsAreZero) {
  const auto& [shape, tokens, inverse, offsets, x, grad_y] = problem_;
  std::vector<float> y(problem_.rows() * shape.hidden, NAN);
  ASSERT_EQ(cpu::permute({x.data(), tokens.data(), offsets.data(), y.data(), shape.tokens, problem_.rows(),
                          shape.hidden, 1, DType::kFloat32},
                         serial),
            Status::kOk);
  for (int64_t n = 0; n < problem_.rows(); ++n)
    for (int64_t h = 0; h < shape.hidden; ++h)
      EXPECT_EQ(y[n * shape.hidden + h], n < offsets[1] ? x[tokens[n] * shape.hidden + h] : 0.0f);
}

TEST_P(PermuteTest, BackwardSumsTheRowsOfAToken) {
  const auto& [shape, tokens, inverse, offsets, x, grad_y] = problem_;
  std::vector<float> grad_x(shape.tokens * shape.hidden, NAN);
  ASSERT_EQ(cpu::permute_backward({grad_y.data(), offsets.data(), inverse.data(), grad_x.data(), shape.tokens, shape.k,
                                   shape.hidden, 1, DType::kFloat32},
                                  serial),
            Status::kOk);
  for (int64_t t = 0; t < shape.tokens; ++t) {
    for (int64_t h = 0; h < shape.hidden; ++h) {
      double want = 0;
      for (int64_t i = 0; i < shape.k; ++i) {
        const int64_t row = inverse[t * shape.k + i];
        if (row < offsets[1]) want += grad_y[row * shape.hidden + h];
      }
      EXPECT_NEAR(grad_x[t * shape.hidden + h], want, 1e-6 * std::max(1.0, std::abs(want)));
    }
  }
}

TEST_P(PermuteTest, AnIndexOutsideIsRefused) {
  if (problem_.rows() == 0) GTEST_SKIP() << "no row, no index";
  auto [shape, tokens, inverse, offsets, x, grad_y] = problem_;
  std::vector<float> y(problem_.rows() * shape.hidden), grad_x(x.size());
  tokens.back() = static_cast<int32_t>(shape.tokens);
  EXPECT_EQ(cpu::permute({x.data(), tokens.data(), offsets.data(), y.data(), shape.tokens, problem_.rows(),
                          shape.hidden, 1, DType::kFloat32},
                         serial),
            Status::kIndexOutOfRange);
  inverse.back() = -1;
  EXPECT_EQ(cpu::permute_backward({grad_y.data(), offsets.data(), inverse.data(), grad_x.data(), shape.tokens, shape.k,
                                   shape.hidden, 1, DType::kFloat32},
                                  serial),
            Status::kIndexOutOfRange);
}

INSTANTIATE_TEST_SUITE_P(Shapes, PermuteTest,
                         testing::Values(Shape{0, 2, 8}, Shape{1, 1, 1}, Shape{3, 2, 33}, Shape{31, 4, 300},
                                         Shape{129, 1, 64}, Shape{4, 2, 0}),
                         [](const auto& info) {
                           return std::to_string(info.param.tokens) + "_K" + std::to_string(info.param.k) + "_H" +
                                  std::to_string(info.param.hidden);
                         });

// ---- bit for bit, in every element type and at sizes around those of a vector --------------------------------------

template <class T>
struct PermuteBits : testing::Test {};
TYPED_TEST_SUITE(PermuteBits, ElementTypes);

TYPED_TEST(PermuteBits, EqualTheDefinition) {
  using T = TypeParam;
  using Acc = accumulator_t<T>;
  for (int64_t hidden : {1, 8, 15, 16, 17, 33, 300}) {
    SCOPED_TRACE(hidden);
    const Problem plan(Shape{9, 3, hidden});
    const int64_t active = plan.offsets[1];
    const std::vector<T> x = random_elements<T>(9 * hidden, 1), grad_y = random_elements<T>(plan.rows() * hidden, 2);
    std::vector<T> y(grad_y.size(), T(Acc(7))), grad_x(x.size()), want_y(y.size(), T(Acc(0))), want_x;
    ASSERT_EQ(cpu::permute(
                  {x.data(), plan.tokens.data(), plan.offsets.data(), y.data(), 9, plan.rows(), hidden, 1, kDTypeOf<T>},
                  serial),
              Status::kOk);
    for (int64_t n = 0; n < active; ++n)
      std::copy_n(x.begin() + plan.tokens[n] * hidden, hidden, want_y.begin() + n * hidden);
    expect_same_bits(y, want_y);
    ASSERT_EQ(cpu::permute_backward({grad_y.data(), plan.offsets.data(), plan.inverse.data(), grad_x.data(), 9, 3,
                                     hidden, 1, kDTypeOf<T>},
                                    serial),
              Status::kOk);
    for (int64_t t = 0; t < 9; ++t)
      for (int64_t h = 0; h < hidden; ++h) {
        Acc sum = 0;
        for (int64_t i = 0; i < 3; ++i)
          if (const int64_t n = plan.inverse[t * 3 + i]; n < active) sum += static_cast<Acc>(grad_y[n * hidden + h]);
        want_x.push_back(T(sum));
      }
    expect_same_bits(grad_x, want_x);
  }
}

}  // namespace
}  // namespace micro_kernels
