// The tiny model of examples/ through the three stages: what falls, what moves, what stays.

#include <c10/util/Exception.h>
#include <gtest/gtest.h>

#include "../../examples/tiny_trainer.h"

namespace tiny {
namespace {

constexpr int64_t kRows = 8, kSlots = 16;

std::map<std::string, at::Tensor> copy_of(const Model& model) {
  std::map<std::string, at::Tensor> copy;
  for (const auto& [name, parameter] : model.parameters()) copy[name] = parameter.detach().clone();
  return copy;
}

// Trains to the end of the current stage; returns the mean losses of its first and last five steps.
std::pair<double, double> train_stage(Trainer& trainer, const Model& model, micro::Curriculum& curriculum) {
  std::vector<double> losses;
  for (const int64_t stage = curriculum.stage(); curriculum.stage() == stage;)
    losses.push_back(trainer.step(make_batch(model.shape(), kRows, kSlots, 100 * stage + losses.size())));
  double first = 0, last = 0;
  for (size_t i = 0; i < 5; ++i) first += losses[i] / 5, last += losses[losses.size() - 1 - i] / 5;
  return {first, last};
}

TEST(TrainTiny, LossesFallAndOnlyTheTrainablePartMoves) {
  Model model(Shape{}, 0);
  micro::Curriculum curriculum = tiny_curriculum({40, 20, 20});
  Trainer trainer(model, curriculum);
  while (!curriculum.done()) {
    const int64_t stage = curriculum.stage();
    const micro::Stage settings = curriculum.current();
    const auto before = copy_of(model);
    const auto [first, last] = train_stage(trainer, model, curriculum);
    if (stage != 1) {
      EXPECT_LT(last, first - 0.05) << settings.name;
    }
    for (const auto& [name, parameter] : model.parameters()) {
      const bool router = name.find(".router.") != std::string::npos;
      // Stage 3 has one expert per token: the language loss gives routers nothing, but they decay (model.md 2.10.5).
      EXPECT_EQ(!at::equal(parameter, before.at(name)), settings.trains(name)) << name << " in " << settings.name;
      EXPECT_EQ(settings.trains(name), stage == 2 || router == (stage == 1)) << name;
    }
  }
}

TEST(TrainTiny, ExpertsComeApartInStageOne) {
  Model model(Shape{}, 0);
  micro::Curriculum curriculum = tiny_curriculum({10, 1, 1});
  Trainer trainer(model, curriculum);
  const at::Tensor& gate = model.parameters().at("model.layers.0.blocks.gate_proj.weight");
  EXPECT_TRUE(at::equal(gate[0], gate[1]));
  train_stage(trainer, model, curriculum);
  EXPECT_FALSE(at::equal(gate[0], gate[1]));
}

TEST(TrainTiny, AnExpertWithoutTokensGetsAZeroGradient) {
  Model model(Shape{}, 1);
  for (const auto& [name, parameter] : model.parameters()) parameter.set_requires_grad(true);
  Batch batch = make_batch(model.shape(), kRows, kSlots, 3);
  batch.labels.remainder_(2);  // experts 2 and 3 get nothing
  model(batch, 1, /*by_labels=*/true).loss.backward();
  for (const auto& [name, parameter] : model.parameters()) {
    if (name.find(".blocks.") == std::string::npos) continue;
    ASSERT_TRUE(parameter.grad().defined()) << name;
    EXPECT_EQ(parameter.grad().slice(0, 2).abs().max().item<float>(), 0) << name;
    EXPECT_GT(parameter.grad().slice(0, 0, 2).abs().max().item<float>(), 0) << name;
  }
}

TEST(TrainTiny, IdenticalExpertsGiveTheSameLossForAnyRouting) {
  const Model model(Shape{}, 2);
  const Batch batch = make_batch(model.shape(), kRows, kSlots, 4);
  const double by_labels = model(batch, 1, true).loss.item<double>();
  for (const int64_t k : {1, 2, 4}) EXPECT_NEAR(model(batch, k, false).loss.item<double>(), by_labels, 1e-5);
}

TEST(TrainTiny, LabelRoutingWithTwoExpertsIsThatWithOne) {
  const Model model(Shape{}, 2);
  const Batch batch = make_batch(model.shape(), kRows, kSlots, 5);
  const Result one = model(batch, 1, true), two = model(batch, 2, true);
  EXPECT_TRUE(at::equal(one.usage, two.usage));  // the second expert has weight 0 and is not computed
  EXPECT_EQ(one.loss.item<float>(), two.loss.item<float>());
}

TEST(TrainTiny, AStageThatTrainsNothingIsRefused) {
  Model model(Shape{}, 0);
  micro::Stage stage;
  stage.trainable = {"experts"};  // freeze rule R2 reads this as nothing for whole-block experts
  micro::Curriculum curriculum({stage}, {1});
  EXPECT_THROW(Trainer(model, curriculum), c10::ValueError);
}

}  // namespace
}  // namespace tiny
