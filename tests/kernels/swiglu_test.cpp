// The gated unit against double, on whichever back end this program was built for.

#include "micro_kernels/swiglu.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "backend.h"
#include "elements.h"
#include "offset.h"
#include "rounding.h"

namespace micro_kernels {
namespace {

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

// Around vectors, warps and blocks.
constexpr int64_t kCounts[] = {0, 1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 127, 128, 129, 1000, 4103};

template <class T>
struct SwigluTest : testing::Test {
  using Acc = accumulator_t<T>;

  // Gates far out on both sides, where the sigmoid is 0 or 1 to the last bit.
  struct Problem {
    std::vector<T> gate, up, grad_y;

    explicit Problem(int64_t count) {
      std::mt19937 random(7);
      std::normal_distribution<float> normal;
      for (int64_t i = 0; i < count; ++i) {
        gate.push_back(T(static_cast<Acc>(normal(random) * (i % 5 == 0 ? 40.0f : 2.0f))));
        up.push_back(T(static_cast<Acc>(normal(random))));
        grad_y.push_back(T(static_cast<Acc>(normal(random))));
      }
    }
  };
  static double wide(T value) { return static_cast<Acc>(value); }

  // The sigmoid is good to a few units of the accumulator type, and two products follow. Below the normal numbers it
  // may be anything down to 0, and so may what it is multiplied with.
  static double error(double factor, double s) {
    constexpr double kSmall = std::numeric_limits<Acc>::min();
    return std::abs(factor) * (8 * kRounding<Acc> * s + kSmall) + kSmall;
  }

  static void forward(int64_t count, int64_t offset) {
    const Problem problem(count);
    const OffsetBuffer<T> gate(problem.gate, offset), up(problem.up, offset), y(count, offset);
    ASSERT_EQ(MICRO_RUN(swiglu, SwigluParams{gate.data(), up.data(), y.data(), count, kDTypeOf<T>}), Status::kOk);
    const std::vector<T> got = y.read();
    for (int64_t i = 0; i < count; ++i) {
      const double factor = wide(problem.gate[i]) * wide(problem.up[i]), s = sigmoid(wide(problem.gate[i]));
      ASSERT_NEAR(wide(got[i]), factor * s, rounded_bound<T>(factor * s, error(factor, s))) << wide(problem.gate[i]);
    }
  }

  static void backward(int64_t count, int64_t offset) {
    const Problem problem(count);
    const OffsetBuffer<T> grad_y(problem.grad_y, offset), gate(problem.gate, offset), up(problem.up, offset);
    const OffsetBuffer<T> grad_gate(count, offset), grad_up(count, offset);
    ASSERT_EQ(MICRO_RUN(swiglu_backward, SwigluBackwardParams{grad_y.data(), gate.data(), up.data(), grad_gate.data(),
                                                              grad_up.data(), count, kDTypeOf<T>}),
              Status::kOk);
    const std::vector<T> got_gate = grad_gate.read(), got_up = grad_up.read();
    for (int64_t i = 0; i < count; ++i) {
      const double g = wide(problem.gate[i]), d = wide(problem.grad_y[i]), s = sigmoid(g);
      const double to_gate = d * wide(problem.up[i]) * s * (1 + g * (1 - s)), to_up = d * g * s;
      // 1 - s is as far off as s is, and is multiplied by the gate.
      const double gate_error = error(d * wide(problem.up[i]) * (1 + std::abs(g)), s);
      ASSERT_NEAR(wide(got_gate[i]), to_gate, rounded_bound<T>(to_gate, gate_error)) << g;
      ASSERT_NEAR(wide(got_up[i]), to_up, rounded_bound<T>(to_up, error(d * g, s))) << g;
    }
  }
};
TYPED_TEST_SUITE(SwigluTest, DeviceElementTypes);

TYPED_TEST(SwigluTest, ForwardEqualsTheDefinition) {
  for (int64_t count : kCounts) TestFixture::forward(count, 0);
  TestFixture::forward(100, 1);
}

TYPED_TEST(SwigluTest, BackwardEqualsTheDefinition) {
  for (int64_t count : kCounts) TestFixture::backward(count, 0);
  TestFixture::backward(100, 1);
}

TEST(Swiglu, ExtremesAreFiniteAndNaNShows) {
  const float inf = std::numeric_limits<float>::infinity();
  const Buffer<float> gate({-1000.0f, 1000.0f, -90.0f, 0.0f, inf, NAN}), up(std::vector<float>(6, 2.0f)), y(6);
  ASSERT_EQ(MICRO_RUN(swiglu, SwigluParams{gate.data(), up.data(), y.data(), 6, DType::kFloat32}), Status::kOk);
  const std::vector<float> got = y.read();
  EXPECT_EQ(got[0], 0.0f);
  EXPECT_EQ(got[1], 2000.0f);
  EXPECT_NEAR(got[2], 0.0f, 1e-30);
  EXPECT_EQ(got[3], 0.0f);
  EXPECT_EQ(got[4], inf);
  EXPECT_TRUE(std::isnan(got[5]));
}

}  // namespace
}  // namespace micro_kernels
