#pragma once
// Trains the tiny model through a curriculum (model.md 6): what learns, who routes and how fast come from
// micro::Curriculum; every stage starts with fresh moments.

#include <micro/adamw_step.h>
#include <micro/curriculum.h>
#include <micro/gradient_norm.h>

#include <algorithm>
#include <functional>

#include "tiny_model.h"

namespace tiny {

class Trainer {
 public:
  // Throws ValueError where a stage would train nothing.
  Trainer(Model& model, micro::Curriculum& curriculum) : model_(model), curriculum_(curriculum) {
    curriculum.check(model.names());
  }

  // Number of parameters that learn in the current stage.
  int64_t trainable() const {
    int64_t count = 0;
    for (const auto& [name, parameter] : model_.parameters())
      if (curriculum_.trainable(name)) count += parameter.numel();
    return count;
  }

  // One optimizer step; returns its loss.
  double step(const Batch& batch) {
    if (curriculum_.step() == 0) begin_stage();
    for (const auto& [name, parameter] : model_.parameters()) parameter.mutable_grad() = at::Tensor();
    const bool by_labels = curriculum_.route_by() == micro::RouteBy::kLabels;
    const at::Tensor loss = model_(batch, curriculum_.experts_per_token(), by_labels).loss;
    loss.backward();
    update();
    curriculum_.advance();
    return loss.item<double>();
  }

 private:
  // Norm gains do not decay (model.md 6.2), so there are two groups.
  struct Group {
    double weight_decay;
    std::vector<at::Tensor> parameters = {}, first_moments = {}, second_moments = {};
  };

  void begin_stage() {
    groups_ = {{curriculum_.current().weight_decay}, {0.0}};
    for (const auto& [name, parameter] : model_.parameters()) {
      const bool learns = curriculum_.trainable(name);
      parameter.set_requires_grad(learns);
      if (!learns) continue;
      Group& group = groups_[name.find("norm.") != std::string::npos];
      group.parameters.push_back(parameter);
      group.first_moments.push_back(at::zeros_like(parameter));
      group.second_moments.push_back(at::zeros_like(parameter));
    }
  }

  void update() {
    const at::NoGradGuard no_gradients;
    const micro::Stage& stage = curriculum_.current();
    std::vector<at::Tensor> gradients[2], all;
    for (size_t g = 0; g < groups_.size(); ++g)
      for (const at::Tensor& parameter : groups_[g].parameters) {
        gradients[g].push_back(parameter.grad());
        all.push_back(parameter.grad());
      }
    const double norm = micro::gradient_norm(all).item<double>();
    const double scale = stage.max_grad_norm > 0 ? std::min(1.0, stage.max_grad_norm / (norm + 1e-6)) : 1.0;
    for (size_t g = 0; g < groups_.size(); ++g)
      micro::adamw_step(groups_[g].parameters, gradients[g], groups_[g].first_moments, groups_[g].second_moments, {},
                        curriculum_.step() + 1, curriculum_.learning_rate(), stage.beta1, stage.beta2, stage.eps,
                        groups_[g].weight_decay, scale);
  }

  Model& model_;
  micro::Curriculum& curriculum_;
  std::vector<Group> groups_;
};

// The published three stages with rates for a model of this size: seconds instead of days.
inline micro::Curriculum tiny_curriculum(std::vector<int64_t> steps) {
  std::vector<micro::Stage> stages = micro::published_stages();
  stages[0].learning_rate = 1e-2;
  stages[1].learning_rate = 3e-2;
  stages[2].learning_rate = 5e-3;
  return {std::move(stages), std::move(steps)};
}

}  // namespace tiny
