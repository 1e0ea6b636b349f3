#include "micro/curriculum.h"

#include <c10/util/Exception.h>
#include <pybind11/native_enum.h>
#include <pybind11/stl.h>

#include <string>
#include <utility>
#include <variant>

#include "bindings/module.h"

namespace {

using micro::Curriculum;
using micro::CurriculumState;
using micro::FreezeRule;
using micro::Stage;

constexpr int kStateVersion = 1;

// FreezeRule.R1, or the word of a run file in any case.
using FreezeWord = std::variant<FreezeRule, std::string>;

FreezeRule freeze_rule(const FreezeWord& word) {
  if (const auto* rule = std::get_if<FreezeRule>(&word)) return *rule;
  std::string lower = std::get<std::string>(word);
  if (!lower.empty() && lower[0] == 'R') lower[0] = 'r';
  return micro::parse_freeze_rule(lower);
}

// ---- Stage ---------------------------------------------------------------------------------------------------------

Stage make_stage(std::string name, int64_t experts_per_token, const std::string& route_by,
                 std::vector<std::string> trainable, const FreezeWord& freeze, const std::string& kind,
                 double learning_rate, double warmup_ratio, const std::string& schedule, double min_ratio,
                 double weight_decay, std::pair<double, double> betas, double eps, double max_grad_norm,
                 std::map<std::string, double> loss_coefficients, const std::string& aux_window) {
  Stage stage{
      .name = std::move(name),
      .experts_per_token = experts_per_token,
      .route_by = micro::parse_route_by(route_by),
      .trainable = std::move(trainable),
      .freeze = freeze_rule(freeze),
      .kind = micro::parse_block_kind(kind),
      .learning_rate = learning_rate,
      .warmup_ratio = warmup_ratio,
      .schedule = micro::parse_schedule(schedule),
      .min_ratio = min_ratio,
      .weight_decay = weight_decay,
      .beta1 = betas.first,
      .beta2 = betas.second,
      .eps = eps,
      .max_grad_norm = max_grad_norm,
      .loss_coefficients = std::move(loss_coefficients),
      .aux_window = micro::parse_aux_window(aux_window),
  };
  stage.check();
  return stage;
}

// The arguments of Stage, by name: what a run writes down, and what Stage(**d) takes back.
py::dict stage_dict(const Stage& stage) {
  using namespace py::literals;
  return py::dict("name"_a = stage.name, "experts_per_token"_a = stage.experts_per_token,
                  "route_by"_a = micro::name(stage.route_by), "trainable"_a = stage.trainable,
                  "freeze"_a = micro::name(stage.freeze), "kind"_a = micro::name(stage.kind),
                  "learning_rate"_a = stage.learning_rate, "warmup_ratio"_a = stage.warmup_ratio,
                  "schedule"_a = micro::name(stage.schedule), "min_ratio"_a = stage.min_ratio,
                  "weight_decay"_a = stage.weight_decay, "betas"_a = std::vector<double>{stage.beta1, stage.beta2},
                  "eps"_a = stage.eps, "max_grad_norm"_a = stage.max_grad_norm,
                  "loss_coefficients"_a = stage.loss_coefficients, "aux_window"_a = micro::name(stage.aux_window));
}

void bind_stage(py::module_& m) {
  const Stage d;  // the defaults stand once, in the header
  py::class_<Stage>(m, "Stage",
                    "One stage of a curriculum: what learns, who routes, how fast (model.md 6.1, 6.2). Read-only.")
      .def(py::init(&make_stage), py::kw_only(), py::arg("name") = "",
           py::arg("experts_per_token") = d.experts_per_token, py::arg("route_by") = micro::name(d.route_by),
           py::arg("trainable") = d.trainable, py::arg("freeze") = micro::name(d.freeze),
           py::arg("kind") = micro::name(d.kind), py::arg("learning_rate") = d.learning_rate,
           py::arg("warmup_ratio") = d.warmup_ratio, py::arg("schedule") = micro::name(d.schedule),
           py::arg("min_ratio") = d.min_ratio, py::arg("weight_decay") = d.weight_decay,
           py::arg("betas") = std::pair(d.beta1, d.beta2), py::arg("eps") = d.eps,
           py::arg("max_grad_norm") = d.max_grad_norm, py::arg("loss_coefficients") = d.loss_coefficients,
           py::arg("aux_window") = micro::name(d.aux_window))
      .def_readonly("name", &Stage::name)
      .def_readonly("experts_per_token", &Stage::experts_per_token)
      .def_property_readonly("route_by", [](const Stage& s) { return micro::name(s.route_by); })
      .def_readonly("trainable", &Stage::trainable)
      .def_readonly("freeze", &Stage::freeze)
      .def_property_readonly("kind", [](const Stage& s) { return micro::name(s.kind); })
      .def_readonly("learning_rate", &Stage::learning_rate)
      .def_readonly("warmup_ratio", &Stage::warmup_ratio)
      .def_property_readonly("schedule", [](const Stage& s) { return micro::name(s.schedule); })
      .def_readonly("min_ratio", &Stage::min_ratio)
      .def_readonly("weight_decay", &Stage::weight_decay)
      .def_property_readonly("betas", [](const Stage& s) { return std::pair(s.beta1, s.beta2); })
      .def_readonly("eps", &Stage::eps)
      .def_readonly("max_grad_norm", &Stage::max_grad_norm)
      .def_readonly("loss_coefficients", &Stage::loss_coefficients)
      .def_property_readonly("aux_window", [](const Stage& s) { return micro::name(s.aux_window); })
      .def("learning_rate_at", &Stage::learning_rate_at, py::arg("step"), py::arg("steps"),
           "The rate of one step of so many; from `steps` on, the rate at the end.")
      .def("trains", &Stage::trains, py::arg("parameter_name"), "Whether a parameter learns, by its in-memory name.")
      .def("as_dict", &stage_dict, "The arguments of Stage, JSON-able: Stage(**stage.as_dict()) is the same stage.")
      .def("__repr__", [](const Stage& s) {
        return "Stage('" + s.name + "', K=" + std::to_string(s.experts_per_token) + ", route_by='" +
               micro::name(s.route_by) + "', freeze='" + micro::name(s.freeze) + "', kind='" + micro::name(s.kind) +
               "')";
      });
}

// ---- Curriculum ----------------------------------------------------------------------------------------------------

py::dict state_dict(const Curriculum& curriculum) {
  using namespace py::literals;
  const CurriculumState state = curriculum.state();
  return py::dict("version"_a = kStateVersion, "stage"_a = state.stage, "step"_a = state.step, "names"_a = state.names,
                  "steps"_a = state.steps);
}

template <class T>
T field(const py::dict& state, const char* key) {
  TORCH_CHECK_VALUE(state.contains(key), "a curriculum's state has version, stage, step, names and steps; '", key,
                    "' is missing");
  try {
    return state[key].cast<T>();
  } catch (const py::cast_error&) {
    TORCH_CHECK_VALUE(false, "a curriculum's state: '", key, "' cannot be ", std::string(py::repr(state[key])));
  }
}

void load_state_dict(Curriculum& curriculum, const py::dict& state) {
  const auto version = field<int64_t>(state, "version");
  TORCH_CHECK_VALUE(version == kStateVersion, "a curriculum's state of version ", version,
                    " was given; this is version ", kStateVersion);
  curriculum.load_state({.stage = field<int64_t>(state, "stage"),
                         .step = field<int64_t>(state, "step"),
                         .names = field<std::vector<std::string>>(state, "names"),
                         .steps = field<std::vector<int64_t>>(state, "steps")});
}

Curriculum published(std::vector<int64_t> steps, const FreezeWord& freeze, const std::string& kind,
                     int64_t experts_per_token) {
  return {micro::published_stages(freeze_rule(freeze), micro::parse_block_kind(kind), experts_per_token),
          std::move(steps)};
}

Curriculum version_3(std::vector<int64_t> steps, const std::string& kind, int64_t experts_per_token) {
  return {micro::version_3_stages(micro::parse_block_kind(kind), experts_per_token), std::move(steps)};
}

void bind_class(py::module_& m) {
  py::class_<Curriculum>(m, "Curriculum", "Stages, one after the other; the same object that C++ trainers use.")
      .def(py::init<std::vector<Stage>, std::vector<int64_t>>(), py::arg("stages"), py::arg("steps"))
      .def_static("published", &published, py::arg("steps"), py::kw_only(), py::arg("freeze") = "r2",
                  py::arg("kind") = "block", py::arg("experts_per_token") = 1,
                  "The published three stages: experts by labels, routers, everything (model.md 6.1).")
      .def_static("version_3", &version_3, py::arg("steps"), py::kw_only(), py::arg("kind") = "block",
                  py::arg("experts_per_token") = 4, "Experts alone by labels, then everything (model.md 6.5).")
      .def_property_readonly("stages", &Curriculum::stages)
      .def_property_readonly("steps", &Curriculum::steps)
      .def_property_readonly("stage", &Curriculum::stage, "Index of the stage; the number of stages when done.")
      .def_property_readonly("step", &Curriculum::step, "Step within the stage.")
      .def_property_readonly("done", &Curriculum::done)
      .def_property_readonly("current", &Curriculum::current, py::return_value_policy::copy, "The stage itself.")
      .def("learning_rate", &Curriculum::learning_rate)
      .def("experts_per_token", &Curriculum::experts_per_token)
      .def("route_by", [](const Curriculum& c) { return micro::name(c.route_by()); })
      .def("trainable", &Curriculum::trainable, py::arg("parameter_name"))
      .def("loss_coefficients", &Curriculum::loss_coefficients)
      .def("advance", &Curriculum::advance, "One optimizer step.")
      .def("check", &Curriculum::check, py::arg("parameter_names"),
           "ValueError for the first stage that would train none of these parameters.")
      .def("state_dict", &state_dict, "The place in the curriculum, JSON-able.")
      .def("load_state_dict", &load_state_dict, py::arg("state"))
      .def("__repr__", [](const Curriculum& c) {
        return "Curriculum(stage " + std::to_string(c.stage()) + " of " + std::to_string(c.stages().size()) +
               ", step " + std::to_string(c.step()) + ")";
      });
}

}  // namespace

void bind_curriculum(py::module_& m) {
  py::native_enum<FreezeRule>(m, "FreezeRule", "enum.Enum",
                              "The two published readings of a run file's trainable list.")
      .value("R1", FreezeRule::kR1)
      .value("R2", FreezeRule::kR2)
      .finalize();
  bind_stage(m);
  bind_class(m);
}
