#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace micro {

// Who decides the expert of a token.
enum class RouteBy { kLabels, kRouter };

// The two published readings of a run file's `trainable` list (model.md 6.1).
enum class FreezeRule { kR1, kR2 };

// "block": whole blocks are experts (MoB, MiCRo). "ffn": attention and norms are shared (MoE, MiCRo-MoE).
enum class BlockKind { kBlock, kFfn };

// The learning rate after its linear warm-up.
enum class Schedule { kCosine, kLinear, kConstant };

// How auxiliary losses of the micro-batches of one optimizer step are joined (model.md 7.2).
enum class AuxWindow { kMean, kSum };

// One stage of a curriculum (model.md 6.1, 6.2): what learns, who routes, how fast. The defaults are the published
// ones.
//
// `trainable` holds the run files' words "model", "experts" (or "reasoners") and "experts-router"; `freeze` and `kind`
// give them their meaning:
//
//   rule, kind   experts learn with          routers learn with   the rest learns with
//   R1           "experts" or "model"        "experts-router"     "model"
//   R2, block    "model"                     "experts-router"     "model"
//   R2, ffn      "experts"                   "experts-router"     "model"
struct Stage {
  std::string name = {};
  int64_t experts_per_token = 1;
  RouteBy route_by = RouteBy::kRouter;
  std::vector<std::string> trainable = {"model", "experts", "experts-router"};
  FreezeRule freeze = FreezeRule::kR2;
  BlockKind kind = BlockKind::kBlock;
  double learning_rate = 2e-5;
  double warmup_ratio = 0.03;
  Schedule schedule = Schedule::kCosine;
  double min_ratio = 0.0;  // the rate at the end, as a share of learning_rate
  double weight_decay = 0.01;
  double beta1 = 0.9;
  double beta2 = 0.999;
  double eps = 1e-8;
  double max_grad_norm = 1.0;                            // 0: no clipping
  std::map<std::string, double> loss_coefficients = {};  // load_balancing_loss, z_loss, label_loss, entropy
  AuxWindow aux_window = AuxWindow::kMean;

  // Throws ValueError that names the stage, the field, its value and what was expected.
  void check() const;

  // The rate of step n of N (model.md 6.2): with W = ceil(warmup_ratio N), n/W of learning_rate for n < W, then the
  // schedule; the first step has rate 0 unless there is no warm-up. From n = N on, the rate at the end.
  double learning_rate_at(int64_t step, int64_t steps) const;

  // Whether a parameter learns, by its in-memory name (interface.md 2) with or without a prefix such as "model.":
  // "layers.3.blocks.q_proj.weight" is an expert's, "layers.3.router.in_proj.weight" a router's.
  bool trains(const std::string& parameter_name) const;
};

// A place in a curriculum, and enough of its shape to refuse another one's.
struct CurriculumState {
  int64_t stage = 0;
  int64_t step = 0;
  std::vector<std::string> names = {};
  std::vector<int64_t> steps = {};
};

// Stages, one after the other; one source of truth for C++ and Python trainers.
//
//   micro::Curriculum curriculum(micro::published_stages(), {200, 200, 30000});
//   for (; !curriculum.done(); curriculum.advance()) { ... one optimizer step at curriculum.learning_rate() ... }
//
// Every stage is a fresh run: a new optimizer and a new schedule (model.md 6.1). Not for use by two threads at once.
class Curriculum {
 public:
  // steps: optimizer steps of each stage, at least 1. Throws ValueError.
  Curriculum(std::vector<Stage> stages, std::vector<int64_t> steps);

  const std::vector<Stage>& stages() const { return stages_; }
  const std::vector<int64_t>& steps() const { return steps_; }

  int64_t stage() const { return stage_; }  // index; the number of stages when done
  int64_t step() const { return step_; }    // within the stage
  bool done() const { return stage_ == static_cast<int64_t>(stages_.size()); }

  // Of the current stage and step. Throw ValueError when done.
  const Stage& current() const;
  double learning_rate() const;
  int64_t experts_per_token() const { return current().experts_per_token; }
  RouteBy route_by() const { return current().route_by; }
  const std::map<std::string, double>& loss_coefficients() const { return current().loss_coefficients; }
  bool trainable(const std::string& parameter_name) const { return current().trains(parameter_name); }

  // One optimizer step. Throws ValueError when done.
  void advance();

  // Throws ValueError that names the first stage that would train none of these parameters.
  void check(const std::vector<std::string>& parameter_names) const;

  CurriculumState state() const { return {stage_, step_, names(), steps_}; }
  // Throws ValueError when the state belongs to another curriculum or lies outside this one; then nothing changes.
  void load_state(const CurriculumState& state);

 private:
  std::vector<std::string> names() const;

  std::vector<Stage> stages_;
  std::vector<int64_t> steps_;
  int64_t stage_ = 0;
  int64_t step_ = 0;
};

// The published three stages: induce the experts by labels, calibrate the routers, train everything end to end.
// experts_per_token: of the last stage; R1 always took 1.
std::vector<Stage> published_stages(FreezeRule freeze = FreezeRule::kR2, BlockKind kind = BlockKind::kBlock,
                                    int64_t experts_per_token = 1);

// The version 3 curriculum (model.md 6.5): experts alone by labels, then everything, both with K experts per token.
// As its table means it: the first stage trains the experts, whatever the class.
std::vector<Stage> version_3_stages(BlockKind kind = BlockKind::kBlock, int64_t experts_per_token = 4);

// The words of run files and of Python. Parsing throws ValueError that lists what is known.
const char* name(RouteBy value);
const char* name(FreezeRule value);
const char* name(BlockKind value);
const char* name(Schedule value);
const char* name(AuxWindow value);
RouteBy parse_route_by(const std::string& word);
FreezeRule parse_freeze_rule(const std::string& word);
BlockKind parse_block_kind(const std::string& word);
Schedule parse_schedule(const std::string& word);
AuxWindow parse_aux_window(const std::string& word);

}  // namespace micro
