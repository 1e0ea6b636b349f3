#include "micro/swiglu.h"

#include <ATen/Functions.h>
#include <gtest/gtest.h>

namespace {

TEST(Swiglu, EqualsItsFormulaWithGradients) {
  const at::Tensor gate = at::randn({3, 17}).requires_grad_(), up = at::randn({3, 17}).requires_grad_();
  const at::Tensor got = micro::swiglu(gate, up), want = at::mul(at::silu(gate), up);
  EXPECT_TRUE(at::allclose(got, want, 1e-5, 1e-6));
  got.sum().backward();
  const at::Tensor gate_grad = gate.grad().clone(), up_grad = up.grad().clone();
  gate.mutable_grad() = at::Tensor();
  up.mutable_grad() = at::Tensor();
  want.sum().backward();
  EXPECT_TRUE(at::allclose(gate_grad, gate.grad(), 1e-5, 1e-6));
  EXPECT_TRUE(at::allclose(up_grad, up.grad(), 1e-5, 1e-6));
}

TEST(Swiglu, MistakesAreNamed) {
  EXPECT_THROW(micro::swiglu(at::ones({2}), at::ones({3})), c10::ValueError);
  EXPECT_THROW(micro::swiglu(at::ones({2}), at::ones({2}, at::kDouble)), c10::TypeError);
}

}  // namespace
