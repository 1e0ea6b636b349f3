#include "micro/block_train.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <vector>

#include "micro/block_forward.h"

namespace {

constexpr int64_t kExperts = 3, kHidden = 16, kHeads = 2, kSize = 8, kInner = 24, kRouter = 8, kSlots = 5;

micro::BlockParameters parameters() {
  const auto matrix = [](at::IntArrayRef shape) { return (at::randn(shape, at::kDouble) * 0.3).requires_grad_(); };
  const auto gain = [] { return (at::rand({kExperts, kHidden}, at::kDouble) + 0.5).requires_grad_(); };
  micro::BlockParameters p;
  p.q_proj = matrix({kExperts, kHeads * kSize, kHidden});
  p.k_proj = matrix({kExperts, kSize, kHidden});
  p.v_proj = matrix({kExperts, kSize, kHidden});
  p.o_proj = matrix({kExperts, kHidden, kHeads * kSize});
  p.gate_proj = matrix({kExperts, kInner, kHidden});
  p.up_proj = matrix({kExperts, kInner, kHidden});
  p.down_proj = matrix({kExperts, kHidden, kInner});
  p.router_in = matrix({kRouter, kHidden});
  p.router_out = matrix({kExperts, kRouter});
  p.input_norm = gain();
  p.post_attention_norm = gain();
  return p;
}

TEST(BlockTrain, SameResultWithGradients) {
  at::manual_seed(1);
  const micro::BlockParameters p = parameters();
  const at::Tensor x = at::randn({2, kSlots, kHidden}, at::kDouble).requires_grad_();
  const at::Tensor angles = at::rand({2 * kSlots, kSize / 2}, at::kDouble);
  at::Tensor want;
  {
    const at::NoGradGuard no_grad;
    want = micro::block_forward(x, p, angles.cos(), angles.sin(), kHeads, true, 1e-5, {.slots = kSlots}, 2).y;
  }
  std::vector<at::Tensor> gradients;
  for (const auto policy : {micro::Activations::kSave, micro::Activations::kRecompute}) {
    const micro::BlockResult got =
        micro::block_train(x, p, angles.cos(), angles.sin(), kHeads, 1e-5, {.slots = kSlots}, 2, {}, true, policy);
    EXPECT_TRUE(at::equal(got.y, want));
    gradients.push_back(torch::autograd::grad({got.y.sum() + got.raw->sum()}, {x, *p.router_in, p.up_proj})[0]);
  }
  EXPECT_TRUE(gradients[0].any().item<bool>());
  EXPECT_TRUE(at::equal(gradients[0], gradients[1]));
}

TEST(BlockTrain, NoCache) {
  const micro::BlockParameters p = parameters();
  const at::Tensor x = at::randn({kSlots, kHidden}, at::kDouble), table = at::rand({kSlots, kSize / 2}, at::kDouble);
  EXPECT_THROW(micro::block_train(x, p, table, table, kHeads, 1e-5, {.slots = kSlots, .start = 2}, 1), c10::ValueError);
}

}  // namespace
