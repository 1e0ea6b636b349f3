// The rotation against plain loops in double.

#include "micro_kernels/rope.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

#include "elements.h"

namespace micro_kernels {
namespace {

struct Shape {
  int64_t outer, positions, heads, head_dim;
  bool with_tokens;
};

struct Problem {
  Shape shape;
  int64_t rows, half;
  std::vector<float> x, cos, sin;
  std::vector<int32_t> tokens;

  explicit Problem(Shape s) : shape(s), rows(s.outer * s.positions), half(s.head_dim / 2) {
    std::mt19937 random(static_cast<unsigned>(rows + s.head_dim));
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < rows * s.heads * s.head_dim; ++i) x.push_back(normal(random) * (i % 5 == 0 ? 30.0f : 1.0f));
    for (int64_t p = 0; p < s.positions; ++p) {
      for (int64_t i = 0; i < half; ++i) {
        const double angle = double(p) * std::pow(10000.0, -2.0 * double(i) / double(s.head_dim));
        cos.push_back(static_cast<float>(std::cos(angle)));
        sin.push_back(static_cast<float>(std::sin(angle)));
      }
    }
    for (int64_t r = 0; r < rows; ++r) tokens.push_back(static_cast<int32_t>(random() % s.positions));
  }
  int64_t position(int64_t row) const { return shape.with_tokens ? tokens[row] : row % shape.positions; }
  Status run(const std::vector<float>& from, std::vector<float>& to, RopeDirection direction) const {
    return cpu::rope({from.data(), cos.data(), sin.data(), shape.with_tokens ? tokens.data() : nullptr, to.data(), rows,
                      shape.positions, shape.heads, shape.head_dim, direction, DType::kFloat32},
                     serial);
  }
};

class RopeTest : public testing::TestWithParam<Shape> {
 protected:
  const Problem problem_{GetParam()};
};

TEST_P(RopeTest, ForwardEqualsTheDefinition) {
  const Shape& s = problem_.shape;
  std::vector<float> y(problem_.x.size(), NAN);
  ASSERT_EQ(problem_.run(problem_.x, y, RopeDirection::kForward), Status::kOk);
  for (int64_t head = 0; head < problem_.rows * s.heads; ++head) {
    for (int64_t i = 0; i < problem_.half; ++i) {
      const int64_t at = problem_.position(head / s.heads) * problem_.half + i, first = head * s.head_dim + i;
      const double a = problem_.x[first], b = problem_.x[first + problem_.half];
      const double c = problem_.cos[at], n = problem_.sin[at];
      EXPECT_NEAR(y[first], a * c - b * n, 1e-5);
      EXPECT_NEAR(y[first + problem_.half], b * c + a * n, 1e-5);
    }
  }
}

TEST_P(RopeTest, BackwardTurnsBack) {
  std::vector<float> y(problem_.x.size()), back(problem_.x.size(), NAN);
  ASSERT_EQ(problem_.run(problem_.x, y, RopeDirection::kForward), Status::kOk);
  ASSERT_EQ(problem_.run(y, back, RopeDirection::kBackward), Status::kOk);
  for (size_t i = 0; i < back.size(); ++i) EXPECT_NEAR(back[i], problem_.x[i], 2e-5);
}

TEST_P(RopeTest, ATokenOutsideTheTableIsRefused) {
  if (!problem_.shape.with_tokens || problem_.rows == 0) GTEST_SKIP() << "no token";
  Problem problem = problem_;
  problem.tokens.back() = static_cast<int32_t>(problem.shape.positions);
  std::vector<float> y(problem.x.size());
  EXPECT_EQ(problem.run(problem.x, y, RopeDirection::kForward), Status::kIndexOutOfRange);
}

INSTANTIATE_TEST_SUITE_P(Shapes, RopeTest,
                         testing::Values(Shape{0, 3, 2, 8, false}, Shape{1, 1, 1, 2, false}, Shape{4, 7, 3, 64, false},
                                         Shape{1, 33, 2, 66, true}, Shape{2, 65, 9, 128, true}),
                         [](const auto& info) {
                           const Shape& s = info.param;
                           return std::to_string(s.outer * s.positions) + "x" + std::to_string(s.heads) + "x" +
                                  std::to_string(s.head_dim) + (s.with_tokens ? "_tokens" : "");
                         });

// ---- bit for bit, in every element type and at sizes around those of a vector --------------------------------------

template <class T>
struct RopeBits : testing::Test {};
TYPED_TEST_SUITE(RopeBits, ElementTypes);

TYPED_TEST(RopeBits, EqualTheDefinitionInPlaceToo) {
  using T = TypeParam;
  using Acc = accumulator_t<T>;
  constexpr int64_t kRows = 5, kHeads = 2;
  for (int64_t half : {1, 4, 8, 15, 16, 17, 32, 33}) {
    SCOPED_TRACE(half);
    const std::vector<T> x = random_elements<T>(kRows * kHeads * 2 * half, 1);
    const std::vector<Acc> cos = random_elements<Acc>(kRows * half, 2), sin = random_elements<Acc>(kRows * half, 3);
    for (RopeDirection direction : {RopeDirection::kForward, RopeDirection::kBackward}) {
      const auto turn = [&](const std::vector<T>& from, std::vector<T>& to) {
        return cpu::rope({from.data(), cos.data(), sin.data(), nullptr, to.data(), kRows, kRows, kHeads, 2 * half,
                          direction, kDTypeOf<T>},
                         serial);
      };
      std::vector<T> y(x.size()), in_place = x, want(x.size());
      ASSERT_EQ(turn(x, y), Status::kOk);
      ASSERT_EQ(turn(in_place, in_place), Status::kOk);
      const Acc sign = direction == RopeDirection::kForward ? Acc(1) : Acc(-1);
      for (int64_t head = 0; head < kRows * kHeads; ++head)
        for (int64_t i = 0; i < half; ++i) {
          const int64_t at = head / kHeads * half + i, first = head * 2 * half + i;
          const Acc a = static_cast<Acc>(x[first]), b = static_cast<Acc>(x[first + half]), s = sign * sin[at];
          want[first] = T(a * cos[at] - b * s);
          want[first + half] = T(b * cos[at] + a * s);
        }
      expect_same_bits(y, want);
      expect_same_bits(in_place, want);
    }
  }
}

}  // namespace
}  // namespace micro_kernels
