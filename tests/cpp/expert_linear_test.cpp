#include "micro/expert_linear.h"

#include <ATen/Functions.h>
#include <gtest/gtest.h>

namespace {

at::Tensor int32(std::initializer_list<int64_t> values) { return at::tensor(values, at::kInt); }

// Rows 0..1 to expert 0, none to expert 1, 2..13 to expert 2 (more than the few that the kernel takes), 14 idle.
const std::initializer_list<int64_t> kOffsets{0, 2, 2, 14};

at::Tensor by_hand(const at::Tensor& x, const at::Tensor& weight) {
  return at::cat({at::matmul(x.slice(0, 0, 2), weight[0].t()), at::matmul(x.slice(0, 2, 14), weight[2].t()),
                  at::zeros({1, weight.size(1)}, x.options())});
}

TEST(ExpertLinear, EachRowMeetsTheMatrixOfItsExpert) {
  for (const at::ScalarType type : {at::kFloat, at::kDouble}) {
    const at::Tensor x = at::randn({15, 9}, type), weight = at::randn({3, 7, 9}, type);
    EXPECT_TRUE(at::allclose(micro::expert_linear(x, weight, int32(kOffsets)), by_hand(x, weight), 1e-5, 1e-5));
  }
}

TEST(ExpertLinear, AnExpertWithoutRowsGetsAZeroGradient) {
  const at::Tensor x = at::randn({15, 9}, at::kDouble).requires_grad_();
  const at::Tensor weight = at::randn({3, 7, 9}, at::kDouble).requires_grad_();
  const at::Tensor upstream = at::randn({15, 7}, at::kDouble);
  micro::expert_linear(x, weight, int32(kOffsets)).backward(upstream);
  const at::Tensor x_grad = x.grad().clone(), weight_grad = weight.grad().clone();
  x.mutable_grad() = at::Tensor();
  weight.mutable_grad() = at::Tensor();
  by_hand(x, weight).backward(upstream);
  EXPECT_TRUE(at::allclose(x_grad, x.grad()));
  EXPECT_TRUE(at::allclose(weight_grad, weight.grad()));
  EXPECT_EQ(weight_grad[1].abs().max().item<double>(), 0.0);
}

TEST(ExpertLinear, MistakesAreNamed) {
  const at::Tensor x = at::ones({2, 4}), weight = at::ones({2, 3, 4});
  EXPECT_THROW(micro::expert_linear(x, at::ones({2, 3, 5}), int32({0, 1, 2})), c10::ValueError);
  EXPECT_THROW(micro::expert_linear(x, weight, int32({0, 2})), c10::ValueError);
  EXPECT_THROW(micro::expert_linear(x, weight, int32({0, 2, 1})), c10::ValueError);
  EXPECT_THROW(micro::expert_linear(x, weight, int32({0, 1, 3})), c10::ValueError);
  EXPECT_THROW(micro::expert_linear(x, weight.to(at::kDouble), int32({0, 1, 2})), c10::TypeError);
}

}  // namespace
