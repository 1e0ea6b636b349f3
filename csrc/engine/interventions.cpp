#include "engine/interventions.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/full.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <string>
#include <utility>

#include "micro/moments.h"
#include "micro_kernels/intervene.h"
#include "ops/common.h"

namespace micro {
namespace engine {
namespace {

using micro_kernels::BlockPoint;
using micro_kernels::BlockRows;
using micro_kernels::DType;

constexpr char kName[] = "Interventions";

at::ScalarType scalar_type(DType dtype) {
  return dtype == DType::kFloat64 ? at::kDouble : dtype == DType::kBFloat16 ? at::kBFloat16 : at::kFloat;
}

Point point_of(BlockPoint point) {
  switch (point) {
    case BlockPoint::kRouter:
      return Point::kRouter;
    case BlockPoint::kHeads:
      return Point::kHeads;
    case BlockPoint::kAttention:
      return Point::kAttention;
    case BlockPoint::kUp:
      return Point::kUp;
    case BlockPoint::kUnits:
      return Point::kUnits;
    case BlockPoint::kFfn:
      return Point::kFfn;
    case BlockPoint::kBlockOutput:
      break;
  }
  return Point::kBlockOutput;
}

constexpr BlockPoint kBlockPoints[] = {BlockPoint::kRouter,     BlockPoint::kHeads, BlockPoint::kAttention,
                                       BlockPoint::kUp,         BlockPoint::kUnits, BlockPoint::kFfn,
                                       BlockPoint::kBlockOutput};

bool takes_value(ActionKind kind) {
  return kind == ActionKind::kScale || kind == ActionKind::kShift || kind == ActionKind::kReplace;
}

std::string place_key(int64_t layer, int64_t expert, int64_t row, int64_t slot) {
  const std::array<int64_t, 4> place{layer, expert, row, slot};
  return std::string(reinterpret_cast<const char*>(place.data()), sizeof(place));
}

// Steele, Lea, Flood 2014 (SplitMix64): one step.
uint64_t mixed(uint64_t z) {
  z += 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

int64_t drawn(uint64_t seed, std::array<int64_t, 4> place, size_t count) {
  uint64_t state = mixed(seed);
  for (const int64_t part : place) state = mixed(state ^ static_cast<uint64_t>(part));
  const double uniform = static_cast<double>(state >> 11) * 0x1p-53;
  return static_cast<int64_t>(std::floor(uniform * static_cast<double>(count)));
}

std::string name_of(size_t number) { return std::string(kName) + ": action " + std::to_string(number); }

at::Tensor layer_of(const at::Tensor& table, int64_t layer) {
  return table.select(0, std::min(layer, table.size(0) - 1));
}

}  // namespace

// ---- making --------------------------------------------------------------------------------------------------------

ActionTable::ActionTable(const ModelConfig& config, std::vector<Action> actions, bool all_experts)
    : config_(config), all_experts_(all_experts) {
  for (size_t i = 0; i < actions.size(); ++i) {
    Bound bound;
    bound.action = std::move(actions[i]);
    check(bound, i);
    prepare(bound, i);
    bound_.push_back(std::move(bound));
  }
}

int64_t ActionTable::depth(Point point) const { return config_.num_hidden_layers + (point == Point::kResidual); }

int64_t ActionTable::width(Point point) const {
  switch (point) {
    case Point::kRouter:
      return config_.num_experts;
    case Point::kHeads:
      return config_.num_attention_heads * config_.head_dim;
    case Point::kUp:
    case Point::kUnits:
      return config_.intermediate_size;
    case Point::kResidual:
    case Point::kAttention:
    case Point::kFfn:
    case Point::kBlockOutput:
      break;
  }
  return config_.hidden_size;
}

bool ActionTable::routed(Point point) const {
  const bool attention = point == Point::kHeads || point == Point::kAttention;
  return point != Point::kResidual && point != Point::kRouter && (!attention || config_.is_block());
}

int64_t ActionTable::axis(Point point) const { return routed(point) ? config_.num_experts : 1; }

void ActionTable::check(const Bound& bound, size_t number) const {
  const Action& a = bound.action;
  const std::string name = name_of(number);
  const int64_t layers = depth(a.point), experts = axis(a.point), columns = width(a.point);
  for (const int64_t layer : a.layers)
    TORCH_CHECK_VALUE(layer >= 0 && layer < layers, name, ": layer ", layer, " does not exist, expected 0..",
                      layers - 1);
  if (a.columns.defined()) {
    TORCH_CHECK_TYPE(a.columns.scalar_type() == at::kBool, name, ": columns must be bool, got ",
                     a.columns.scalar_type());
    TORCH_CHECK_VALUE(a.columns.dim() == 3 && (a.columns.size(0) == 1 || a.columns.size(0) == layers) &&
                          a.columns.size(1) == experts && a.columns.size(2) == columns,
                      name, ": columns has shape ", a.columns.sizes(), ", expected [", layers, " or 1, ", experts, ", ",
                      columns, "]");
  }
  const bool needs_source = a.kind == ActionKind::kResample || (a.kind == ActionKind::kReplace && a.source);
  TORCH_CHECK_VALUE(a.source.has_value() == needs_source, name, ": a source goes with replace and resample");
  TORCH_CHECK_VALUE(a.value.defined() == (takes_value(a.kind) && !a.source), name,
                    ": scale, shift and replace need a value (replace: or a source), other actions none");
  if (a.value.defined())
    TORCH_CHECK_VALUE(a.value.dim() == 3 && (a.value.size(0) == 1 || a.value.size(0) == layers) &&
                          (a.value.size(1) == 1 || a.value.size(1) == experts) &&
                          (a.value.size(2) == 1 || a.value.size(2) == columns),
                      name, ": a value of shape ", a.value.sizes(), " does not fit [", layers, ", ", experts, ", ",
                      columns, "]");
  if (a.source)
    TORCH_CHECK_VALUE(a.source->values.dim() == 2 && a.source->values.size(1) == columns, name,
                      ": the source has rows of shape ", a.source->values.sizes(), ", expected all ", columns,
                      " columns: read it without units and heads");
  if (a.slots.defined())
    TORCH_CHECK_VALUE(a.slots.dim() == 2 && a.slots.scalar_type() == at::kBool, name, ": slots must be bool [B, S]");
  if (a.range)
    TORCH_CHECK_VALUE(a.range->first >= 0 && a.range->step >= 1, name,
                      ": a range of slots has a first of at least 0 and a step of at least 1");
}

void ActionTable::prepare(Bound& bound, size_t number) const {
  Action& a = bound.action;
  bound.layers.assign(static_cast<size_t>(depth(a.point)), a.layers.empty() && !a.source);
  for (const int64_t layer : a.layers) bound.layers[static_cast<size_t>(layer)] = true;
  a.columns = a.columns.defined() ? a.columns.contiguous() : a.columns;
  a.slots = a.slots.defined() ? a.slots.contiguous() : a.slots;
  bound.value = a.source ? a.source->values.contiguous() : a.value.defined() ? a.value.contiguous() : at::Tensor();
  if (a.kind == ActionKind::kRead && a.columns.defined())
    for (int64_t l = 0; l < a.columns.size(0); ++l) {
      const at::Tensor named = a.columns[l].index_select(0, a.columns[l].any(1).nonzero().select(1, 0));
      TORCH_CHECK_VALUE(named.size(0) == 0 || named.eq(named.narrow(0, 0, 1)).all().item<bool>(), name_of(number),
                        ": a read must name the same columns for every expert");
    }
  if (a.kind == ActionKind::kMoments) {
    const auto zeros = [&](std::vector<int64_t> sizes) {
      sizes.insert(sizes.begin(), {depth(a.point), axis(a.point)});
      return at::zeros(sizes, at::kDouble);
    };
    const int64_t w = width(a.point);
    bound.moments = {zeros({}), zeros({w}), zeros({w}), a.covariance ? zeros({w, w}) : at::Tensor()};
  }
  if (!a.source) return;
  const auto list = [](const at::Tensor& t) { return t.to(at::kLong).contiguous(); };
  const at::Tensor layer = list(a.source->layer), expert = list(a.source->expert), row = list(a.source->row);
  const at::Tensor slot = list(a.source->slot);
  for (int64_t i = 0; i < layer.numel(); ++i) {
    const int64_t l = layer.const_data_ptr<int64_t>()[i], e = expert.const_data_ptr<int64_t>()[i];
    TORCH_CHECK_VALUE(l >= 0 && l < depth(a.point), name_of(number), ": the source holds rows of layer ", l);
    if (a.layers.empty()) bound.layers[static_cast<size_t>(l)] = true;
    if (a.kind == ActionKind::kResample)
      bound.source.of_expert[l * (config_.num_experts + 1) + e + 1].push_back(i);
    else
      bound.source.places[place_key(l, e, row.const_data_ptr<int64_t>()[i], slot.const_data_ptr<int64_t>()[i])] = i;
  }
}

void ActionTable::check_fits(const ModelConfig& c) const {
  const auto sizes = [](const ModelConfig& m) {
    return std::array<int64_t, 6>{
        m.num_hidden_layers, m.num_experts, m.hidden_size, m.intermediate_size, m.num_attention_heads * m.head_dim,
        m.is_block()};
  };
  TORCH_CHECK_VALUE(sizes(c) == sizes(config_), kName,
                    ": this table was made for a model of other sizes than the engine's");
}

// ---- one pass ------------------------------------------------------------------------------------------------------

uint32_t ActionTable::points(int64_t layer) const {
  uint32_t points = 0;
  for (const Bound& bound : bound_)
    for (const BlockPoint point : kBlockPoints)
      if (bound.action.point == point_of(point) && bound.layers[static_cast<size_t>(layer)])
        points |= uint32_t{1} << static_cast<int>(point);
  return points;
}

bool ActionTable::all_experts(int64_t layer) const {
  return all_experts_ && std::any_of(bound_.begin(), bound_.end(), [&](const Bound& bound) {
           return routed(bound.action.point) && bound.layers[static_cast<size_t>(layer)];
         });
}

void ActionTable::meet(int64_t layer, const BlockRows& rows) { run(point_of(rows.point), locate(layer, rows)); }

void ActionTable::meet_residual(int64_t layer, void* rows, DType dtype) {
  if (std::none_of(bound_.begin(), bound_.end(), [&](const Bound& bound) {
        return bound.action.point == Point::kResidual && bound.layers[static_cast<size_t>(layer)];
      }))
    return;
  run(Point::kResidual, locate(layer, {.point = BlockPoint::kRouter,
                                       .rows = rows,
                                       .tokens = nullptr,
                                       .experts = nullptr,
                                       .count = pass_.rows * pass_.slots,
                                       .width = config_.hidden_size,
                                       .dtype = dtype}));
}

ActionTable::Rows ActionTable::locate(int64_t layer, const BlockRows& given) const {
  Rows rows{.layer = layer,
            .data = static_cast<char*>(given.rows),
            .tokens = given.tokens,
            .experts = given.experts,
            .chosen = given.chosen,
            .count = given.count,
            .width = given.width,
            .dtype = given.dtype,
            .row = {},
            .slot = {}};
  rows.row.resize(static_cast<size_t>(given.count));
  rows.slot.resize(static_cast<size_t>(given.count));
  for (int64_t n = 0; n < given.count; ++n) {
    const int64_t token = given.tokens ? given.tokens[n] : n, b = token / pass_.slots, s = token % pass_.slots;
    const bool real = s < pass_.counts[b];
    rows.row[static_cast<size_t>(n)] = real ? pass_.origins[b] : -1;
    rows.slot[static_cast<size_t>(n)] = pass_.starts[b] + s;
  }
  return rows;
}

void ActionTable::run(Point point, const Rows& rows) {
  for (Bound& bound : bound_) {
    if (bound.action.point != point || !bound.layers[static_cast<size_t>(rows.layer)]) continue;
    const std::vector<uint8_t> chosen = touched(bound, rows);
    switch (bound.action.kind) {
      case ActionKind::kRead:
        read(bound, rows, chosen);
        break;
      case ActionKind::kMoments: {
        const auto at_layer = [&](const at::Tensor& t) { return t.defined() ? t.select(0, rows.layer) : t; };
        at::Tensor count = at_layer(bound.moments.count), mean = at_layer(bound.moments.mean);
        at::Tensor m2 = at_layer(bound.moments.m2), scatter = at_layer(bound.moments.scatter);
        const at::Tensor taken = at::from_blob(const_cast<uint8_t*>(chosen.data()), {rows.count}, at::kBool);
        const OptionalTensor experts =
            rows.experts ? OptionalTensor(at::from_blob(const_cast<int32_t*>(rows.experts), {rows.count}, at::kInt))
                         : std::nullopt;
        moments_(wrap(rows), count, mean, m2, scatter.defined() ? OptionalTensor(scatter) : std::nullopt, taken,
                 experts);
        break;
      }
      default:
        change(bound, rows, chosen);
    }
  }
}

at::Tensor ActionTable::wrap(const Rows& rows) const {
  return at::from_blob(rows.data, {rows.count, rows.width}, at::TensorOptions(scalar_type(rows.dtype)));
}

// 1 for the rows that an action means. bool arrays are bytes: vector<bool> is not one.
std::vector<uint8_t> ActionTable::touched(const Bound& bound, const Rows& rows) const {
  const Action& a = bound.action;
  std::vector<uint8_t> out(static_cast<size_t>(rows.count));
  for (size_t n = 0; n < out.size(); ++n) {
    const int64_t row = rows.row[n], slot = rows.slot[n];
    bool wanted = row >= 0 && (!a.only_chosen || rows.is_chosen(n));
    if (wanted && !a.rows.empty()) wanted = std::find(a.rows.begin(), a.rows.end(), row) != a.rows.end();
    if (wanted && a.range)
      wanted = slot >= a.range->first && slot < a.range->last && (slot - a.range->first) % a.range->step == 0;
    if (wanted && a.slots.defined()) {
      TORCH_CHECK_VALUE(a.slots.size(0) == 1 || row < a.slots.size(0), kName, ": slots has ", a.slots.size(0),
                        " rows, the call has more");
      const int64_t line = a.slots.size(0) == 1 ? 0 : row;
      wanted = slot < a.slots.size(1) && a.slots.const_data_ptr<bool>()[line * a.slots.size(1) + slot];
    }
    out[n] = wanted;
  }
  return out;
}

// Experts (or the one of token rows) of which a column is named.
std::vector<bool> ActionTable::named_experts(const Action& action, int64_t layer) const {
  std::vector<bool> named(static_cast<size_t>(axis(action.point)), true);
  if (!action.columns.defined()) return named;
  const at::Tensor any = layer_of(action.columns, layer).any(1);
  for (int64_t e = 0; e < any.numel(); ++e) named[static_cast<size_t>(e)] = any.const_data_ptr<bool>()[e];
  return named;
}

void ActionTable::read(Bound& bound, const Rows& rows, const std::vector<uint8_t>& touched) const {
  const std::vector<bool> named = named_experts(bound.action, rows.layer);
  at::Tensor columns;
  if (bound.action.columns.defined())
    columns = layer_of(bound.action.columns, rows.layer).any(0).nonzero().select(1, 0);
  std::vector<int64_t> index, expert, row, slot, chosen;
  for (size_t n = 0; n < touched.size(); ++n) {
    const int64_t e = rows.experts ? rows.experts[n] : -1;
    if (!touched[n] || !named[static_cast<size_t>(std::max<int64_t>(e, 0))]) continue;
    index.push_back(static_cast<int64_t>(n));
    expert.push_back(e);
    row.push_back(rows.row[n]);
    slot.push_back(rows.slot[n]);
    chosen.push_back(rows.is_chosen(n));
  }
  if (index.empty()) return;
  const auto list = [](const std::vector<int64_t>& values) { return at::tensor(values, at::kLong); };
  at::Tensor values = wrap(rows).index_select(0, list(index));
  if (columns.defined()) values = values.index_select(1, columns);
  bound.seen.push_back({values, at::full({values.size(0)}, rows.layer, at::kLong), list(expert), list(row), list(slot),
                        list(chosen).to(at::kBool)});
}

std::vector<int64_t> ActionTable::source_rows(const Bound& bound, const Rows& rows,
                                              const std::vector<uint8_t>& touched) const {
  const bool random = bound.action.kind == ActionKind::kResample;
  std::vector<int64_t> index(touched.size(), 0);
  for (size_t n = 0; n < touched.size(); ++n) {
    if (!touched[n]) continue;
    const int64_t e = rows.experts ? rows.experts[n] : -1, row = rows.row[n] - bound.action.first_row;
    bool found;
    if (random) {
      const auto pool = bound.source.of_expert.find(rows.layer * (config_.num_experts + 1) + e + 1);
      found = pool != bound.source.of_expert.end();
      if (found)
        index[n] = pool->second[static_cast<size_t>(
            drawn(bound.action.seed, {rows.layer, e, row, rows.slot[n]}, pool->second.size()))];
    } else {
      const auto place = bound.source.places.find(place_key(rows.layer, e, row, rows.slot[n]));
      found = place != bound.source.places.end();
      if (found) index[n] = place->second;
    }
    TORCH_CHECK_VALUE(found, kName, ": the source holds no row of layer ", rows.layer,
                      " for some of the rows to be changed (expert ", e, ", row ", row, ", slot ", rows.slot[n], ")");
  }
  return index;
}

void ActionTable::change(Bound& bound, const Rows& rows, std::vector<uint8_t> touched) const {
  const Action& a = bound.action;
  const std::vector<bool> named = named_experts(a, rows.layer);
  for (size_t n = 0; n < touched.size(); ++n)
    touched[n] = touched[n] && named[static_cast<size_t>(rows.experts ? rows.experts[n] : 0)];
  if (std::find(touched.begin(), touched.end(), uint8_t{1}) == touched.end()) return;
  if (bound.value.defined() && bound.value.scalar_type() != scalar_type(rows.dtype))
    bound.value = (a.source ? a.source->values : a.value).to(scalar_type(rows.dtype)).contiguous();
  const at::Tensor columns = a.columns.defined() ? layer_of(a.columns, rows.layer) : at::Tensor();
  const at::Tensor value = !bound.value.defined() || a.source ? bound.value : layer_of(bound.value, rows.layer);
  const std::vector<int64_t> index = a.source ? source_rows(bound, rows, touched) : std::vector<int64_t>{};
  using micro_kernels::Change;
  const Change change = a.kind == ActionKind::kZero    ? Change::kZero
                        : a.kind == ActionKind::kScale ? Change::kScale
                        : a.kind == ActionKind::kShift ? Change::kShift
                                                       : Change::kReplace;
  const micro_kernels::InterveneParams params{
      .x = rows.data,
      .y = rows.data,
      .touched = reinterpret_cast<const bool*>(touched.data()),
      .expert = rows.experts,
      .columns = columns.defined() ? columns.const_data_ptr<bool>() : nullptr,
      .value = value.defined() ? value.const_data_ptr() : nullptr,
      .index = a.source ? index.data() : nullptr,
      .rows = rows.count,
      .width = rows.width,
      .experts = axis(a.point),
      .value_rows = value.defined() ? value.size(0) : 0,
      .value_width = value.defined() ? value.size(1) : 0,
      .change = change,
      .dtype = rows.dtype,
  };
  micro::check(kName, micro_kernels::cpu::intervene(params, parallel_for));
}

// ---- what came back ------------------------------------------------------------------------------------------------

RowsSeen ActionTable::reading(int64_t action) const {
  TORCH_CHECK_INDEX(action >= 0 && action < static_cast<int64_t>(bound_.size()) &&
                        bound_[static_cast<size_t>(action)].action.kind == ActionKind::kRead,
                    kName, ": action ", action, " reads nothing");
  const Bound& bound = bound_[static_cast<size_t>(action)];
  if (bound.seen.empty()) {
    const at::Tensor none = at::empty({0}, at::kLong);
    return {at::empty({0, width(bound.action.point)}), none, none, none, none, none.to(at::kBool)};
  }
  const auto joined = [&](at::Tensor RowsSeen::*part) {
    std::vector<at::Tensor> parts;
    for (const RowsSeen& seen : bound.seen) parts.push_back(seen.*part);
    return at::cat(parts);
  };
  return {joined(&RowsSeen::values), joined(&RowsSeen::layer), joined(&RowsSeen::expert),
          joined(&RowsSeen::row),    joined(&RowsSeen::slot),  joined(&RowsSeen::chosen)};
}

MomentsSeen ActionTable::moments(int64_t action) const {
  TORCH_CHECK_INDEX(action >= 0 && action < static_cast<int64_t>(bound_.size()) &&
                        bound_[static_cast<size_t>(action)].action.kind == ActionKind::kMoments,
                    kName, ": action ", action, " keeps no moments");
  const MomentsSeen& m = bound_[static_cast<size_t>(action)].moments;
  return {m.count.clone(), m.mean.clone(), m.m2.clone(), m.scatter.defined() ? m.scatter.clone() : at::Tensor()};
}

}  // namespace engine

Interventions::Interventions(const ModelConfig& config, std::vector<Action> actions, bool all_experts)
    : table_(std::make_unique<engine::ActionTable>(config, std::move(actions), all_experts)) {}
Interventions::Interventions(Interventions&&) noexcept = default;
Interventions& Interventions::operator=(Interventions&&) noexcept = default;
Interventions::~Interventions() = default;
RowsSeen Interventions::reading(int64_t action) const { return table_->reading(action); }
MomentsSeen Interventions::moments(int64_t action) const { return table_->moments(action); }

}  // namespace micro
