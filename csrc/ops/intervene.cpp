#include "micro/intervene.h"

#include <ATen/autocast_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <string>
#include <string_view>
#include <tuple>

#include "micro_kernels/intervene.h"
#include "ops/arguments.h"
#include "ops/common.h"

namespace micro {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr char kName[] = "micro::intervene";

// Where the rows are changed, and by what.
struct Where {
  OptionalTensor touched, experts, columns, value, index;

  Where contiguous() const {
    return {micro::contiguous(touched), micro::contiguous(experts), micro::contiguous(columns),
            micro::contiguous(value), micro::contiguous(index)};
  }
};

micro_kernels::Change kernel_change(std::string_view change) {
  if (change == "zero") return micro_kernels::Change::kZero;
  if (change == "scale") return micro_kernels::Change::kScale;
  if (change == "shift") return micro_kernels::Change::kShift;
  TORCH_CHECK_VALUE(change == "replace", kName, ": change is '", change,
                    "', expected 'zero', 'scale', 'shift' or 'replace'");
  return micro_kernels::Change::kReplace;
}

const char* word(Change change) {
  switch (change) {
    case Change::kZero:
      return "zero";
    case Change::kScale:
      return "scale";
    case Change::kShift:
      return "shift";
    case Change::kReplace:
      break;
  }
  return "replace";
}

void check_rows(const char* name, const OptionalTensor& tensor, at::ScalarType type, const Tensor& x) {
  if (!tensor) return;
  const Argument argument{kName, name, *tensor};
  argument.is(type);
  argument.has_sizes({x.sym_size(0)});
  argument.is_beside("x", x);
}

void check_arguments(const Tensor& x, std::string_view change, const Where& w) {
  kernel_dtype(kName, x);
  Argument{kName, "x", x}.has_dims(2, "[N, W]");
  check_rows("touched", w.touched, at::kBool, x);
  check_rows("experts", w.experts, at::kInt, x);
  check_rows("index", w.index, at::kLong, x);
  if (w.columns) {
    const Argument argument{kName, "columns", *w.columns};
    argument.is(at::kBool);
    argument.has_dims(2, "[E', W]");
    argument.has_sizes({w.columns->sym_size(0), x.sym_size(1)});
    argument.is_beside("x", x);
  }
  const bool zero = kernel_change(change) == micro_kernels::Change::kZero;
  TORCH_CHECK_VALUE(zero != w.value.has_value(), kName, ": value must ", zero ? "not be given to zero" : "be given");
  TORCH_CHECK_VALUE(w.value || !w.index, kName, ": index names rows of value, which is not given");
  if (!w.value) return;
  const Argument argument{kName, "value", *w.value};
  argument.is(x.scalar_type());
  argument.has_dims(2, "[R, W] or [R, 1]");
  if (!TORCH_GUARD_OR_FALSE(w.value->sym_size(1).sym_eq(1))) argument.has_sizes({w.value->sym_size(0), x.sym_size(1)});
  argument.is_beside("x", x);
}

template <class T>
const T* data_of(const OptionalTensor& tensor) {
  return tensor ? tensor->const_data_ptr<T>() : nullptr;
}

micro_kernels::InterveneParams params_of(const Tensor& x, std::string_view change, const Where& w) {
  return {
      .x = x.const_data_ptr(),
      .y = nullptr,
      .touched = data_of<bool>(w.touched),
      .expert = data_of<int32_t>(w.experts),
      .columns = data_of<bool>(w.columns),
      .value = w.value ? w.value->const_data_ptr() : nullptr,
      .index = data_of<int64_t>(w.index),
      .rows = x.size(0),
      .width = x.size(1),
      .experts = w.columns ? w.columns->size(0) : 0,
      .value_rows = w.value ? w.value->size(0) : 0,
      .value_width = w.value ? w.value->size(1) : 0,
      .change = kernel_change(change),
      .dtype = kernel_dtype(kName, x),
  };
}

void check_status(micro_kernels::Status status) {
  TORCH_CHECK_VALUE(status != micro_kernels::Status::kIndexOutOfRange, kName,
                    ": a touched row has an expert outside [0, E'), or an index outside the rows of value");
  check(kName, status);
}

// ---- forward and backward, one function for both devices -----------------------------------------------------------

Tensor allocate(const Tensor& x) { return at::empty_like(x, at::MemoryFormat::Contiguous); }

Tensor forward(const Tensor& x_, std::string_view change, const OptionalTensor& touched, const OptionalTensor& experts,
               const OptionalTensor& columns, const OptionalTensor& value, const OptionalTensor& index) {
  check_arguments(x_, change, {touched, experts, columns, value, index});
  const c10::DeviceGuard device(x_.device());
  const Where where = Where{touched, experts, columns, value, index}.contiguous();
  const Tensor x = x_.contiguous();
  Tensor y = allocate(x);
  micro_kernels::InterveneParams params = params_of(x, change, where);
  params.y = y.mutable_data_ptr();
  check_status(x.is_cuda() ? micro_kernels::cuda::intervene(params, current_stream(x))
                           : micro_kernels::cpu::intervene(params, parallel_for));
  return y;
}

Tensor forward_meta(const Tensor& x, std::string_view change, const OptionalTensor& touched,
                    const OptionalTensor& experts, const OptionalTensor& columns, const OptionalTensor& value,
                    const OptionalTensor& index) {
  check_arguments(x, change, {touched, experts, columns, value, index});
  return allocate(x);
}

// An unwanted gradient is a tensor without elements. x is read by scale alone, if the gradient of value is wanted.
std::tuple<Tensor, Tensor> backward(const Tensor& grad_y_, const Tensor& x_, std::string_view change,
                                    const OptionalTensor& touched, const OptionalTensor& experts,
                                    const OptionalTensor& columns, const OptionalTensor& value,
                                    const OptionalTensor& index, bool wants_x, bool wants_value) {
  const c10::DeviceGuard device(grad_y_.device());
  const Where where = Where{touched, experts, columns, value, index}.contiguous();
  const Tensor grad_y = grad_y_.contiguous(), x = x_.contiguous();
  micro_kernels::InterveneBackwardParams params{.forward = params_of(grad_y, change, where),
                                                .grad_y = grad_y.const_data_ptr(),
                                                .grad_x = nullptr,
                                                .grad_value = nullptr};
  params.forward.x = x.const_data_ptr();
  Tensor grad_x = wants_x ? allocate(grad_y) : at::empty({0}, grad_y.options());
  Tensor sums = at::empty({wants_value ? params.forward.value_rows : 0, grad_y.size(1)},
                          grad_y.options().dtype(accumulator_dtype(grad_y)));
  if (wants_x) params.grad_x = grad_x.mutable_data_ptr();
  if (wants_value) params.grad_value = sums.mutable_data_ptr();
  check_status(grad_y.is_cuda() ? micro_kernels::cuda::intervene_backward(params, current_stream(grad_y))
                                : micro_kernels::cpu::intervene_backward(params, parallel_for));
  if (!wants_value) return {grad_x, at::empty({0}, grad_y.options())};
  if (params.forward.value_width == 1 && grad_y.size(1) != 1) sums = sums.sum(1, /*keepdim=*/true);
  return {grad_x, sums.to(grad_y.scalar_type())};
}

std::tuple<Tensor, Tensor> backward_meta(const Tensor& grad_y, const Tensor&, std::string_view, const OptionalTensor&,
                                         const OptionalTensor&, const OptionalTensor&, const OptionalTensor& value,
                                         const OptionalTensor&, bool wants_x, bool wants_value) {
  return {wants_x ? allocate(grad_y) : at::empty({0}, grad_y.options()),
          wants_value ? allocate(*value) : at::empty({0}, grad_y.options())};
}

// ---- autograd: both directions go through the dispatcher, so that tracing sees them --------------------------------

auto call_forward() {
  static const auto call = op<decltype(forward)>("micro::intervene");
  return call;
}

auto call_backward() {
  static const auto call = op<decltype(backward)>("micro::intervene_backward");
  return call;
}

Tensor or_undefined(const OptionalTensor& tensor) { return tensor ? *tensor : Tensor(); }
OptionalTensor or_none(const Tensor& tensor) { return tensor.defined() ? OptionalTensor(tensor) : std::nullopt; }

struct Intervene : torch::autograd::Function<Intervene> {
  static Tensor forward(AutogradContext* context, const Tensor& x, std::string_view change,
                        const OptionalTensor& touched, const OptionalTensor& experts, const OptionalTensor& columns,
                        const OptionalTensor& value, const OptionalTensor& index) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    const bool wants_value = value && value->requires_grad();
    context->saved_data["change"] = std::string(change);
    context->saved_data["wants_x"] = x.requires_grad();
    context->saved_data["wants_value"] = wants_value;
    // Only a gate's gradient reads x.
    const bool keeps_x = wants_value && change == "scale";
    context->save_for_backward({keeps_x ? x : Tensor(), or_undefined(touched), or_undefined(experts),
                                or_undefined(columns), or_undefined(value), or_undefined(index)});
    return call_forward().call(x, change, touched, experts, columns, value, index);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grad) {
    const auto saved = context->get_saved_variables();
    const bool wants_x = context->saved_data["wants_x"].toBool();
    const bool wants_value = context->saved_data["wants_value"].toBool();
    const std::string change = context->saved_data["change"].toStringRef();
    auto [grad_x, grad_value] = call_backward().call(grad[0], saved[0].defined() ? saved[0] : grad[0], change,
                                                     or_none(saved[1]), or_none(saved[2]), or_none(saved[3]),
                                                     or_none(saved[4]), or_none(saved[5]), wants_x, wants_value);
    return {wants_x ? grad_x : Tensor(),         Tensor(), Tensor(), Tensor(), Tensor(),
            wants_value ? grad_value : Tensor(), Tensor()};
  }
};

