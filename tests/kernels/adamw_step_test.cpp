// AdamW and the gradient norm against plain loops in double.

#include "micro_kernels/adamw_step.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

#include "adamw_step/adamw_step_isa.h"
#include "micro_kernels/gradient_norm.h"
#include "micro_kernels/isa.h"

namespace micro_kernels {
namespace {

const AdamWStepParams kSettings{.tensors = nullptr,
                                .count = 0,
                                .step = 3,
                                .learning_rate = 1e-2,
                                .beta1 = 0.8,
                                .beta2 = 0.95,
                                .eps = 1e-8,
                                .weight_decay = 0.1,
                                .gradient_scale = 0.5};

template <class T, class Acc = accumulator_t<T>>
struct Tensors {
  std::vector<T> parameter, gradient;
  std::vector<Acc> first, second, master;

  Tensors(int64_t size, int seed) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < size; ++i) {
      master.push_back(normal(random));
      parameter.push_back(T(master.back()));
      gradient.push_back(T(static_cast<Acc>(normal(random) * 3)));
      first.push_back(normal(random) * 0.1f);
      second.push_back(first.back() * first.back() + Acc(1e-3));
    }
  }

  AdamWTensor view(DType dtype) {
    return {parameter.data(),
            gradient.data(),
            first.data(),
            second.data(),
            dtype == DType::kBFloat16 ? master.data() : nullptr,
            static_cast<int64_t>(parameter.size()),
            dtype};
  }
};

struct Element {
  double first, second, value;
};

Element oracle(double gradient, Element old) {
  const auto& s = kSettings;
  const double g = gradient * s.gradient_scale;
  Element now;
  now.first = s.beta1 * old.first + (1 - s.beta1) * g;
  now.second = s.beta2 * old.second + (1 - s.beta2) * g * g;
  const double corrected = now.second / (1 - std::pow(s.beta2, s.step));
  now.value = old.value * (1 - s.learning_rate * s.weight_decay) -
              s.learning_rate * now.first / (1 - std::pow(s.beta1, s.step)) / (std::sqrt(corrected) + s.eps);
  return now;
}

template <class T>
void equals_the_oracle(int64_t size, DType dtype, double tolerance) {
  Tensors<T> tensors(size, 5);
  const Tensors<T> old = tensors;
  const AdamWTensor view = tensors.view(dtype);
  AdamWStepParams params = kSettings;
  params.tensors = &view;
  params.count = 1;
  ASSERT_EQ(cpu::adamw_step(params, serial), Status::kOk);
  for (int64_t i = 0; i < size; ++i) {
    const Element want =
        oracle(static_cast<accumulator_t<T>>(old.gradient[i]),
               {old.first[i], old.second[i],
                dtype == DType::kBFloat16 ? old.master[i] : static_cast<accumulator_t<T>>(old.parameter[i])});
    EXPECT_NEAR(tensors.first[i], want.first, tolerance);
    EXPECT_NEAR(tensors.second[i], want.second, tolerance);
    if (dtype == DType::kBFloat16) {
      EXPECT_NEAR(tensors.master[i], want.value, tolerance);
      EXPECT_EQ(static_cast<accumulator_t<T>>(tensors.parameter[i]),
                static_cast<accumulator_t<T>>(T(tensors.master[i])));
    } else {
      EXPECT_NEAR(static_cast<accumulator_t<T>>(tensors.parameter[i]), want.value, tolerance);
    }
  }
}

