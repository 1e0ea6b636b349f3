#include "engine/controls.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/isneginf.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstring>
#include <string>

namespace micro::engine {
namespace {

// The position of one token's entry in a control of axes [B|1, L|1, S|1, ...]; nullptr-free because axes are checked.
const char* entry(const at::Tensor& control, int64_t row, int64_t layer, int64_t slot) {
  const auto at = [&](int64_t axis, int64_t index) {
    return control.size(axis) == 1 ? 0 : index * control.stride(axis);
  };
  return static_cast<const char*>(control.const_data_ptr()) +
         (at(0, row) + at(1, layer) + at(2, slot)) * control.element_size();
}

void check_axes(const char* name, const at::Tensor& control, const at::IntArrayRef& sizes, const char* axes) {
  bool fits = control.dim() == static_cast<int64_t>(sizes.size());
  for (int64_t axis = 0; fits && axis < control.dim(); ++axis) {
    const bool free_axis = sizes[static_cast<size_t>(axis)] < 0;  // S: as many as the caller likes
    fits = control.size(axis) > 0 &&
           (free_axis || control.size(axis) == 1 || control.size(axis) == sizes[static_cast<size_t>(axis)]);
  }
  // The axis of experts may not be broadcast.
  if (fits && control.dim() == 4) fits = control.size(3) == sizes[3];
  TORCH_CHECK_VALUE(fits, "controls: ", name, " has shape ", control.sizes(), ", expected ", axes);
}

void set_to_one(at::Tensor& rows, int64_t index) {
  if (rows.scalar_type() == at::kDouble)
    rows.mutable_data_ptr<double>()[index] = 1;
  else
    rows.mutable_data_ptr<float>()[index] = 1;
}

std::string place(int64_t row, int64_t layer, int64_t slot) {
  return c10::str(" at row ", row, ", layer ", layer, ", slot ", slot);
}

}  // namespace

// ---- one phase -----------------------------------------------------------------------------------------------------

PreparedControls::PreparedControls(const Controls& controls, const ModelConfig& config, int64_t rows,
                                   at::ScalarType accumulator) {
  const int64_t layers = config.num_hidden_layers, experts = config.num_experts;
  const std::string four = c10::str("[", rows, "|1, ", layers, "|1, S|1, ", experts, "]");
  const std::string three = c10::str("[", rows, "|1, ", layers, "|1, S|1]"), two = c10::str("[", rows, "|1, S|1]");
  if (controls.ablate.defined()) {
    TORCH_CHECK_TYPE(controls.ablate.scalar_type() == at::kBool, "controls: ablate is ", controls.ablate.scalar_type(),
                     ", expected bool");
    check_axes("ablate", controls.ablate, {rows, layers, -1, experts}, four.c_str());
    ablate_ = controls.ablate.contiguous();
  }
  if (controls.bias.defined()) {
    check_axes("bias", controls.bias, {rows, layers, -1, experts}, four.c_str());
    read_bias(controls.bias, accumulator);
  }
  if (controls.force.defined()) {
    TORCH_CHECK_TYPE(at::isIntegralType(controls.force.scalar_type(), false), "controls: force is ",
                     controls.force.scalar_type(), ", expected int64");
    check_axes("force", controls.force, {rows, layers, -1}, three.c_str());
    TORCH_CHECK_VALUE(controls.force.ge(-1).logical_and(controls.force.lt(experts)).all().item<bool>(),
                      "controls: force holds an expert outside 0..", experts - 1, " (-1 = free)");
    force_ = controls.force.to(at::kInt).contiguous();
  }
  if (controls.labels.defined()) {
    TORCH_CHECK_TYPE(at::isIntegralType(controls.labels.scalar_type(), false), "controls: labels are ",
                     controls.labels.scalar_type(), ", expected int64");
    check_axes("labels", controls.labels, {rows, -1}, two.c_str());
    TORCH_CHECK_VALUE(!bias_.defined(), "controls: bias has no meaning where labels route");
    labels_ = controls.labels.clamp(-1, experts).to(at::kInt).contiguous();
  }
}

// A bias of -inf ablates.
void PreparedControls::read_bias(const at::Tensor& bias, at::ScalarType accumulator) {
  TORCH_CHECK_TYPE(bias.is_floating_point(), "controls: bias is ", bias.scalar_type(), ", expected float32 or float64");
  const at::Tensor gone = at::isneginf(bias);
  TORCH_CHECK_VALUE(bias.isfinite().logical_or(gone).all().item<bool>(),
                    "controls: bias holds +inf or NaN; -inf ablates, any other number is added to the logit");
  bias_ = bias.masked_fill(gone, 0).to(accumulator).contiguous();
  if (!gone.any().item<bool>()) return;
  ablate_ = ablate_.defined() ? ablate_.logical_or(gone).contiguous() : gone.contiguous();
}

bool PreparedControls::same_at_all_slots() const {
  const auto one = [](const at::Tensor& control, int64_t axis) {
    return !control.defined() || control.size(axis) == 1;
  };
  return one(ablate_, 2) && one(bias_, 2) && one(force_, 2) && one(labels_, 1);
}

// ---- one call ------------------------------------------------------------------------------------------------------

void BoundControls::bind(const PreparedControls& controls, const CallRows& call) {
  ablate_ = bias_ = force_ = rows_ = at::Tensor();
  labelled_ = controls.labels_.defined();
  if (controls.empty()) return;
  check(controls, call);
  if (labelled_) {
    rows_ = at::zeros({1, call.rows * call.slots, config_.num_experts}, accumulator_);
    const at::Tensor& labels = controls.labels_;
    for (int64_t b = 0, t = 0; b < call.rows; ++b)
      for (int64_t s = 0; s < call.slots; ++s, ++t) {
        const int64_t slot = labels.size(1) == 1 ? 0 : call.offsets[b] + s;
        const int64_t row = labels.size(0) == 1 ? 0 : call.origins[b];
        const int64_t label = s < call.counts[b] ? labels.const_data_ptr<int32_t>()[row * labels.size(1) + slot] : 0;
        set_to_one(rows_, t * config_.num_experts + label);
      }
    return;  // labels win; what they contradict was refused
  }
  const int64_t layers = config_.num_hidden_layers;
  if (controls.ablate_.defined()) ablate_ = spread(controls.ablate_, layers, call);
  if (controls.bias_.defined()) bias_ = spread(controls.bias_, layers, call);
  if (controls.force_.defined()) bind_force(controls, call);
}

// [L|1, T|1, ...] from [B|1, L|1, S|1, ...]; padded columns repeat the row's last one.
at::Tensor BoundControls::spread(const at::Tensor& control, int64_t layers, const CallRows& call) const {
  const bool one_token = control.size(0) == 1 && control.size(2) == 1;
  const int64_t tokens = one_token ? 1 : call.rows * call.slots, width = control.dim() == 4 ? control.size(3) : 1;
  const int64_t own_layers = control.size(1) == 1 ? 1 : layers;
  at::Tensor out = control.dim() == 4 ? at::empty({own_layers, tokens, width}, control.options())
                                      : at::empty({own_layers, tokens}, control.options());
  char* to = static_cast<char*>(out.mutable_data_ptr());
  const auto bytes = static_cast<size_t>(width * control.element_size());
  for (int64_t l = 0; l < own_layers; ++l)
    for (int64_t t = 0; t < tokens; ++t, to += bytes) {
      const int64_t b = t / call.slots, s = std::max<int64_t>(0, std::min<int64_t>(t % call.slots, call.counts[b] - 1));
      std::memcpy(to, entry(control, call.origins[b], l, call.offsets[b] + s), bytes);
    }
  return out;
}

// Layers in which every token is forced need no router: their rows are one-hot.
void BoundControls::bind_force(const PreparedControls& controls, const CallRows& call) {
  const int64_t layers = config_.num_hidden_layers, tokens = call.rows * call.slots;
  force_ = spread(controls.force_, layers, call);
  const int64_t own_layers = force_.size(0), own_tokens = force_.size(1);
  const auto* ids = force_.const_data_ptr<int32_t>();
  forced_.assign(static_cast<size_t>(layers), 0);
  bool any = false;
  for (int64_t l = 0; l < layers; ++l) {
    const int32_t* own = ids + (own_layers == 1 ? 0 : l * own_tokens);
    const bool all = std::all_of(own, own + own_tokens, [](int32_t id) { return id >= 0; });
    forced_[static_cast<size_t>(l)] = all;
    any = any || all;
  }
  if (!any) return;
  rows_ = at::zeros({own_layers, tokens, config_.num_experts}, accumulator_);
  for (int64_t l = 0; l < own_layers; ++l)
    for (int64_t t = 0; t < tokens && forced_[static_cast<size_t>(l)]; ++t)
      set_to_one(rows_, (l * tokens + t) * config_.num_experts + ids[l * own_tokens + (own_tokens == 1 ? 0 : t)]);
}

void BoundControls::apply(int64_t layer, micro_kernels::RouteParams& route) const {
  const int64_t experts = config_.num_experts;
  const auto pointer = [&](const at::Tensor& control) -> const void* {
    if (!control.defined()) return nullptr;
    const int64_t l = control.size(0) == 1 ? 0 : layer;
    return static_cast<const char*>(control.const_data_ptr()) + l * control.stride(0) * control.element_size();
  };
  const auto stride = [](const at::Tensor& control, int64_t width) {
    return control.defined() && control.size(1) > 1 ? width : 0;
  };
  route.rows = decided(layer) ? pointer(rows_) : nullptr;
  route.bias = pointer(bias_);
  route.ablate = static_cast<const bool*>(pointer(ablate_));
  route.force = static_cast<const int32_t*>(pointer(force_));
  route.bias_stride = stride(bias_, experts);
  route.ablate_stride = stride(ablate_, experts);
  route.force_stride = stride(force_, 1);
}

// ---- contradictions ------------------------------------------------------------------------------------------------

void BoundControls::check(const PreparedControls& controls, const CallRows& call) const {
  const int64_t experts = config_.num_experts, layers = config_.num_hidden_layers;
  const auto fits = [&](const at::Tensor& control, int64_t axis, int64_t slot) {
    return !control.defined() || control.size(axis) == 1 || slot < control.size(axis);
  };
  for (int64_t b = 0; b < call.rows; ++b)
    for (int64_t s = 0; s < call.counts[b]; ++s) {
      const int64_t slot = call.offsets[b] + s, row = call.origins[b];
      TORCH_CHECK_VALUE(fits(controls.ablate_, 2, slot) && fits(controls.bias_, 2, slot) &&
                            fits(controls.force_, 2, slot) && fits(controls.labels_, 1, slot),
                        "controls: the S axis ends before slot ", slot, " of row ", row,
                        "; it counts each row's new tokens, or is 1");
      int32_t label = -1;
      if (controls.labels_.defined()) {
        const at::Tensor& labels = controls.labels_;
        label = labels.const_data_ptr<int32_t>()[(labels.size(0) == 1 ? 0 : row) * labels.size(1) +
                                                 (labels.size(1) == 1 ? 0 : slot)];
        TORCH_CHECK_VALUE(label >= 0 && label < experts, "controls: a label lies outside 0..", experts - 1,
                          place(row, 0, slot));
      }
      if (!controls.ablate_.defined()) continue;
      const bool by_layer = controls.ablate_.size(1) > 1 || (controls.force_.defined() && controls.force_.size(1) > 1);
      for (int64_t l = 0; l < (by_layer ? layers : 1); ++l) {
        const auto* gone = reinterpret_cast<const bool*>(entry(controls.ablate_, row, l, slot));
        TORCH_CHECK_VALUE(!std::all_of(gone, gone + experts, [](bool g) { return g; }),
                          "controls: every expert is ablated", place(row, l, slot));
        int32_t asked = label;
        if (controls.force_.defined() && label < 0)
          asked = *reinterpret_cast<const int32_t*>(entry(controls.force_, row, l, slot));
        TORCH_CHECK_VALUE(asked < 0 || !gone[asked], "controls: the ", label >= 0 ? "labelled" : "forced",
                          " expert is ablated", place(row, l, slot));
      }
    }
}

}  // namespace micro::engine
