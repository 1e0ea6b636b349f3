// From logits to combined outputs through the public headers alone.

#include <ATen/Functions.h>
#include <gtest/gtest.h>

#include "micro/combine.h"
#include "micro/permute.h"
#include "micro/plan.h"
#include "micro/route.h"

namespace {

at::Tensor int32(std::initializer_list<int64_t> values) { return at::tensor(values, at::kInt); }

TEST(Routing, WhatIsPermutedComesBackCombined) {
  const at::Tensor x = at::randn({9, 6});
  const micro::Routing routing = micro::route(at::randn({9, 4}), 2);
  const micro::Plan plan = micro::plan(routing.ids, 4, routing.weights);
  EXPECT_EQ(plan.offsets[-1].item<int>(), 18);
  const at::Tensor out = micro::combine(micro::permute(x, plan), routing.weights, plan);
  EXPECT_TRUE(at::allclose(out, x, 1e-5, 1e-5));
}

TEST(Routing, OptionsSteer) {
  const at::Tensor logits = at::tensor({3.0f, 2.0f, 1.0f, 0.0f}).reshape({1, 4});
  EXPECT_EQ(micro::route(logits, 1).ids.item<int>(), 0);
  const at::Tensor first = at::tensor({1, 0, 0, 0}).to(at::kBool).reshape({1, 4});
  EXPECT_EQ(micro::route(logits, 1, {.ablate = first}).ids.item<int>(), 1);
  EXPECT_EQ(micro::route(logits, 1, {.force = int32({3})}).ids.item<int>(), 3);
  const at::Tensor rows = at::tensor({0.0f, 0.0f, 1.0f, 0.0f}).reshape({1, 4});
  EXPECT_EQ(micro::route(std::nullopt, 1, {.rows = rows}).ids.item<int>(), 2);
}

TEST(Routing, TheWeightRuleDecidesTheRoutersGradient) {
  const at::Tensor logits = at::randn({5, 4}).requires_grad_();
  const auto gradient = [&logits](micro::WeightRule rule) {
    logits.mutable_grad() = at::Tensor();
    micro::route(logits, 1, {.weight_rule = rule}).weights.sum().backward();
    return logits.grad().abs().sum().item<float>();
  };
  EXPECT_EQ(gradient(micro::WeightRule::kRenormalized), 0.0f);
  EXPECT_GT(gradient(micro::WeightRule::kProbability), 0.0f);
  EXPECT_GT(gradient(micro::WeightRule::kStraightThrough), 0.0f);
}

TEST(Routing, MistakesAreNamed) {
  EXPECT_THROW(micro::route(at::randn({2, 4}), 5), c10::ValueError);
  EXPECT_THROW(micro::route(std::nullopt, 1), c10::ValueError);
  EXPECT_THROW(micro::plan(int32({0, 4}).reshape({2, 1}), 4), c10::ValueError);
  EXPECT_THROW(micro::plan(at::zeros({2, 1}), 4), c10::TypeError);
}

}  // namespace
