// The gradient norm against a plain loop in double, on whichever back end this program was built for.

#include "micro_kernels/gradient_norm.h"

#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "backend.h"
#include "elements.h"
#include "offset.h"

namespace micro_kernels {
namespace {

struct Answer {
  Status status;
  double norm;
};

Answer norm_of(const std::vector<GradientTensor>& tensors) {
  const Buffer<double> norm(1);
  const GradientNormParams params{tensors.data(), static_cast<int64_t>(tensors.size()), norm.data()};
  const Status status = MICRO_RUN_WITH_WORKSPACE(gradient_norm, params);
  return {status, norm.read()[0]};
}

template <class T>
GradientTensor view(const OffsetBuffer<T>& gradient, const std::vector<T>& values) {
  return {gradient.data(), static_cast<int64_t>(values.size()), kDTypeOf<T>};
}

template <class T>
double squares(const std::vector<T>& values) {
  double sum = 0;
  for (const T value : values) {
    const auto wide = static_cast<double>(static_cast<accumulator_t<T>>(value));
    sum += wide * wide;
  }
  return sum;
}

template <class T>
class GradientNorm : public testing::Test {};
TYPED_TEST_SUITE(GradientNorm, DeviceElementTypes);

TYPED_TEST(GradientNorm, EqualsTheDefinition) {
  using T = TypeParam;
  for (const int64_t size : {1, 31, 33, 129, 8191, 8193, 30'000}) {
    const std::vector<T> values = random_elements<T>(size, 7);
    const OffsetBuffer<T> here(values, 0), there(values, 1);
    const Answer got = norm_of({view(here, values)});
    ASSERT_EQ(got.status, Status::kOk);
    const double want = std::sqrt(squares(values));
    EXPECT_NEAR(got.norm, want, 1e-13 * want) << size;
    EXPECT_EQ(norm_of({view(there, values)}).norm, got.norm) << "depends on where the tensor lies";
  }
}

TYPED_TEST(GradientNorm, EveryElementCounts) {
  using T = TypeParam;
  std::vector<T> values(37, T(0.0f));
  for (size_t place = 0; place < values.size(); ++place) {
    values[place] = T(3.0f);
    const OffsetBuffer<T> gradient(values, 0);
    EXPECT_EQ(norm_of({view(gradient, values)}).norm, 3) << place;
    values[place] = T(0.0f);
  }
}

TYPED_TEST(GradientNorm, NothingNonFiniteIsHidden) {
  using T = TypeParam;
  std::vector<T> values = random_elements<T>(9000, 8);
  for (const size_t place : {size_t{0}, size_t{4097}, size_t{8999}}) {
    std::vector<T> bad = values;
    bad[place] = T(-INFINITY);
    EXPECT_EQ(norm_of({view(OffsetBuffer<T>(bad, 0), bad)}).norm, INFINITY);
    bad[place] = T(NAN);
    EXPECT_TRUE(std::isnan(norm_of({view(OffsetBuffer<T>(bad, 0), bad)}).norm));
  }
}

TEST(ManyGradients, OfManyTypes) {
  const auto a = random_elements<float>(20'000, 1);
  const auto b = random_elements<BFloat16>(33, 2);
  const auto c = random_elements<double>(1, 3);
  const OffsetBuffer<float> da(a, 0);
  const OffsetBuffer<BFloat16> db(b, 0);
  const OffsetBuffer<double> dc(c, 0);
  std::vector<GradientTensor> views;
  double want = 0;
  for (int copies = 0; copies < 140; ++copies) {  // more than one launch takes
    views.push_back(view(db, b));
    views.push_back({nullptr, 0, DType::kFloat32});
    want += squares(b);
  }
  views.push_back(view(da, a));
  views.push_back(view(dc, c));
  want = std::sqrt(want + squares(a) + squares(c));
  const Answer got = norm_of(views);
  ASSERT_EQ(got.status, Status::kOk);
  EXPECT_NEAR(got.norm, want, 1e-12 * want);
}

TEST(ManyGradients, NoneHaveTheNormZero) {
  EXPECT_EQ(norm_of({}).norm, 0);
  EXPECT_EQ(norm_of({{nullptr, 0, DType::kFloat64}}).norm, 0);
}

TEST(ManyGradients, SquaresBeyondFloat32DoNotOverflow) {
  const std::vector<float> large(100, 3e38f);
  const OffsetBuffer<float> gradient(large, 0);
  EXPECT_NEAR(norm_of({view(gradient, large)}).norm, 3e39, 1e33);
}

}  // namespace
}  // namespace micro_kernels
