#include "micro/interventions.h"

#include <c10/util/Exception.h>
#include <pybind11/stl.h>

#include <map>
#include <string>
#include <utility>
#include <vector>

#include "bindings/module.h"
#include "bindings/tensors.h"
#include "micro/engine.h"

namespace {

using namespace py::literals;
using micro::Action;
using micro::Interventions;

template <class Enum>
Enum word(const py::dict& fields, const char* name, const std::map<std::string, Enum>& words) {
  const auto found = words.find(fields[name].cast<std::string>());
  TORCH_CHECK_VALUE(found != words.end(), "Interventions: there is no ", name, " '", std::string(py::str(fields[name])),
                    "'");
  return found->second;
}

micro::RowsSeen source_of(const py::object& source) {
  const auto part = [&](const char* name) { return from_python(source.attr(name)); };
  return {part("values"), part("layer"), part("expert"), part("row"), part("slot"), part("chosen")};
}

Action action_of(const py::dict& f) {
  using micro::ActionKind;
  using micro::Point;
  Action action;
  action.kind = word<ActionKind>(f, "kind",
                                 {{"read", ActionKind::kRead},
                                  {"moments", ActionKind::kMoments},
                                  {"zero", ActionKind::kZero},
                                  {"scale", ActionKind::kScale},
                                  {"shift", ActionKind::kShift},
                                  {"replace", ActionKind::kReplace},
                                  {"resample", ActionKind::kResample}});
  action.point = word<Point>(f, "point",
                             {{"residual", Point::kResidual},
                              {"router", Point::kRouter},
                              {"heads", Point::kHeads},
                              {"attention", Point::kAttention},
                              {"up", Point::kUp},
                              {"units", Point::kUnits},
                              {"ffn", Point::kFfn},
                              {"block_output", Point::kBlockOutput}});
  action.layers = f["layers"].cast<std::vector<int64_t>>();
  action.columns = from_python(f["columns"]);
  action.rows = f["rows"].cast<std::vector<int64_t>>();
  if (!f["range"].is_none()) {
    const auto [first, last, step] = f["range"].cast<std::tuple<int64_t, int64_t, int64_t>>();
    action.range = {first, last, step};
  }
  action.slots = from_python(f["slots"]);
  action.value = from_python(f["value"]);
  if (!f["source"].is_none()) action.source = source_of(f["source"]);
  action.seed = f["seed"].cast<uint64_t>();
  action.covariance = f["covariance"].cast<bool>();
  action.only_chosen = f["only_chosen"].cast<bool>();
  action.first_row = f["first_row"].cast<int64_t>();
  return action;
}

}  // namespace

void bind_interventions(py::module_& m) {
  py::class_<Interventions>(m, "Interventions",
                            "Actions for calls of the engine. micro.engine makes them of micro.interventions.")
      .def(py::init([](const micro::Engine& engine, const std::vector<py::dict>& given, bool all_experts) {
             std::vector<Action> actions;
             for (const py::dict& fields : given) actions.push_back(action_of(fields));
             return std::make_unique<Interventions>(engine.config(), std::move(actions), all_experts);
           }),
           "engine"_a, "actions"_a, py::kw_only(), "all_experts"_a = false)
      .def(
          "reading",
          [](const Interventions& table, int64_t action) {
            const micro::RowsSeen rows = table.reading(action);
            return py::make_tuple(to_python(rows.values), to_python(rows.layer), to_python(rows.expert),
                                  to_python(rows.row), to_python(rows.slot), to_python(rows.chosen));
          },
          "action"_a, "Of a read: values, layer, expert, row, slot, chosen.")
      .def(
          "moments",
          [](const Interventions& table, int64_t action) {
            const micro::MomentsSeen seen = table.moments(action);
            return py::make_tuple(to_python(seen.count), to_python(seen.mean), to_python(seen.m2),
                                  to_python(seen.scatter));
          },
          "action"_a, "Of moments: count, mean, m2, scatter or None.");
}
