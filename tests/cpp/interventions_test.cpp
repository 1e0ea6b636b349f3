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
#include <utility>
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

TEST(Interventions, AllExpertsAreSeenAndNothingElseChanges) {
  Engine engine = small_engine();
  const std::vector<Action> actions = {
      {.kind = ActionKind::kScale, .point = Point::kUnits, .value = at::full({1, 1, 1}, 0.5)},
      {.kind = ActionKind::kRead, .point = Point::kBlockOutput},
      {.kind = ActionKind::kRead, .point = Point::kUnits, .only_chosen = true},
      {.kind = ActionKind::kMoments, .point = Point::kFfn, .layers = {1}},
      {.kind = ActionKind::kRead, .point = Point::kResidual}};
  Interventions usual(engine.config(), actions), all(engine.config(), actions, /*all_experts=*/true);
  const at::Tensor want = engine.prefill(kRows, {.all_logits = true, .interventions = &usual}).logits;
  engine.reset();
  EXPECT_TRUE(at::equal(engine.prefill(kRows, {.all_logits = true, .interventions = &all}).logits, want));
  const RowsSeen few = usual.reading(1), many = all.reading(1);
  EXPECT_TRUE(few.chosen.all().item<bool>());
  EXPECT_EQ(many.values.size(0), 2 * 8 * 4);
  const at::Tensor chosen = many.chosen.nonzero().select(1, 0);
  EXPECT_TRUE(at::equal(many.values.index_select(0, chosen), few.values));
  EXPECT_TRUE(at::equal(many.expert.index_select(0, chosen), few.expert));
  EXPECT_TRUE(at::equal(all.reading(2).values, usual.reading(2).values));
  EXPECT_TRUE(all.moments(3).count[1].eq(8).all().item<bool>());
  EXPECT_TRUE(all.reading(4).chosen.all().item<bool>());
  EXPECT_TRUE(at::equal(all.reading(4).values, usual.reading(4).values));
  const Generation answer = engine.generate(kRows, {.max_new_tokens = 4, .interventions = &all});
  EXPECT_EQ(answer.tokens, engine.generate(kRows, {.max_new_tokens = 4, .interventions = &usual}).tokens);
}

// What nobody sees is not computed: keys of experts that are not used are not made.
TEST(Interventions, AllExpertsRunOnlyWhereAnActionSeesThem) {
  Engine engine = small_engine();
  const auto keys = [&](std::vector<Action> actions, bool all) {
    Interventions table(engine.config(), std::move(actions), all);
    engine.reset();
    engine.prefill({{1, 5, 9}}, {.interventions = &table});
    return engine.cache_bytes().keys_values;
  };
  const int64_t plain = keys({}, false), slots = 3 * 2 * 8 * 4;  // of one expert in one layer: keys and values, float32
  EXPECT_LT(plain, 2 * 4 * slots);
  EXPECT_EQ(keys({}, true), plain);
  EXPECT_EQ(keys({{.kind = ActionKind::kRead, .point = Point::kRouter}}, true), plain);
  EXPECT_EQ(keys({{.kind = ActionKind::kRead, .point = Point::kFfn}}, true), 2 * 4 * slots);
}

// K interventions behind a prefix: read once, copied, and each row's actions act on it alone.
TEST(Interventions, RowsBehindASharedPrefix) {
  Engine engine = small_engine();
  const std::vector<int64_t> prompt = {1, 5, 9, 2, 7, 3, 8};
  const SlotRange behind{.first = 4};
  const auto shifted = [&](const std::vector<int64_t>& rows, double value) {
    return Action{.kind = ActionKind::kShift,
                  .point = Point::kResidual,
                  .layers = {1},
                  .rows = rows,
                  .range = behind,
                  .value = at::full({1, 1, 1}, value)};
  };
  const double values[] = {0, 2, -3};
  std::vector<std::vector<int64_t>> alone;
  for (const double value : values) {
    Interventions one(engine.config(), {shifted({}, value)});
    alone.push_back(engine.generate({prompt}, {.max_new_tokens = 5, .interventions = &one}).tokens[0]);
  }
  EXPECT_NE(alone[0], alone[1]);
  EXPECT_NE(alone[0], alone[2]);
  Interventions table(
      engine.config(),
      {shifted({1}, 2), shifted({2}, -3), {.kind = ActionKind::kRead, .point = Point::kResidual, .layers = {0}}});
  const Generation together =
      engine.generate({prompt, prompt, prompt},
                      {.max_new_tokens = 5, .chunk = 2, .trace = true, .interventions = &table, .shared_prefix = 4});
  EXPECT_EQ(together.tokens, alone);
  EXPECT_EQ(table.reading(2).slot.min().item<int64_t>(), 4);
  const Generation plain = engine.generate({prompt}, {.max_new_tokens = 5, .trace = true});
  EXPECT_TRUE(at::equal(together.trace->ids.select(1, 0), plain.trace->ids.select(1, 0)));
  EXPECT_TRUE(
      at::equal(together.trace->probs.select(1, 2).narrow(1, 0, 4), plain.trace->probs.select(1, 0).narrow(1, 0, 4)));
  // The same by hand, to the logits of all tokens behind the prefix.
  const std::vector<int64_t> prefix(prompt.begin(), prompt.begin() + 4), rest(prompt.begin() + 4, prompt.end());
  engine.prefill({prefix});
  engine.select({0, 0, 0});
  const at::Tensor logits = engine.prefill({rest, rest, rest}, {.all_logits = true, .interventions = &table}).logits;
  for (int64_t row = 0; row < 3; ++row) {
    engine.reset();
    Interventions one(engine.config(), {shifted({}, values[row])});
    const at::Tensor whole = engine.prefill({prompt}, {.all_logits = true, .interventions = &one}).logits;
    EXPECT_TRUE(at::equal(logits[row], whole[0].narrow(0, 4, 3))) << row;
  }
}

TEST(Interventions, WrongSharedPrefixesAreRefused) {
  Engine engine = small_engine();
  expect_message("prompt 1 has 3 tokens; at least one",
                 [&] { engine.generate(kRows, {.max_new_tokens = 2, .shared_prefix = 3}); });
  expect_message("prompt 1 differs from prompt 0 in the first 2",
                 [&] { engine.generate(kRows, {.max_new_tokens = 2, .shared_prefix = 2}); });
  expect_message("shared_prefix is -1", [&] { engine.generate(kRows, {.max_new_tokens = 2, .shared_prefix = -1}); });
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
