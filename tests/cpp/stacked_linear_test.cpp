#include "micro/stacked_linear.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <gtest/gtest.h>

namespace {

at::Tensor int32(std::initializer_list<int64_t> values) { return at::tensor(values, at::kInt); }

TEST(StackedLinear, EveryExpertReadsTheSameTokensOrItsOwn) {
  for (const int64_t tokens : {1, 20}) {
    for (const int64_t slices : {1, 3}) {
      const at::Tensor x = at::randn({slices, tokens, 9}), weight = at::randn({3, 7, 9});
      const at::Tensor want = at::matmul(x, weight.transpose(1, 2));
      EXPECT_TRUE(at::allclose(micro::stacked_linear(x, weight, std::nullopt), want, 1e-5, 1e-5));
    }
  }
}

TEST(StackedLinear, UnusedExpertsAreSkippedForwardAndBackward) {
  const at::Tensor x = at::randn({1, 5, 9}, at::kDouble).requires_grad_();
  const at::Tensor weight = at::randn({3, 7, 9}, at::kDouble).requires_grad_();
  const at::Tensor upstream = at::randn({3, 5, 7}, at::kDouble);
  const at::Tensor y = micro::stacked_linear(x, weight, int32({0, 2, 2, 5}));
  EXPECT_TRUE(at::allclose(y[2], at::matmul(x[0], weight[2].t())));
  EXPECT_EQ(y[1].abs().max().item<double>(), 0.0);
  y.backward(upstream);
  EXPECT_EQ(weight.grad()[1].abs().max().item<double>(), 0.0);
  EXPECT_TRUE(at::allclose(weight.grad()[0], at::matmul(upstream[0].t(), x[0].detach())));
  const at::Tensor want = at::matmul(upstream[0], weight[0].detach()) + at::matmul(upstream[2], weight[2].detach());
  EXPECT_TRUE(at::allclose(x.grad()[0], want));
}

TEST(StackedLinear, MistakesAreNamed) {
  const at::Tensor weight = at::ones({3, 2, 4});
  EXPECT_THROW(micro::stacked_linear(at::ones({2, 5, 4}), weight, std::nullopt), c10::ValueError);
  EXPECT_THROW(micro::stacked_linear(at::ones({1, 5, 3}), weight, std::nullopt), c10::ValueError);
  EXPECT_THROW(micro::stacked_linear(at::ones({1, 5, 4}), weight, int32({0, 5})), c10::ValueError);
  EXPECT_THROW(micro::stacked_linear(at::ones({1, 5, 4}), weight, at::zeros({4})), c10::TypeError);
}

}  // namespace
