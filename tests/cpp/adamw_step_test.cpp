#include "micro/adamw_step.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <gtest/gtest.h>

#include "micro/gradient_norm.h"

namespace {

TEST(AdamwStep, EqualsItsFormula) {
  const at::Tensor p = at::randn({3, 5}, at::kDouble), g = at::randn({3, 5}, at::kDouble);
  const at::Tensor m = at::rand({3, 5}, at::kDouble), v = at::rand({3, 5}, at::kDouble);
  const at::Tensor p0 = p.clone(), m1 = 0.9 * m + 0.1 * (0.5 * g), v1 = 0.99 * v + 0.01 * (0.5 * g).square();
  micro::adamw_step(p, g, m, v, {}, 3, 1e-2, 0.9, 0.99, 1e-8, 0.1, 0.5);
  const double first = 1 - 0.9 * 0.9 * 0.9, second = 1 - 0.99 * 0.99 * 0.99;
  const at::Tensor want = p0 * (1 - 1e-2 * 0.1) - 1e-2 * (m1 / first) / ((v1 / second).sqrt() + 1e-8);
  EXPECT_TRUE(at::allclose(m, m1));
  EXPECT_TRUE(at::allclose(v, v1));
  EXPECT_TRUE(at::allclose(p, want));
}

TEST(AdamwStep, MistakesAreNamed) {
  const at::Tensor p = at::ones({3}), g = at::ones({2});
  EXPECT_THROW(micro::adamw_step(p, g, at::ones({3}), at::ones({3}), {}, 1, 1e-2), c10::ValueError);
  EXPECT_THROW(micro::adamw_step(p, p.clone(), p.clone(), p.clone(), {}, 0, 1e-2), c10::ValueError);
}

TEST(GradientNorm, IsOneNormOverAllTensors) {
  const at::Tensor a = at::tensor({3.0f}), b = at::tensor({0.0f, 4.0f});
  EXPECT_NEAR(micro::gradient_norm({a, b}).item<double>(), 5.0, 1e-12);
}

}  // namespace
