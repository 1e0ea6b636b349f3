#include "micro/rms_norm.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <gtest/gtest.h>

namespace {

TEST(RmsNorm, EachRowHasTheGainOfItsExpert) {
  const at::Tensor x = at::randn({3, 8}, at::kDouble).requires_grad_(), gain = at::randn({2, 8}, at::kDouble);
  const at::Tensor expert = at::tensor({1, 0, 1}, at::kInt);
  const at::Tensor got = micro::rms_norm(x, gain, expert, 1e-5);
  got.sum().backward();
  const at::Tensor grad = x.grad().clone();
  x.mutable_grad() = at::Tensor();
  const at::Tensor want = x * at::rsqrt(x.square().mean(-1, true) + 1e-5) * gain.index_select(0, expert);
  want.sum().backward();
  EXPECT_TRUE(at::allclose(got, want));
  EXPECT_TRUE(at::allclose(grad, x.grad()));
}

TEST(RmsNorm, ALeadingAxisOfExperts) {
  const at::Tensor x = at::randn({1, 3, 8}), gain = at::randn({2, 8});
  const at::Tensor out = micro::rms_norm(x, gain, std::nullopt, 1e-5);
  ASSERT_EQ(out.sizes(), at::IntArrayRef({2, 3, 8}));
  EXPECT_TRUE(at::allclose(out[1], micro::rms_norm(x[0], gain.slice(0, 1), at::zeros({3}, at::kInt), 1e-5)));
}

TEST(RmsNorm, MistakesAreNamed) {
  EXPECT_THROW(micro::rms_norm(at::ones({2, 8}), at::ones({1, 7}), std::nullopt, 1e-5), c10::ValueError);
  EXPECT_THROW(micro::rms_norm(at::ones({2, 8}), at::ones({1, 8}, at::kDouble), std::nullopt, 1e-5), c10::TypeError);
}

}  // namespace
