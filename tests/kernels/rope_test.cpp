// The rotation against plain loops in double, on whichever back end this program was built for.

#include "micro_kernels/rope.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

#include "backend.h"
#include "elements.h"
#include "offset.h"
#include "rounding.h"

namespace micro_kernels {
namespace {

struct Shape {
  int64_t outer, positions, heads, head_dim;
  bool with_tokens = false;
  int64_t offset = 0;  // of every row from its vectors, in elements
};

// Halves of a head that are less than a vector, whole vectors, and wider than a warp; heads that a warp takes at once,
// and more. The last: so many rows that a warp walks over all heads of its row.
const Shape kShapes[] = {{0, 3, 2, 8},         {1, 1, 1, 2},          {2, 7, 3, 64},          {1, 5, 9, 64, true},
                         {1, 33, 2, 66, true}, {1, 3, 17, 128, true}, {1, 5, 3, 32, true, 1}, {1, 9, 65, 2},
                         {1, 2, 1, 272},       {2, 3, 0, 8},          {1, 1030, 3, 34}};

template <class T>
struct Problem {
  using Acc = accumulator_t<T>;
  Shape shape;
  int64_t rows, half;
  std::vector<T> x;
  std::vector<Acc> cos, sin;
  std::vector<int32_t> tokens;

  explicit Problem(Shape s)
      : shape(s),
        rows(s.outer * s.positions),
        half(s.head_dim / 2),
        x(random_elements<T>(rows * s.heads * s.head_dim, 1)) {
    std::mt19937 random(static_cast<unsigned>(rows + s.head_dim));
    for (int64_t p = 0; p < s.positions; ++p)
      for (int64_t i = 0; i < half; ++i) {
        const double angle = double(p) * std::pow(10000.0, -2.0 * double(i) / double(s.head_dim));
        cos.push_back(static_cast<Acc>(std::cos(angle)));
        sin.push_back(static_cast<Acc>(std::sin(angle)));
      }
    for (int64_t r = 0; r < rows; ++r) tokens.push_back(static_cast<int32_t>(random() % s.positions));
  }
};

template <class T>
struct RopeTest : testing::Test {
  using Acc = accumulator_t<T>;

  static std::vector<T> turned(const Problem<T>& problem, RopeDirection direction, bool in_place) {
    const Shape& s = problem.shape;
    const OffsetBuffer<T> x(problem.x, s.offset), y(static_cast<int64_t>(problem.x.size()), s.offset);
    const Buffer<Acc> cos(problem.cos), sin(problem.sin);
    const Buffer<int32_t> tokens(problem.tokens);
    EXPECT_EQ(MICRO_RUN(rope, RopeParams{x.data(), cos.data(), sin.data(), s.with_tokens ? tokens.data() : nullptr,
                                         in_place ? x.data() : y.data(), problem.rows, s.positions, s.heads, s.head_dim,
                                         direction, kDTypeOf<T>}),
              Status::kOk);
    return in_place ? x.read() : y.read();
  }

  // Two products and a sum in the accumulator type, then one rounding to the element type.
  static void expect_turned(const Problem<T>& problem, RopeDirection direction, const std::vector<T>& got) {
    const Shape& s = problem.shape;
    const double sign = direction == RopeDirection::kForward ? 1 : -1;
    const auto near = [](T value, double first, double second) {
      const double error = 3 * kRounding<Acc> * (std::abs(first) + std::abs(second)) + 3 * kSmallRounding<Acc>;
      ASSERT_NEAR(static_cast<Acc>(value), first + second, rounded_bound<T>(first + second, error));
    };
    for (int64_t head = 0; head < problem.rows * s.heads; ++head) {
      const int64_t row = head / s.heads, position = s.with_tokens ? problem.tokens[row] : row % s.positions;
      for (int64_t i = 0; i < problem.half; ++i) {
        const int64_t first = head * s.head_dim + i, second = first + problem.half, at = position * problem.half + i;
        const double a = static_cast<Acc>(problem.x[first]), b = static_cast<Acc>(problem.x[second]);
        const double c = problem.cos[at], n = sign * problem.sin[at];
        near(got[first], a * c, -b * n);
        near(got[second], b * c, a * n);
      }
    }
  }

  template <class Body>
  static void each_problem(const Body& body) {
    for (const Shape& s : kShapes) {
      SCOPED_TRACE(testing::Message() << s.outer * s.positions << " rows, " << s.heads << " x " << s.head_dim
                                      << ", offset " << s.offset);
      body(Problem<T>(s));
    }
  }
};
TYPED_TEST_SUITE(RopeTest, DeviceElementTypes);

TYPED_TEST(RopeTest, ForwardEqualsTheDefinition) {
  TestFixture::each_problem([](const auto& problem) {
    TestFixture::expect_turned(problem, RopeDirection::kForward,
                               TestFixture::turned(problem, RopeDirection::kForward, false));
  });
}

TYPED_TEST(RopeTest, BackwardTurnsBack) {
  TestFixture::each_problem([](const auto& problem) {
    if (problem.rows < 1000)
      TestFixture::expect_turned(problem, RopeDirection::kBackward,
                                 TestFixture::turned(problem, RopeDirection::kBackward, false));
  });
}

TYPED_TEST(RopeTest, InPlaceIsTheSame) {
  for (const Shape& s : {Shape{1, 5, 9, 64, true}, Shape{1, 3, 2, 66}}) {
    const Problem<TypeParam> problem(s);
    expect_same_bits(TestFixture::turned(problem, RopeDirection::kForward, true),
                     TestFixture::turned(problem, RopeDirection::kForward, false));
  }
}

TEST(Rope, ATokenOutsideTheTableIsRefused) {
  if (kOnDevice) GTEST_SKIP() << "a device assertion";
  Problem<float> problem({1, 3, 2, 8, true});
  problem.tokens.back() = 3;
  std::vector<float> y(problem.x.size());
  EXPECT_EQ(cpu::rope({problem.x.data(), problem.cos.data(), problem.sin.data(), problem.tokens.data(), y.data(), 3, 3,
                       2, 8, RopeDirection::kForward, DType::kFloat32},
                      serial),
            Status::kIndexOutOfRange);
}

}  // namespace
}  // namespace micro_kernels
