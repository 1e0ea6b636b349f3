// Streaming moments of rows of mixed experts against two passes in double; what was there before counts.

#include "micro_kernels/moments.h"

#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "backend.h"
#include "elements.h"

namespace micro_kernels {
namespace {

struct Shape {
  int64_t rows, width, experts;
};
const Shape kShapes[] = {{0, 8, 2}, {1, 1, 1}, {40, 33, 4}, {129, 70, 3}, {300, 5, 1}};

template <class T>
struct MomentsTest : testing::Test {
  struct State {
    Buffer<double> count, mean, m2;
    State(int64_t experts, int64_t width)
        : count(std::vector<double>(experts)),
          mean(std::vector<double>(experts * width)),
          m2(std::vector<double>(experts * width)) {}
  };

  // In two calls: rows 0..cut and the rest.
  static void run(const Shape& s, int64_t cut, const State& state) {
    std::vector<T> x = random_elements<T>(s.rows * s.width, 1);
    for (T& value : x) value = T(static_cast<accumulator_t<T>>(value) + accumulator_t<T>(1000));  // far from 0
    std::vector<uint8_t> touched;
    std::vector<int32_t> expert;
    for (int64_t n = 0; n < s.rows; ++n) {
      touched.push_back(n % 5 != 3);
      expert.push_back(touched.back() ? static_cast<int32_t>(n * 3 % s.experts) : -1);
    }
    const Buffer<T> rows(x);
    const Buffer<uint8_t> taken(touched);
    const Buffer<int32_t> experts(expert);
    for (const auto& [first, last] : {std::pair(int64_t{0}, cut), std::pair(cut, s.rows)})
      ASSERT_EQ(MICRO_RUN(moments, MomentsParams{.x = rows.data() + first * s.width,
                                                 .touched = reinterpret_cast<const bool*>(taken.data()) + first,
                                                 .expert = experts.data() + first,
                                                 .count = state.count.data(),
                                                 .mean = state.mean.data(),
                                                 .m2 = state.m2.data(),
                                                 .rows = last - first,
                                                 .width = s.width,
                                                 .experts = s.experts,
                                                 .dtype = kDTypeOf<T>}),
                Status::kOk);
    if (cut > 0) return;
    const std::vector<double> count = state.count.read(), mean = state.mean.read(), m2 = state.m2.read();
    for (int64_t e = 0; e < s.experts; ++e)
      for (int64_t w = 0; w < s.width; ++w) {
        double sum = 0, squares = 0, number = 0;
        for (int64_t n = 0; n < s.rows; ++n)
          if (touched[n] && expert[n] == e)
            sum += static_cast<double>(static_cast<accumulator_t<T>>(x[n * s.width + w])), ++number;
        const double middle = number > 0 ? sum / number : 0;
        for (int64_t n = 0; n < s.rows; ++n)
          if (touched[n] && expert[n] == e)
            squares += std::pow(static_cast<double>(static_cast<accumulator_t<T>>(x[n * s.width + w])) - middle, 2);
        ASSERT_EQ(count[e], number);
        ASSERT_NEAR(mean[e * s.width + w], middle, 1e-10);
        ASSERT_NEAR(m2[e * s.width + w], squares, 1e-10 * (1 + squares) + 1e-7);  // 1000^2 rounds at 1e-10
      }
  }
};
TYPED_TEST_SUITE(MomentsTest, DeviceElementTypes);

TYPED_TEST(MomentsTest, EqualTwoPasses) {
  for (const Shape& shape : kShapes)
    TestFixture::run(shape, 0, typename TestFixture::State(shape.experts, shape.width));
}

TYPED_TEST(MomentsTest, CallsAddUp) {
  const Shape shape = kShapes[2];
  const typename TestFixture::State whole(shape.experts, shape.width), parts(shape.experts, shape.width);
  TestFixture::run(shape, 0, whole);
  TestFixture::run(shape, 17, parts);
  EXPECT_EQ(whole.count.read(), parts.count.read());
  const auto near = [](const std::vector<double>& a, const std::vector<double>& b) {
    for (size_t i = 0; i < a.size(); ++i) ASSERT_NEAR(a[i], b[i], kOnDevice ? 1e-10 * (1 + std::abs(a[i])) : 0);
  };
  near(whole.mean.read(), parts.mean.read());
  near(whole.m2.read(), parts.m2.read());
}

}  // namespace
}  // namespace micro_kernels