TEST(AdamWStep, EqualsTheDefinition) {
  for (const int64_t size : {0, 1, 31, 33, 129, 70'000}) {
    equals_the_oracle<float>(size, DType::kFloat32, 2e-6);
    equals_the_oracle<double>(size, DType::kFloat64, 1e-14);
    equals_the_oracle<BFloat16>(size, DType::kBFloat16, 2e-6);
  }
}

TEST(AdamWStep, ManyTensorsOfManyTypesInAnyOrderOfWork) {
  const ParallelFor backwards = [](int64_t count, int64_t, const auto& body) {
    for (int64_t i = count; i-- > 0;) body(i, i + 1);
  };
  std::vector<std::vector<float>> results;
  for (const ParallelFor& parallel_for : {ParallelFor(serial), backwards}) {
    Tensors<float> a(50'000, 1), c(3, 3);
    Tensors<BFloat16> b(40'001, 2);
    Tensors<double> d(5, 4);
    const AdamWTensor views[] = {a.view(DType::kFloat32), b.view(DType::kBFloat16), c.view(DType::kFloat32),
                                 d.view(DType::kFloat64)};
    AdamWStepParams params = kSettings;
    params.tensors = views;
    params.count = 4;
    ASSERT_EQ(cpu::adamw_step(params, parallel_for), Status::kOk);
    a.parameter.insert(a.parameter.end(), b.master.begin(), b.master.end());
    a.parameter.insert(a.parameter.end(), c.parameter.begin(), c.parameter.end());
    a.parameter.insert(a.parameter.end(), d.parameter.begin(), d.parameter.end());
    results.push_back(a.parameter);
  }
  EXPECT_EQ(results[0], results[1]);
}

#if defined(__x86_64__)
TEST(AdamWStep, InstructionSetsGiveTheSameBits) {
  const auto run = [](const cpu::AdamWLoops& loops) {
    Tensors<BFloat16> t(1001, 9);
    const cpu::AdamWFactors<float> factors{0.5f, 0.8f, 0.2f, 0.95f, 0.05f, 0.999f, 0.01f, 2.0f, 1e-8f};
    auto* parameter = reinterpret_cast<uint16_t*>(t.parameter.data());
    loops.bfloat16(reinterpret_cast<uint16_t*>(t.gradient.data()), t.first.data(), t.second.data(), t.master.data(),
                   parameter, 1001, factors);
    t.master.insert(t.master.end(), parameter, parameter + 1001);
    return t.master;
  };
  if (cpu::isa_choice().best < cpu::Isa::kAvx2) GTEST_SKIP() << "this CPU has the plain instruction set only";
  EXPECT_EQ(run(cpu::kAdamWPlain), run(cpu::kAdamWAvx2));
  if (cpu::isa_choice().best >= cpu::Isa::kAvx512) {
    EXPECT_EQ(run(cpu::kAdamWPlain), run(cpu::kAdamWAvx512));
  }
}
#endif

TEST(GradientNorm, EqualsTheDefinitionWhateverTheOrderOfWork) {
  const Tensors<float> a(70'000, 1);
  const Tensors<BFloat16> b(33, 2);
  const Tensors<double> c(1, 3);
  const GradientTensor views[] = {{a.gradient.data(), 70'000, DType::kFloat32},
                                  {b.gradient.data(), 33, DType::kBFloat16},
                                  {c.gradient.data(), 1, DType::kFloat64},
                                  {nullptr, 0, DType::kFloat32}};
  double want = c.gradient[0] * c.gradient[0];
  for (const float g : a.gradient) want += double(g) * g;
  for (const BFloat16 g : b.gradient) want += double(float(g)) * float(g);
  const ParallelFor backwards = [](int64_t count, int64_t, const auto& body) {
    for (int64_t i = count; i-- > 0;) body(i, i + 1);
  };
  double norm = NAN, again = NAN;
  ASSERT_EQ(cpu::gradient_norm({views, 4, &norm}, serial), Status::kOk);
  ASSERT_EQ(cpu::gradient_norm({views, 4, &again}, backwards), Status::kOk);
  EXPECT_NEAR(norm, std::sqrt(want), 1e-12 * norm);
  EXPECT_EQ(norm, again);
}

TEST(GradientNorm, NeitherOverflowsNorHidesNan) {
  const std::vector<float> large(100, 3e38f), bad = {1, NAN};
  const GradientTensor view{large.data(), 100, DType::kFloat32}, bad_view{bad.data(), 2, DType::kFloat32};
  double norm = 0;
  ASSERT_EQ(cpu::gradient_norm({&view, 1, &norm}, serial), Status::kOk);
  EXPECT_NEAR(norm, 3e39, 1e33);
  ASSERT_EQ(cpu::gradient_norm({&bad_view, 1, &norm}, serial), Status::kOk);
  EXPECT_TRUE(std::isnan(norm));
}

}  // namespace
}  // namespace micro_kernels