Tensor forward_autograd(const Tensor& x, std::string_view change, const OptionalTensor& touched,
                        const OptionalTensor& experts, const OptionalTensor& columns, const OptionalTensor& value,
                        const OptionalTensor& index) {
  if (must_record(x, or_undefined(value))) return Intervene::apply(x, change, touched, experts, columns, value, index);
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return call_forward().call(x, change, touched, experts, columns, value, index);
}

std::tuple<Tensor, Tensor> backward_autograd(const Tensor& grad_y, const Tensor& x, std::string_view change,
                                             const OptionalTensor& touched, const OptionalTensor& experts,
                                             const OptionalTensor& columns, const OptionalTensor& value,
                                             const OptionalTensor& index, bool wants_x, bool wants_value) {
  if (value)
    refuse_second_derivative(kName, grad_y, x, *value);
  else
    refuse_second_derivative(kName, grad_y, x);
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return call_backward().call(grad_y, x, change, touched, experts, columns, value, index, wants_x, wants_value);
}

Tensor forward_autocast(const Tensor& x, std::string_view change, const OptionalTensor& touched,
                        const OptionalTensor& experts, const OptionalTensor& columns, const OptionalTensor& value,
                        const OptionalTensor& index) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const OptionalTensor given = value ? OptionalTensor(value->to(x.scalar_type())) : std::nullopt;
  return call_forward().call(x, change, touched, experts, columns, given, index);
}

}  // namespace

