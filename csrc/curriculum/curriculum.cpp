#include "micro/curriculum.h"

#include <c10/util/Exception.h>
#include <c10/util/StringUtil.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numbers>
#include <string_view>
#include <utility>

namespace micro {
namespace {

constexpr std::array<std::string_view, 4> kLosses = {"load_balancing_loss", "z_loss", "label_loss", "entropy"};

// ---- words ---------------------------------------------------------------------------------------------------------

template <class Enum, size_t n>
using Words = std::array<std::pair<Enum, const char*>, n>;

constexpr Words<RouteBy, 2> kRouteBy = {{{RouteBy::kLabels, "labels"}, {RouteBy::kRouter, "router"}}};
constexpr Words<FreezeRule, 2> kFreezeRules = {{{FreezeRule::kR1, "r1"}, {FreezeRule::kR2, "r2"}}};
constexpr Words<BlockKind, 2> kBlockKinds = {{{BlockKind::kBlock, "block"}, {BlockKind::kFfn, "ffn"}}};
constexpr Words<Schedule, 3> kSchedules = {
    {{Schedule::kCosine, "cosine"}, {Schedule::kLinear, "linear"}, {Schedule::kConstant, "constant"}}};
constexpr Words<AuxWindow, 2> kAuxWindows = {{{AuxWindow::kMean, "mean"}, {AuxWindow::kSum, "sum"}}};

template <class Enum, size_t n>
const char* word_of(const Words<Enum, n>& words, Enum value) {
  for (const auto& [known, word] : words)
    if (known == value) return word;
  TORCH_INTERNAL_ASSERT(false, "an enumerator without a word");
}

template <class Enum, size_t n>
Enum value_of(const char* what, const Words<Enum, n>& words, const std::string& word) {
  std::string known;
  for (const auto& [value, name] : words) {
    if (word == name) return value;
    known += known.empty() ? name : std::string(" or ") + name;
  }
  TORCH_CHECK_VALUE(false, what, " must be ", known, ", got '", word, "'");
}

// ---- parameters ----------------------------------------------------------------------------------------------------

enum class Part { kExperts, kRouters, kRest };

bool is_number(std::string_view text) {
  return !text.empty() && std::all_of(text.begin(), text.end(), [](char c) { return c >= '0' && c <= '9'; });
}

// By the component behind "layers.<number>": prefixes of wrappers and suffixes of adapters do not matter.
Part part_of(std::string_view name) {
  std::array<std::string_view, 3> last;  // the three components read last
  while (!name.empty()) {
    const size_t dot = std::min(name.find('.'), name.size());
    last = {last[1], last[2], name.substr(0, dot)};
    if (last[0] == "layers" && is_number(last[1])) {
      if (last[2] == "blocks") return Part::kExperts;
      if (last[2] == "router") return Part::kRouters;
    }
    name.remove_prefix(std::min(dot + 1, name.size()));
  }
  return Part::kRest;
}

bool has(const Stage& stage, std::string_view word) {
  return std::find(stage.trainable.begin(), stage.trainable.end(), word) != stage.trainable.end();
}

bool has_experts(const Stage& stage) { return has(stage, "experts") || has(stage, "reasoners"); }

bool experts_learn(const Stage& stage) {
  if (stage.freeze == FreezeRule::kR1) return has_experts(stage) || has(stage, "model");
  return stage.kind == BlockKind::kBlock ? has(stage, "model") : has_experts(stage);
}

// ---- checks --------------------------------------------------------------------------------------------------------

void check_number(const Stage& stage, const char* field, double value, double low, double high, bool high_included) {
  const bool inside = value >= low && (high_included ? value <= high : value < high);
  TORCH_CHECK_VALUE(inside && std::isfinite(value), "stage '", stage.name, "': ", field, " must lie in [", low, ", ",
                    high, high_included ? "]" : ")", ", got ", value);
}

void check_words(const Stage& stage) {
  TORCH_CHECK_VALUE(!stage.trainable.empty(), "stage '", stage.name,
                    "' trains nothing: trainable must hold model, experts (reasoners) or experts-router");
  for (const std::string& word : stage.trainable)
    TORCH_CHECK_VALUE(word == "model" || word == "experts" || word == "reasoners" || word == "experts-router",
                      "stage '", stage.name,
                      "': trainable must hold model, experts (reasoners) or experts-router, got '", word, "'");
}

void check_losses(const Stage& stage) {
  for (const auto& [loss, coefficient] : stage.loss_coefficients) {
    TORCH_CHECK_VALUE(std::find(kLosses.begin(), kLosses.end(), loss) != kLosses.end(), "stage '", stage.name,
                      "': loss_coefficients knows load_balancing_loss, z_loss, label_loss and entropy, got '", loss,
                      "'");
    TORCH_CHECK_VALUE(std::isfinite(coefficient), "stage '", stage.name, "': the coefficient of ", loss,
                      " must be finite, got ", coefficient);
  }
}

}  // namespace

// ---- Stage ---------------------------------------------------------------------------------------------------------

void Stage::check() const {
  constexpr double kAny = std::numeric_limits<double>::infinity();
  TORCH_CHECK_VALUE(experts_per_token >= 1, "stage '", name, "': experts_per_token must be at least 1, got ",
                    experts_per_token);
  check_number(*this, "learning_rate", learning_rate, 0, kAny, false);
  check_number(*this, "warmup_ratio", warmup_ratio, 0, 1, true);
  check_number(*this, "min_ratio", min_ratio, 0, 1, true);
  check_number(*this, "weight_decay", weight_decay, 0, kAny, false);
  check_number(*this, "beta1", beta1, 0, 1, false);
  check_number(*this, "beta2", beta2, 0, 1, false);
  check_number(*this, "eps", eps, 0, kAny, false);
  check_number(*this, "max_grad_norm", max_grad_norm, 0, kAny, false);
  check_words(*this);
  check_losses(*this);
}

double Stage::learning_rate_at(int64_t step, int64_t steps) const {
  const double n = static_cast<double>(std::min(step, steps)), total = static_cast<double>(steps);
  const double warmup = std::ceil(warmup_ratio * total);
  if (n < warmup) return learning_rate * n / warmup;
  const double progress = total > warmup ? (n - warmup) / (total - warmup) : 1.0;
  double share = 1.0;
  if (schedule == Schedule::kCosine) share = 0.5 * (1 + std::cos(std::numbers::pi * progress));
  if (schedule == Schedule::kLinear) share = 1 - progress;
  return learning_rate * (schedule == Schedule::kConstant ? 1.0 : min_ratio + (1 - min_ratio) * share);
}

bool Stage::trains(const std::string& parameter_name) const {
  switch (part_of(parameter_name)) {
    case Part::kExperts:
      return experts_learn(*this);
    case Part::kRouters:
      return has(*this, "experts-router");
    case Part::kRest:
      break;
  }
  return has(*this, "model");
}

// ---- Curriculum ----------------------------------------------------------------------------------------------------

Curriculum::Curriculum(std::vector<Stage> stages, std::vector<int64_t> steps)
    : stages_(std::move(stages)), steps_(std::move(steps)) {
  TORCH_CHECK_VALUE(!stages_.empty(), "a curriculum needs at least one stage");
  TORCH_CHECK_VALUE(stages_.size() == steps_.size(), "got ", stages_.size(), " stages but ", steps_.size(),
                    " numbers of steps");
  for (size_t i = 0; i < stages_.size(); ++i) {
    if (stages_[i].name.empty()) stages_[i].name = "stage_" + std::to_string(i + 1);
    stages_[i].check();
    TORCH_CHECK_VALUE(steps_[i] >= 1, "stage '", stages_[i].name, "': steps must be at least 1, got ", steps_[i]);
  }
}

const Stage& Curriculum::current() const {
  TORCH_CHECK_VALUE(!done(), "the curriculum is done: its ", stages_.size(), " stages have no further step");
  return stages_[stage_];
}

double Curriculum::learning_rate() const { return current().learning_rate_at(step_, steps_[stage_]); }

void Curriculum::advance() {
  current();
  if (++step_ < steps_[stage_]) return;
  ++stage_;
  step_ = 0;
}

void Curriculum::check(const std::vector<std::string>& parameter_names) const {
  for (const Stage& stage : stages_) {
    const bool any = std::any_of(parameter_names.begin(), parameter_names.end(),
                                 [&stage](const std::string& parameter) { return stage.trains(parameter); });
    TORCH_CHECK_VALUE(any, "stage '", stage.name, "' trains nothing: under freeze rule ", micro::name(stage.freeze),
                      " for kind ", micro::name(stage.kind), ", trainable = [", c10::Join(", ", stage.trainable),
                      "] selects none of the ", parameter_names.size(), " parameters");
  }
}

void Curriculum::load_state(const CurriculumState& state) {
  TORCH_CHECK_VALUE(state.names == names() && state.steps == steps_, "this state belongs to a curriculum with stages [",
                    c10::Join(", ", state.names), "] of [", c10::Join(", ", state.steps),
                    "] steps; this one has stages [", c10::Join(", ", names()), "] of [", c10::Join(", ", steps_),
                    "] steps");
  const int64_t count = static_cast<int64_t>(stages_.size());
  const bool finished = state.stage == count && state.step == 0;
  const bool inside = state.stage >= 0 && state.stage < count && state.step >= 0 && state.step < steps_[state.stage];
  TORCH_CHECK_VALUE(finished || inside, "step ", state.step, " of stage ", state.stage,
                    " does not exist in this curriculum");
  stage_ = state.stage;
  step_ = state.step;
}

std::vector<std::string> Curriculum::names() const {
  std::vector<std::string> result;
  for (const Stage& stage : stages_) result.push_back(stage.name);
  return result;
}

// ---- published curricula -------------------------------------------------------------------------------------------

std::vector<Stage> published_stages(FreezeRule freeze, BlockKind kind, int64_t experts_per_token) {
  const bool r1 = freeze == FreezeRule::kR1;
  Stage experts{
      .name = "experts", .experts_per_token = 2, .route_by = RouteBy::kLabels, .freeze = freeze, .kind = kind};
  experts.trainable = r1 ? std::vector<std::string>{"experts"} : std::vector<std::string>{"model", "experts"};
  Stage router{
      .name = "router", .experts_per_token = 2, .trainable = {"experts-router"}, .freeze = freeze, .kind = kind};
  Stage end_to_end{
      .name = "end_to_end", .experts_per_token = r1 ? 1 : experts_per_token, .freeze = freeze, .kind = kind};
  return {experts, router, end_to_end};
}

// R1 reads "experts" as the experts of both kinds; R2 would train nothing here for "block".
std::vector<Stage> version_3_stages(BlockKind kind, int64_t experts_per_token) {
  Stage experts{.name = "experts",
                .experts_per_token = experts_per_token,
                .route_by = RouteBy::kLabels,
                .trainable = {"experts"},
                .freeze = FreezeRule::kR1,
                .kind = kind};
  Stage end_to_end{.name = "end_to_end", .experts_per_token = experts_per_token, .kind = kind};
  return {experts, end_to_end};
}

// ---- words ---------------------------------------------------------------------------------------------------------

const char* name(RouteBy value) { return word_of(kRouteBy, value); }
const char* name(FreezeRule value) { return word_of(kFreezeRules, value); }
const char* name(BlockKind value) { return word_of(kBlockKinds, value); }
const char* name(Schedule value) { return word_of(kSchedules, value); }
const char* name(AuxWindow value) { return word_of(kAuxWindows, value); }
RouteBy parse_route_by(const std::string& word) { return value_of("route_by", kRouteBy, word); }
FreezeRule parse_freeze_rule(const std::string& word) { return value_of("freeze", kFreezeRules, word); }
BlockKind parse_block_kind(const std::string& word) { return value_of("kind", kBlockKinds, word); }
Schedule parse_schedule(const std::string& word) { return value_of("schedule", kSchedules, word); }
AuxWindow parse_aux_window(const std::string& word) { return value_of("aux_window", kAuxWindows, word); }

}  // namespace micro
