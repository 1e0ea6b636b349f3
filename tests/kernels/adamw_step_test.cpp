// AdamW against plain loops in double, on whichever back end this program was built for.

#include "micro_kernels/adamw_step.h"

#include <gtest/gtest.h>

#include <cmath>
#include <list>
#include <type_traits>
#include <vector>

#include "adamw_tensors.h"
#include "backend.h"

namespace micro_kernels {
namespace {

struct Element {
  double first, second, value;
};

Element oracle(double gradient, Element old) {
  const auto& s = kSettings;
  const double g = gradient * s.gradient_scale, step = static_cast<double>(s.step);
  Element now;
  now.first = s.beta1 * old.first + (1 - s.beta1) * g;
  now.second = s.beta2 * old.second + (1 - s.beta2) * g * g;
  const double corrected = now.second / (1 - std::pow(s.beta2, step));
  now.value = old.value * (1 - s.learning_rate * s.weight_decay) -
              s.learning_rate * now.first / (1 - std::pow(s.beta1, step)) / (std::sqrt(corrected) + s.eps);
  return now;
}

Status step(const std::vector<AdamWTensor>& tensors) {
  AdamWStepParams params = kSettings;
  params.tensors = tensors.data();
  params.count = static_cast<int64_t>(tensors.size());
  return MICRO_RUN(adamw_step, params);
}

// Some roundings of numbers of up to 5: moments and values are carried in float32, or in double.
template <class T>
constexpr double kTolerance = std::is_same_v<T, double> ? 1e-14 : 2e-6;

template <class T>
void expect_stepped(const OnDevice<T>& tensors, const Tensors<T>& old) {
  using Acc = accumulator_t<T>;
  const std::vector<T> parameter = tensors.parameter.read();
  const std::vector<Acc> first = tensors.first.read(), second = tensors.second.read(), master = tensors.master.read();
  for (size_t i = 0; i < old.parameter.size(); ++i) {
    const Element want =
        oracle(static_cast<Acc>(old.gradient[i]),
               {old.first[i], old.second[i], kHasMaster<T> ? old.master[i] : static_cast<Acc>(old.parameter[i])});
    ASSERT_NEAR(first[i], want.first, kTolerance<T>) << i;
    ASSERT_NEAR(second[i], want.second, kTolerance<T>) << i;
    ASSERT_NEAR(kHasMaster<T> ? master[i] : static_cast<Acc>(parameter[i]), want.value, kTolerance<T>) << i;
    if constexpr (kHasMaster<T>) {
      ASSERT_EQ(parameter[i].bits, T(master[i]).bits) << i;
    }
  }
}

template <class T>
class AdamWStep : public testing::Test {};
TYPED_TEST_SUITE(AdamWStep, DeviceElementTypes);

TYPED_TEST(AdamWStep, EqualsTheDefinition) {
  // Around vectors, and around the pieces that blocks take.
  for (const int64_t size : {0, 1, 31, 33, 129, 8191, 8192, 8193, kOnDevice ? 20'001 : 70'000})
    for (const int64_t offset : {0, 1}) {
      const Tensors<TypeParam> old(size, 5);
      const OnDevice<TypeParam> tensors(old, offset);
      ASSERT_EQ(step({tensors.view()}), Status::kOk);
      expect_stepped(tensors, old);
    }
}

TYPED_TEST(AdamWStep, NonFiniteGradientsStayWhereTheyAre) {
  using T = TypeParam;
  Tensors<T> old(200, 6);
  const OnDevice<T> sane(old);
  old.gradient[17] = T(NAN);
  old.gradient[150] = T(INFINITY);
  const OnDevice<T> bad(old);
  ASSERT_EQ(step({sane.view(), bad.view()}), Status::kOk);
  const auto want = sane.first.read(), got = bad.first.read();
  for (size_t i = 0; i < want.size(); ++i) {
    if (i == 17 || i == 150)
      EXPECT_FALSE(std::isfinite(got[i]));
    else
      EXPECT_EQ(got[i], want[i]) << i;
  }
}

TEST(ManyTensors, OfManyTypesAreSteppedOnce) {
  // More than one launch takes, empty ones between them, types in turns.
  std::list<std::pair<Tensors<float>, OnDevice<float>>> floats;
  std::list<std::pair<Tensors<BFloat16>, OnDevice<BFloat16>>> narrow;
  std::list<std::pair<Tensors<double>, OnDevice<double>>> doubles;
  std::vector<AdamWTensor> views;
  const auto add = [&]<class T>(std::list<std::pair<Tensors<T>, OnDevice<T>>>& all, int64_t size, unsigned seed) {
    const Tensors<T> tensors(size, seed);
    all.emplace_back(tensors, OnDevice<T>(tensors));
    views.push_back(all.back().second.view());
  };
  for (unsigned i = 0; i < 130; ++i) {
    add(floats, i * 7 % 23, i);
    if (i % 2 == 0) add(narrow, i == 60 ? 9000 : i % 5, i);
    if (i % 10 == 0) add(doubles, 3, i);
  }
  ASSERT_EQ(step(views), Status::kOk);
  for (const auto& [old, tensors] : floats) expect_stepped(tensors, old);
  for (const auto& [old, tensors] : narrow) expect_stepped(tensors, old);
  for (const auto& [old, tensors] : doubles) expect_stepped(tensors, old);
}

TEST(ManyTensors, NoneIsNoWork) { EXPECT_EQ(step({}), Status::kOk); }

}  // namespace
}  // namespace micro_kernels
