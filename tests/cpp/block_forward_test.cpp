#include "micro/block_forward.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <gtest/gtest.h>

#include <cmath>

#include "micro/combine.h"
#include "micro/expert_attention.h"
#include "micro/expert_linear.h"
#include "micro/permute.h"
#include "micro/plan.h"
#include "micro/rms_norm.h"
#include "micro/rope.h"
#include "micro/route.h"
#include "micro/stacked_linear.h"
#include "micro/swiglu.h"

namespace {

constexpr int64_t kExperts = 3, kHidden = 24, kHeads = 4, kGroups = 2, kSize = 8, kInner = 40, kRouter = 16;
constexpr int64_t kBatch = 2, kSlots = 5, kTokens = kBatch * kSlots;
constexpr double kEps = 1e-5;

struct Layer {
  micro::BlockParameters p;
  at::Tensor x, cos, sin;

  Layer() {
    at::manual_seed(1);
    const auto matrix = [](at::IntArrayRef shape) { return at::randn(shape, at::kDouble) * 0.3; };
    const auto gain = [] { return at::rand({kExperts, kHidden}, at::kDouble) + 0.5; };
    p.q_proj = matrix({kExperts, kHeads * kSize, kHidden});
    p.k_proj = matrix({kExperts, kGroups * kSize, kHidden});
    p.v_proj = matrix({kExperts, kGroups * kSize, kHidden});
    p.o_proj = matrix({kExperts, kHidden, kHeads * kSize});
    p.gate_proj = matrix({kExperts, kInner, kHidden});
    p.up_proj = matrix({kExperts, kInner, kHidden});
    p.down_proj = matrix({kExperts, kHidden, kInner});
    p.router_in = matrix({kRouter, kHidden});
    p.router_out = matrix({kExperts, kRouter});
    p.input_norm = gain();
    p.post_attention_norm = gain();
    x = at::randn({kBatch, kSlots, kHidden}, at::kDouble);
    const at::Tensor angles = at::rand({kTokens, kSize / 2}, at::kDouble);
    cos = angles.cos();
    sin = angles.sin();
  }

  at::Tensor by_operators(int64_t k) const {
    const at::Tensor flat = x.flatten(0, 1);
    const auto map = [](const at::Tensor& rows, const at::Tensor& weight) {
      return micro::stacked_linear(rows.unsqueeze(0), weight.unsqueeze(0), {})[0];
    };
    const micro::Routing routing = micro::route(map(map(flat, *p.router_in), p.router_out), k);
    const micro::Plan plan = micro::plan(routing.ids, kExperts, routing.weights);
    const at::Tensor normed = micro::rms_norm(flat.unsqueeze(0), *p.input_norm, {}, kEps);
    const auto heads = [](const at::Tensor& t) {
      return t.view({kExperts, kBatch, kSlots, kGroups, kSize}).permute({1, 0, 3, 2, 4});
    };
    const at::Tensor keys =
        micro::rope(micro::stacked_linear(normed, p.k_proj, {}).view({kExperts, kTokens, kGroups, kSize}), cos, sin);
    const at::Tensor values = micro::stacked_linear(normed, p.v_proj, {});
    const at::Tensor rows = micro::permute(flat, plan);
    const at::Tensor q =
        micro::expert_linear(micro::rms_norm(rows, *p.input_norm, plan.experts, kEps), p.q_proj, plan.offsets);
    const at::Tensor a = micro::expert_attention(micro::rope(q.view({-1, kHeads, kSize}), cos, sin, plan.tokens),
                                                 heads(keys), heads(values), plan.tokens, plan.offsets, kSlots);
    const at::Tensor u = rows + micro::expert_linear(a.flatten(1), p.o_proj, plan.offsets);
    const at::Tensor n = micro::rms_norm(u, p.post_attention_norm, plan.experts, kEps);
    const at::Tensor inner = micro::swiglu(micro::expert_linear(n, p.gate_proj, plan.offsets),
                                           micro::expert_linear(n, p.up_proj, plan.offsets));
    return micro::combine(u + micro::expert_linear(inner, p.down_proj, plan.offsets), routing.weights, plan)
        .view(x.sizes());
  }
};

TEST(BlockForward, IsTheOperatorsInOneCall) {
  const Layer layer;
  for (const int64_t k : {1, 2}) {
    const micro::BlockResult got =
        micro::block_forward(layer.x, layer.p, layer.cos, layer.sin, kHeads, true, kEps, {.slots = kSlots}, k);
    EXPECT_TRUE(at::equal(got.y, layer.by_operators(k)));
    EXPECT_EQ(got.raw->sizes(), (at::IntArrayRef{kTokens, kExperts}));
    EXPECT_EQ(got.routing.ids.sizes(), (at::IntArrayRef{kTokens, k}));
  }
}

TEST(BlockForward, AChunkContinuesACache) {
  const Layer layer;
  const at::Tensor whole =
      micro::block_forward(layer.x, layer.p, layer.cos, layer.sin, kHeads, true, kEps, {.slots = kSlots}, 1).y;
  const at::Tensor keys = at::zeros({kBatch, kExperts, kGroups, kSlots + 1, kSize}, at::kDouble);
  const at::Tensor values = keys.clone();
  const auto part = [&](int64_t first, int64_t last) {
    const auto table = [&](const at::Tensor& t) {
      return t.view({kBatch, kSlots, -1}).slice(1, first, last).flatten(0, 1);
    };
    return micro::block_forward(layer.x.slice(1, first, last), layer.p, table(layer.cos), table(layer.sin), kHeads,
                                true, kEps, {.slots = last - first, .start = first, .keys = keys, .values = values}, 1)
        .y;
  };
  EXPECT_TRUE(at::equal(at::cat({part(0, 3), part(3, 4), part(4, 5)}, 1), whole));
  EXPECT_EQ(keys.select(3, kSlots).abs().max().item<double>(), 0);
}

TEST(BlockForward, RefusesWhatItCannotGive) {
  const Layer layer;
  const auto call = [&](const at::Tensor& x) {
    return micro::block_forward(x, layer.p, layer.cos, layer.sin, kHeads, true, kEps, {.slots = kSlots}, 1);
  };
  EXPECT_THROW(call(layer.x.clone().requires_grad_()), c10::Error);
  EXPECT_THROW(call(layer.x.to(at::kFloat)), c10::TypeError);
  EXPECT_THROW(call(layer.x.slice(1, 0, 4)), c10::ValueError);
}

}  // namespace
