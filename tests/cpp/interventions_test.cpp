// Actions without Python: operators against plain loops, and the engine's table by what it must and must not change.

#include "micro/interventions.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/full.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>
#include <gtest/gtest.h>

#include <map>
#include <string>
#include <vector>

#include "micro/engine.h"
#include "micro/intervene.h"
#include "micro/moments.h"

namespace micro {
namespace {

ModelConfig small() {
  ModelConfig config;
  config.vocab_size = 31;
  config.hidden_size = config.router_hidden_size = 16;
  config.intermediate_size = 24;
  config.num_hidden_layers = 2;
  config.num_attention_heads = 2;
  config.num_key_value_heads = 1;
  config.head_dim = 8;
  config.num_experts = 4;
  config.max_position_embeddings = 64;
  config.eos_token_ids = {};
  return config;
}

Engine small_engine() {
  const ModelConfig c = small();
  std::map<std::string, at::Tensor> parameters;
  const auto add = [&](const std::string& name, std::vector<int64_t> sizes, double mean = 0) {
    parameters[name + ".weight"] = at::randn(sizes) * 0.3 + mean;
  };
  const int64_t e = c.num_experts, h = c.hidden_size, f = c.intermediate_size;
  add("model.embed_tokens", {c.vocab_size, h});
  add("model.norm", {h}, 1);
  add("lm_head", {c.vocab_size, h});
  for (int64_t l = 0; l < c.num_hidden_layers; ++l) {
    const std::string at = "model.layers." + std::to_string(l) + ".", own = at + "blocks.";
    add(at + "router.in_proj", {h, h});
    add(at + "router.out_proj", {e, h});
    add(own + "q_proj", {e, 16, h});
    add(own + "k_proj", {e, 8, h});
    add(own + "v_proj", {e, 8, h});
    add(own + "o_proj", {e, h, 16});
    add(own + "gate_proj", {e, f, h});
    add(own + "up_proj", {e, f, h});
    add(own + "down_proj", {e, h, f});
    add(own + "input_norm", {e, h}, 1);
    add(own + "post_attention_norm", {e, h}, 1);
  }
  return Engine(c, parameters);
}

const std::vector<std::vector<int64_t>> kRows = {{1, 5, 9, 2, 7}, {3, 3, 8}};

void expect_message(const std::string& part, const std::function<void()>& call) {
  try {
    call();
    ADD_FAILURE() << "nothing was thrown";
  } catch (const c10::Error& error) {
    EXPECT_NE(std::string(error.what_without_backtrace()).find(part), std::string::npos)
        << error.what_without_backtrace();
  }
}

TEST(Operators, ScaleOneColumnOfOneExpert) {
  const at::Tensor x = at::randn({5, 3}), experts = at::tensor(std::vector<int64_t>{0, 1, 1, 0, 1}).to(at::kInt);
  at::Tensor columns = at::zeros({2, 3}, at::kBool);
  columns[1][2].fill_(true);
  const at::Tensor y = intervene(x, Change::kScale, std::nullopt, experts, columns, at::full({1, 1}, 2.0f));
  at::Tensor want = x.clone();
  for (const int64_t n : {1, 2, 4}) want[n][2] *= 2;
  EXPECT_TRUE(at::equal(y, want));
}

TEST(Operators, MomentsOfTwoCalls) {
  const at::Tensor x = at::randn({9, 3});
  at::Tensor count = at::zeros({1}, at::kDouble), mean = at::zeros({1, 3}, at::kDouble), m2 = mean.clone();
  moments_(x.narrow(0, 0, 4), count, mean, m2);
  moments_(x.narrow(0, 4, 5), count, mean, m2);
  EXPECT_EQ(count.item<double>(), 9);
  EXPECT_TRUE((mean[0] - x.to(at::kDouble).mean(0)).abs().max().item<double>() < 1e-12);
  EXPECT_TRUE((m2[0] / 8 - x.to(at::kDouble).var(0)).abs().max().item<double>() < 1e-12);
}

TEST(Interventions, AnEmptyTableAndReadingChangeNoBit) {
  Engine engine = small_engine();
  const at::Tensor plain = engine.prefill(kRows, {.all_logits = true}).logits;
  engine.reset();
  Interventions none(engine.config(), {});
  EXPECT_TRUE(at::equal(engine.prefill(kRows, {.all_logits = true, .interventions = &none}).logits, plain));
  engine.reset();
  std::vector<Action> reads;
  for (const Point point : {Point::kResidual, Point::kRouter, Point::kHeads, Point::kAttention, Point::kUp,
                            Point::kUnits, Point::kFfn, Point::kBlockOutput})
    reads.push_back({.kind = ActionKind::kRead, .point = point});
  Interventions table(engine.config(), reads);
  EXPECT_TRUE(at::equal(engine.prefill(kRows, {.all_logits = true, .interventions = &table}).logits, plain));
  const RowsSeen residual = table.reading(0), units = table.reading(5);
  EXPECT_EQ(residual.values.sizes(), (std::vector<int64_t>{3 * 8, 16}));
  EXPECT_EQ(units.values.sizes(), (std::vector<int64_t>{2 * 8, 24}));
  EXPECT_TRUE(residual.expert.eq(-1).all().item<bool>());
  EXPECT_EQ(units.row.eq(1).sum().item<int64_t>(), 2 * 3);
}

TEST(Interventions, WhatIsReplacedIsReadBehindIt) {
  Engine engine = small_engine();
  Interventions table(engine.config(), {{.kind = ActionKind::kReplace,
                                         .point = Point::kBlockOutput,
                                         .layers = {1},
                                         .rows = {0},
                                         .range = SlotRange{.first = 2},
                                         .value = at::full({1, 1, 1}, 0.5)},
                                        {.kind = ActionKind::kRead, .point = Point::kResidual, .layers = {2}}});
  engine.generate(kRows, {.max_new_tokens = 3, .interventions = &table});
  const RowsSeen seen = table.reading(1);
  const at::Tensor touched = seen.row.eq(0).logical_and(seen.slot.ge(2));
  EXPECT_EQ(touched.sum().item<int64_t>(), 5 - 2 + 2);  // prompt, and the answer but its last token
  EXPECT_TRUE((seen.values.index_select(0, touched.nonzero().select(1, 0)) - 0.5).abs().max().item<double>() < 1e-6);
  EXPECT_FALSE(seen.values.index_select(0, touched.logical_not().nonzero().select(1, 0)).eq(0.5).any().item<bool>());
}

TEST(Interventions, WrongActionsAreRefused) {
  const ModelConfig config = small();
  expect_message("action 0: layer 2 does not exist",
                 [&] { Interventions(config, {{.kind = ActionKind::kRead, .point = Point::kUnits, .layers = {2}}}); });
  expect_message("need a value",
                 [&] { Interventions(config, {{.kind = ActionKind::kScale, .point = Point::kUnits}}); });
  expect_message("a source goes with", [&] { Interventions(config, {{.kind = ActionKind::kResample}}); });
  expect_message("does not fit", [&] {
    Interventions(config, {{.kind = ActionKind::kShift, .point = Point::kUnits, .value = at::ones({1, 1, 16})}});
  });
  Interventions table(config, {{.kind = ActionKind::kMoments}});
  expect_message("reads nothing", [&] { table.reading(0); });
  ModelConfig other = config;
  other.num_hidden_layers = 3;
  Interventions wrong(other, {});
  Engine engine = small_engine();
  expect_message("other sizes", [&] { engine.prefill(kRows, {.interventions = &wrong}); });
}

}  // namespace
}  // namespace micro
