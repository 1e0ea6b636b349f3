// The terms of the training loss beside cross-entropy, each against its formula.

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <gtest/gtest.h>

#include <cmath>

#include "micro/label_loss.h"
#include "micro/load_balancing_loss.h"
#include "micro/routing_entropy.h"
#include "micro/z_loss.h"

namespace {

constexpr int64_t kLayers = 2, kTokens = 5, kExperts = 4;

at::Tensor real_tokens() { return at::tensor({1, 1, 0, 1, 1}).to(at::kBool); }

TEST(Losses, LabelsCountWhereThereAreSome) {
  const at::Tensor logits = at::randn({kLayers, kTokens, kExperts}, at::kDouble).requires_grad_();
  const at::Tensor labels = at::tensor({0, -1, 3, 2, 1}, at::kLong);
  const at::Tensor scores = at::log_softmax(logits, -1);
  at::Tensor want = at::zeros({}, at::kDouble);
  for (int64_t l = 0; l < kLayers; ++l) want = want - scores[l][0][0] - scores[l][3][2] - scores[l][4][1];
  const at::Tensor got = micro::label_loss(logits, labels, real_tokens(), std::nullopt);
  EXPECT_TRUE(at::allclose(got, want / kLayers));
  got.backward();
  EXPECT_EQ(logits.grad().select(1, 1).abs().max().item<double>(), 0.0);
}

TEST(Losses, AnEvenLoadCostsOneAndACollapsedOneCostsE) {
  const at::Tensor even = at::full({1, 4, kExperts}, 1.0 / kExperts, at::kDouble);
  const at::Tensor all = at::arange(4, at::kInt).reshape({1, 4, 1});
  EXPECT_NEAR(micro::load_balancing_loss(even, all, std::nullopt).item<double>(), 1.0, 1e-12);
  at::Tensor collapsed = at::zeros({1, 4, kExperts}, at::kDouble);
  collapsed.select(2, 0).fill_(1.0);
  const at::Tensor first = at::zeros({1, 4, 1}, at::kInt);
  EXPECT_NEAR(micro::load_balancing_loss(collapsed, first, std::nullopt).item<double>(), kExperts, 1e-12);
}

TEST(Losses, ZLossIsTheMeanSquareOfLogSumExp) {
  const at::Tensor logits = at::randn({kLayers, kTokens, kExperts}, at::kDouble);
  const at::Tensor square = at::logsumexp(logits, {-1}).square() * real_tokens();
  EXPECT_TRUE(at::allclose(micro::z_loss(logits, real_tokens()), square.sum() / (kLayers * 4)));
}

TEST(Losses, EntropyOfAnEvenAndOfACertainDecision) {
  at::Tensor probs = at::zeros({2, kTokens, kExperts}, at::kDouble);
  probs[0].fill_(1.0 / kExperts);
  probs[1].select(1, 2).fill_(1.0);
  const at::Tensor entropy = micro::routing_entropy(probs, real_tokens());
  EXPECT_NEAR(entropy[0].item<double>(), std::log(4.0), 1e-12);
  EXPECT_EQ(entropy[1].item<double>(), 0.0);
}

TEST(Losses, MistakesAreNamed) {
  const at::Tensor logits = at::ones({kLayers, kTokens, kExperts});
  EXPECT_THROW(micro::label_loss(logits, at::zeros({3}, at::kLong), std::nullopt, std::nullopt), c10::ValueError);
  EXPECT_THROW(micro::label_loss(logits, at::zeros({kTokens}), std::nullopt, std::nullopt), c10::TypeError);
  EXPECT_THROW(micro::z_loss(logits, at::ones({2}).to(at::kBool)), c10::ValueError);
  EXPECT_THROW(micro::routing_entropy(logits, at::ones({kTokens})), c10::TypeError);
  EXPECT_THROW(micro::load_balancing_loss(logits, at::zeros({1, 1, 1}, at::kInt), std::nullopt), c10::ValueError);
}

}  // namespace
