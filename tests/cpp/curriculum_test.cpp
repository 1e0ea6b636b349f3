// Stages, rates and freezing, without tensors and without Python.

#include "micro/curriculum.h"

#include <c10/util/Exception.h>
#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <vector>

namespace micro {
namespace {

// One name of every kind; "ffn" models have the shared attention and norms besides.
const std::vector<std::string> kExperts = {"model.layers.3.blocks.q_proj.weight", "layers.0.blocks.input_norm.weight",
                                           "base_model.model.model.layers.11.blocks.up_proj.lora_A.default.weight"};
const std::vector<std::string> kRouters = {"model.layers.3.router.in_proj.weight", "layers.12.router.out_proj.weight"};
const std::vector<std::string> kRest = {"model.embed_tokens.weight",
                                        "model.norm.weight",
                                        "lm_head.weight",
                                        "model.layers.3.self_attn.q_proj.weight",
                                        "model.layers.3.post_attention_layernorm.weight",
                                        "blocks.weight",
                                        ""};

// E, R, M for the parts that learn.
std::string learning(const Stage& stage) {
  std::string parts;
  const auto add = [&](const std::vector<std::string>& names, char letter) {
    size_t count = 0;
    for (const std::string& name : names) count += stage.trains(name);
    EXPECT_TRUE(count == 0 || count == names.size()) << "a part learns as a whole: " << letter;
    if (count) parts += letter;
  };
  add(kExperts, 'E');
  add(kRouters, 'R');
  add(kRest, 'M');
  return parts;
}

struct Row {
  FreezeRule rule;
  BlockKind kind;
  std::vector<std::string> trainable;
  const char* learns;
};

class FreezeTable : public testing::TestWithParam<Row> {};

TEST_P(FreezeTable, MeansWhatTheRunFilesMeant) {
  const Row& row = GetParam();
  const Stage stage{.trainable = row.trainable, .freeze = row.rule, .kind = row.kind};
  EXPECT_EQ(learning(stage), row.learns);
}

constexpr auto R1 = FreezeRule::kR1, R2 = FreezeRule::kR2;
constexpr auto kBlock = BlockKind::kBlock, kFfn = BlockKind::kFfn;

INSTANTIATE_TEST_SUITE_P(Rows, FreezeTable,
                         testing::Values(Row{R1, kBlock, {"reasoners"}, "E"}, Row{R1, kBlock, {"experts"}, "E"},
                                         Row{R1, kBlock, {"experts-router"}, "R"}, Row{R1, kBlock, {"model"}, "EM"},
                                         Row{R1, kBlock, {"model", "reasoners", "experts-router"}, "ERM"},
                                         Row{R2, kBlock, {"model", "experts"}, "EM"}, Row{R2, kBlock, {"model"}, "EM"},
                                         Row{R2, kBlock, {"experts-router"}, "R"}, Row{R2, kBlock, {"experts"}, ""},
                                         Row{R2, kBlock, {"model", "experts", "experts-router"}, "ERM"},
                                         Row{R2, kFfn, {"model", "experts"}, "EM"}, Row{R2, kFfn, {"experts"}, "E"},
                                         Row{R2, kFfn, {"model"}, "M"}, Row{R2, kFfn, {"experts-router"}, "R"},
                                         Row{R2, kFfn, {"model", "experts", "experts-router"}, "ERM"}));

TEST(Stage, TheRateWarmsUpFromZeroAndFollowsHalfACosine) {
  const Stage stage{.learning_rate = 2e-5};
  EXPECT_EQ(stage.learning_rate_at(0, 100), 0);
  EXPECT_DOUBLE_EQ(stage.learning_rate_at(1, 100), 2e-5 / 3);
  EXPECT_DOUBLE_EQ(stage.learning_rate_at(3, 100), 2e-5);
  EXPECT_DOUBLE_EQ(stage.learning_rate_at(50, 100), 2e-5 * 0.5 * (1 + std::cos(M_PI * 47.0 / 97)));
  EXPECT_GT(stage.learning_rate_at(99, 100), 0);
  EXPECT_NEAR(stage.learning_rate_at(100, 100), 0, 1e-20);
  EXPECT_EQ(stage.learning_rate_at(101, 100), stage.learning_rate_at(100, 100));
}

TEST(Stage, WarmUpIsRoundedUpToWholeSteps) {
  EXPECT_DOUBLE_EQ(Stage{.learning_rate = 1}.learning_rate_at(1, 34), 0.5);  // ceil(1.02) = 2
  EXPECT_DOUBLE_EQ(Stage{.learning_rate = 1}.learning_rate_at(1, 33), 1);    // ceil(0.99) = 1
  EXPECT_DOUBLE_EQ((Stage{.learning_rate = 1, .warmup_ratio = 0}.learning_rate_at(0, 33)), 1);
  EXPECT_DOUBLE_EQ((Stage{.learning_rate = 1, .warmup_ratio = 1}.learning_rate_at(3, 4)), 0.75);
}

TEST(Stage, OtherSchedulesAndFloors) {
  const Stage linear{.learning_rate = 1, .warmup_ratio = 0, .schedule = Schedule::kLinear, .min_ratio = 0.2};
  EXPECT_DOUBLE_EQ(linear.learning_rate_at(5, 10), 0.6);
  EXPECT_DOUBLE_EQ(linear.learning_rate_at(10, 10), 0.2);
  const Stage constant{.learning_rate = 1, .warmup_ratio = 0.2, .schedule = Schedule::kConstant};
  EXPECT_DOUBLE_EQ(constant.learning_rate_at(1, 10), 0.5);
  EXPECT_DOUBLE_EQ(constant.learning_rate_at(9, 10), 1);
  EXPECT_DOUBLE_EQ((Stage{.learning_rate = 1, .min_ratio = 0.1}.learning_rate_at(100, 100)), 0.1);
}

TEST(Curriculum, WalksThroughItsStages) {
  Curriculum curriculum(published_stages(), {2, 1, 3});
  std::vector<std::string> seen;
  for (; !curriculum.done(); curriculum.advance()) {
    seen.push_back(curriculum.current().name + std::to_string(curriculum.step()));
    EXPECT_EQ(curriculum.learning_rate() == 0, curriculum.step() == 0);
  }
  EXPECT_EQ(seen,
            (std::vector<std::string>{"experts0", "experts1", "router0", "end_to_end0", "end_to_end1", "end_to_end2"}));
  EXPECT_EQ(curriculum.stage(), 3);
  EXPECT_THROW(curriculum.advance(), c10::ValueError);
  EXPECT_THROW(curriculum.learning_rate(), c10::ValueError);
}

TEST(Curriculum, PublishedStagesAreThoseOfThePaper) {
  const auto parts = [](const std::vector<Stage>& stages) {
    std::string all;
    for (const Stage& stage : stages) all += learning(stage) + std::to_string(stage.experts_per_token) + " ";
    return all;
  };
  EXPECT_EQ(parts(published_stages(R1, kBlock, 3)), "E2 R2 ERM1 ");
  EXPECT_EQ(parts(published_stages(R2, kBlock, 3)), "EM2 R2 ERM3 ");
  EXPECT_EQ(parts(published_stages(R2, kFfn)), "EM2 R2 ERM1 ");
  EXPECT_EQ(parts(version_3_stages(kBlock)), "E4 ERM4 ");
  EXPECT_EQ(parts(version_3_stages(kFfn, 2)), "E2 ERM2 ");
  EXPECT_EQ(published_stages()[0].route_by, RouteBy::kLabels);
  EXPECT_EQ(published_stages()[1].route_by, RouteBy::kRouter);
}

TEST(Curriculum, ResumesWhereItStopped) {
  Curriculum first(published_stages(), {2, 2, 2}), second(published_stages(), {2, 2, 2});
  for (int i = 0; i < 3; ++i) first.advance();
  second.load_state(first.state());
  EXPECT_EQ(second.stage(), 1);
  EXPECT_EQ(second.step(), 1);
  for (; !first.done(); first.advance()) {
  }
  second.load_state(first.state());
  EXPECT_TRUE(second.done());
}

TEST(Curriculum, RefusesTheStateOfAnotherAndKeepsItsOwn) {
  Curriculum curriculum(published_stages(), {2, 2, 2});
  curriculum.advance();
  const CurriculumState other = Curriculum(published_stages(), {2, 2, 3}).state();
  EXPECT_THROW(curriculum.load_state(other), c10::ValueError);
  for (auto [stage, step] : {std::pair(0, 2), std::pair(3, 1), std::pair(-1, 0), std::pair(4, 0), std::pair(0, -1)}) {
    CurriculumState outside = curriculum.state();
    outside.stage = stage;
    outside.step = step;
    EXPECT_THROW(curriculum.load_state(outside), c10::ValueError);
  }
  EXPECT_EQ(curriculum.step(), 1);
}

std::string error_of(const Stage& stage) {
  try {
    Curriculum({stage}, {1});
  } catch (const c10::ValueError& error) {
    return error.what_without_backtrace();
  }
  return "";
}

TEST(Curriculum, NamesWhatIsWrong) {
  EXPECT_EQ(error_of({.name = "x"}), "");
  EXPECT_NE(error_of({.name = "x", .trainable = {}}).find("stage 'x' trains nothing"), std::string::npos);
  EXPECT_NE(error_of({.trainable = {"router"}}).find("got 'router'"), std::string::npos);
  EXPECT_NE(error_of({.learning_rate = -1}).find("learning_rate must lie in [0, inf), got -1"), std::string::npos);
  EXPECT_NE(error_of({.learning_rate = NAN}).find("learning_rate"), std::string::npos);
  EXPECT_NE(error_of({.learning_rate = INFINITY}).find("learning_rate"), std::string::npos);
  EXPECT_NE(error_of({.warmup_ratio = 1.5}).find("warmup_ratio must lie in [0, 1]"), std::string::npos);
  EXPECT_NE(error_of({.beta2 = 1}).find("beta2 must lie in [0, 1)"), std::string::npos);
  EXPECT_NE(error_of({.experts_per_token = 0}).find("experts_per_token"), std::string::npos);
  EXPECT_NE(error_of({.loss_coefficients = {{"balance", 0.1}}}).find("got 'balance'"), std::string::npos);
  EXPECT_NE(error_of({.loss_coefficients = {{"z_loss", NAN}}}).find("must be finite"), std::string::npos);
  EXPECT_THROW(Curriculum({}, {}), c10::ValueError);
  EXPECT_THROW(Curriculum(published_stages(), {1, 1}), c10::ValueError);
  EXPECT_THROW(Curriculum(published_stages(), {1, 0, 1}), c10::ValueError);
  EXPECT_THROW(parse_route_by("label"), c10::ValueError);
}

TEST(Curriculum, AStageThatTrainsNothingIsAnError) {
  const Curriculum curriculum(published_stages(), {1, 1, 1});
  std::vector<std::string> names = {"model.embed_tokens.weight", "model.layers.0.blocks.q_proj.weight"};
  EXPECT_THROW(curriculum.check(names), c10::ValueError);  // stage 2 finds no router
  names.push_back("model.layers.0.router.in_proj.weight");
  EXPECT_NO_THROW(curriculum.check(names));
  EXPECT_THROW(Curriculum({Stage{.trainable = {"experts"}}}, {1}).check(names), c10::ValueError);
}

}  // namespace
}  // namespace micro