Tensor intervene(const Tensor& x, Change change, const OptionalTensor& touched, const OptionalTensor& experts,
                 const OptionalTensor& columns, const OptionalTensor& value, const OptionalTensor& index) {
  return call_forward().call(x, word(change), touched, experts, columns, value, index);
}

TORCH_LIBRARY_FRAGMENT(micro, m) {
  m.def(
      "intervene(Tensor x, str change, Tensor? touched=None, Tensor? experts=None, Tensor? columns=None, "
      "Tensor? value=None, Tensor? index=None) -> Tensor");
  m.def(
      "intervene_backward(Tensor grad_y, Tensor x, str change, Tensor? touched, Tensor? experts, Tensor? columns, "
      "Tensor? value, Tensor? index, bool wants_x, bool wants_value) -> (Tensor grad_x, Tensor grad_value)");
}
TORCH_LIBRARY_IMPL(micro, Autograd, m) {
  m.impl("intervene", forward_autograd);
  m.impl("intervene_backward", backward_autograd);
}
TORCH_LIBRARY_IMPL(micro, AutocastCPU, m) { m.impl("intervene", forward_autocast); }
TORCH_LIBRARY_IMPL(micro, AutocastCUDA, m) { m.impl("intervene", forward_autocast); }
TORCH_LIBRARY_IMPL(micro, CPU, m) {
  m.impl("intervene", forward);
  m.impl("intervene_backward", backward);
}
TORCH_LIBRARY_IMPL(micro, CUDA, m) {
  m.impl("intervene", forward);
  m.impl("intervene_backward", backward);
}
TORCH_LIBRARY_IMPL(micro, Meta, m) {
  m.impl("intervene", forward_meta);
  m.impl("intervene_backward", backward_meta);
}

}  // namespace micro
