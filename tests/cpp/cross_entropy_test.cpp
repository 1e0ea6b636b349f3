#include "micro/cross_entropy.h"

#include <ATen/Functions.h>
#include <gtest/gtest.h>

namespace {

TEST(CrossEntropy, EqualsItsFormulaWithGradients) {
  const at::Tensor hidden = at::randn({6, 8}, at::kDouble).requires_grad_();
  const at::Tensor weight = at::randn({11, 8}, at::kDouble).requires_grad_();
  const at::Tensor targets = at::tensor({3, -100, 10, 0, -100, 3}, at::kLong);
  const at::Tensor got = micro::cross_entropy(hidden, weight, targets);
  got.backward();
  const at::Tensor hidden_grad = hidden.grad().clone(), weight_grad = weight.grad().clone();
  hidden.mutable_grad() = at::Tensor();
  weight.mutable_grad() = at::Tensor();
  const at::Tensor want =
      at::nll_loss(at::log_softmax(at::matmul(hidden, weight.t()), -1), targets, {}, at::Reduction::Sum);
  want.backward();
  EXPECT_TRUE(at::allclose(got, want));
  EXPECT_TRUE(at::allclose(hidden_grad, hidden.grad()));
  EXPECT_TRUE(at::allclose(weight_grad, weight.grad()));
}

TEST(CrossEntropy, NothingToPredictIsZero) {
  const at::Tensor hidden = at::randn({2, 8}).requires_grad_();
  const at::Tensor loss = micro::cross_entropy(hidden, at::randn({5, 8}), at::tensor({7, 7}, at::kLong), 7);
  EXPECT_EQ(loss.item<float>(), 0.0f);
  loss.backward();
  EXPECT_EQ(hidden.grad().abs().max().item<float>(), 0.0f);
}

TEST(CrossEntropy, MistakesAreNamed) {
  const at::Tensor hidden = at::ones({2, 8}), weight = at::ones({5, 8}), targets = at::tensor({0, 1}, at::kLong);
  EXPECT_THROW(micro::cross_entropy(hidden, at::ones({5, 7}), targets), c10::ValueError);
  EXPECT_THROW(micro::cross_entropy(hidden, weight, at::tensor({0, 5}, at::kLong)), c10::ValueError);
  EXPECT_THROW(micro::cross_entropy(hidden, weight, at::zeros({3}, at::kLong)), c10::ValueError);
  EXPECT_THROW(micro::cross_entropy(hidden, weight, at::zeros({2})), c10::TypeError);
}

}  // namespace
