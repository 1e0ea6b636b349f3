#include "micro/route.h"

#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <string_view>
#include <tuple>

#include "micro_kernels/route.h"
#include "ops/arguments.h"
#include "ops/common.h"
#include "ops/weight_rules.h"

namespace micro {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using RoutingTensors = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // ids, weights, probs, effective

constexpr char kName[] = "micro::route";

// ---- checks: once, at the public function --------------------------------------------------------------------------

// First size T, or 1: one row for all tokens.
bool one_row(const Tensor& tensor, const c10::SymInt& tokens) {
  return !tensor.sym_size(0).sym_eq(tokens).guard_bool(__FILE__, __LINE__);
}

void check_rows(const Argument& argument, c10::SymIntArrayRef sizes, const Tensor& scores) {
  argument.has_dims(static_cast<int64_t>(sizes.size()), sizes.size() == 1 ? "[T] or [1]" : "[T, E] or [1, E]");
  argument.is_beside("logits", scores);
  const Tensor& tensor = argument.tensor;
  const bool fits =
      (!one_row(tensor, sizes[0]) || same(tensor.sym_size(0), 1)) && same(tensor.sym_sizes().slice(1), sizes.slice(1));
  TORCH_CHECK_VALUE(fits, argument.function, ": ", argument.name, " must be ", sizes, " or have one row, got ",
                    tensor.sym_sizes());
}

// logits, or the rows that stand in for them.
const Tensor& scores_of(const OptionalTensor& logits, const OptionalTensor& rows) {
  TORCH_CHECK_VALUE(logits || rows, kName, ": logits or rows must be given");
  return logits ? *logits : *rows;
}

void check_arguments(const OptionalTensor& logits, int64_t k, const OptionalTensor& rows, const OptionalTensor& bias,
                     const OptionalTensor& ablate, const OptionalTensor& force, const OptionalTensor& replay) {
  const Tensor& scores = scores_of(logits, rows);
  kernel_dtype(kName, scores);
  Argument{kName, logits ? "logits" : "rows", scores}.has_dims(2, "[T, E]");
  const c10::SymInt tokens = scores.sym_size(0), experts = scores.sym_size(1);
  TORCH_CHECK_VALUE(k >= 1 && experts.sym_ge(k).expect_true(__FILE__, __LINE__), kName,
                    ": k must lie in 1 .. E = ", experts, ", got ", k);
  if (rows) {
    const Argument argument{kName, "rows", *rows};
    argument.is_floating();
    argument.has_sizes({tokens, experts});
    argument.is_beside("logits", scores);
  }
  if (bias) {
    const Argument argument{kName, "bias", *bias};
    TORCH_CHECK_TYPE(bias->scalar_type() == at::kFloat || bias->scalar_type() == at::kDouble, kName,
                     ": bias must be float32 or float64, got ", bias->scalar_type());
    check_rows(argument, {tokens, experts}, scores);
  }
  if (ablate) {
    const Argument argument{kName, "ablate", *ablate};
    argument.is(at::kBool);
    check_rows(argument, {tokens, experts}, scores);
  }
  if (force) {
    const Argument argument{kName, "force", *force};
    argument.is(at::kInt);
    check_rows(argument, {tokens}, scores);
  }
  if (replay) {
    const Argument argument{kName, "replay", *replay};
    argument.is(at::kInt);
    argument.has_sizes({tokens, k});
    argument.is_beside("logits", scores);
  }
}

// ---- forward and backward, one function for both devices -----------------------------------------------------------

RoutingTensors allocate_forward(const Tensor& scores, int64_t k) {
  const c10::SymInt tokens = scores.sym_size(0);
  const auto wide = scores.options().dtype(accumulator_dtype(scores));
  return {at::empty_symint({tokens, k}, scores.options().dtype(at::kInt)),
          at::empty_symint({tokens, k}, scores.options()), at::empty_symint(scores.sym_sizes(), wide),
          at::empty_symint(scores.sym_sizes(), wide)};
}

OptionalTensor contiguous_as(const OptionalTensor& tensor, at::ScalarType type) {
  return tensor ? OptionalTensor(tensor->to(type).contiguous()) : std::nullopt;
}

template <class T>
const T* pointer(const OptionalTensor& tensor) {
  return tensor ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

// Elements from one token to the next: 0 where there is one row for all.
int64_t token_stride(const OptionalTensor& tensor, int64_t tokens, int64_t width) {
  return tensor && tensor->size(0) == tokens ? width : 0;
}

RoutingTensors forward(const OptionalTensor& logits_, int64_t k, const OptionalTensor& rows_,
                       const OptionalTensor& bias_, const OptionalTensor& ablate_, const OptionalTensor& force_,
                       const OptionalTensor& replay_, std::string_view weight_rule) {
  check_arguments(logits_, k, rows_, bias_, ablate_, force_, replay_);
  const Tensor& scores = scores_of(logits_, rows_);
  const c10::DeviceGuard device(scores.device());
  const at::ScalarType wide = accumulator_dtype(scores);
  const OptionalTensor logits = contiguous(logits_), rows = contiguous_as(rows_, wide),
                       bias = contiguous_as(bias_, wide), ablate = contiguous(ablate_), force = contiguous(force_),
                       replay = contiguous(replay_);
  auto [ids, weights, probs, effective] = allocate_forward(scores, k);
  const int64_t tokens = scores.size(0), experts = scores.size(1);
  const micro_kernels::RouteParams params{
      .logits = pointer<void>(logits),
      .rows = pointer<void>(rows),
      .bias = pointer<void>(bias),
      .ablate = pointer<bool>(ablate),
      .force = pointer<int32_t>(force),
      .replay = pointer<int32_t>(replay),
      .ids = ids.mutable_data_ptr<int32_t>(),
      .weights = weights.mutable_data_ptr(),
      .probs = probs.mutable_data_ptr(),
      .effective = effective.mutable_data_ptr(),
      .bias_stride = token_stride(bias, tokens, experts),
      .ablate_stride = token_stride(ablate, tokens, experts),
      .force_stride = token_stride(force, tokens, 1),
      .tokens = tokens,
      .experts = experts,
      .k = k,
      .rule = kernel_rule(kName, weight_rule),
      .dtype = kernel_dtype(kName, scores),
  };
  const auto status = scores.is_cuda() ? micro_kernels::cuda::route(params, current_stream(scores))
                                       : micro_kernels::cpu::route(params, parallel_for);
  TORCH_CHECK_VALUE(status != micro_kernels::Status::kIndexOutOfRange, kName,
                    ": force must hold -1 or an expert, replay an expert in [0, ", experts, ")");
  check(kName, status);
  return {ids, weights, probs, effective};
}

RoutingTensors forward_meta(const OptionalTensor& logits, int64_t k, const OptionalTensor& rows,
                            const OptionalTensor& bias, const OptionalTensor& ablate, const OptionalTensor& force,
                            const OptionalTensor& replay, std::string_view weight_rule) {
  check_arguments(logits, k, rows, bias, ablate, force, replay);
  kernel_rule(kName, weight_rule);
  return allocate_forward(scores_of(logits, rows), k);
}

// Returns dL/dz' in the accumulator type. An absent gradient is zero.
Tensor backward(const OptionalTensor& grad_weights_, const OptionalTensor& grad_probs_,
                const OptionalTensor& grad_effective_, const Tensor& ids_, const Tensor& probs_,
                const Tensor& effective_, const OptionalTensor& force_, std::string_view weight_rule) {
  const c10::DeviceGuard device(probs_.device());
  const OptionalTensor grad_weights = contiguous(grad_weights_), grad_probs = contiguous(grad_probs_),
                       grad_effective = contiguous(grad_effective_), force = contiguous(force_);
  const Tensor ids = ids_.contiguous(), probs = probs_.contiguous(), effective = effective_.contiguous();
  Tensor grad_z = at::empty(probs.sizes(), probs.options());
  const int64_t tokens = probs.size(0), experts = probs.size(1);
  const micro_kernels::RouteBackwardParams params{
      .grad_weights = pointer<void>(grad_weights),
      .grad_probs = pointer<void>(grad_probs),
      .grad_effective = pointer<void>(grad_effective),
      .ids = ids.const_data_ptr<int32_t>(),
      .probs = probs.const_data_ptr(),
      .effective = effective.const_data_ptr(),
      .force = pointer<int32_t>(force),
      .grad_z = grad_z.mutable_data_ptr(),
      .force_stride = token_stride(force, tokens, 1),
      .tokens = tokens,
      .experts = experts,
      .k = ids.size(1),
      .rule = kernel_rule(kName, weight_rule),
      .dtype = kernel_dtype(kName, grad_weights ? *grad_weights : probs),
  };
  check(kName, probs.is_cuda() ? micro_kernels::cuda::route_backward(params, current_stream(probs))
                               : micro_kernels::cpu::route_backward(params, parallel_for));
  return grad_z;
}

Tensor backward_meta(const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const Tensor&,
                     const Tensor& probs, const Tensor&, const OptionalTensor&, std::string_view) {
  return at::empty_symint(probs.sym_sizes(), probs.options());
}

// ---- autograd: both directions go through the dispatcher, so that tracing sees them --------------------------------

auto call_forward() {
  static const auto call = op<decltype(forward)>("micro::route");
  return call;
}

auto call_backward() {
  static const auto call = op<decltype(backward)>("micro::route_backward");
  return call;
}

OptionalTensor if_defined(const Tensor& tensor) { return tensor.defined() ? OptionalTensor(tensor) : std::nullopt; }

struct Route : torch::autograd::Function<Route> {
  static variable_list forward(AutogradContext* context, const Tensor& logits, const OptionalTensor& bias, int64_t k,
                               const OptionalTensor& ablate, const OptionalTensor& force, const OptionalTensor& replay,
                               std::string_view weight_rule) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    auto [ids, weights, probs, effective] =
        call_forward().call(logits, k, {}, bias, ablate, force, replay, weight_rule);
    context->set_materialize_grads(false);
    context->mark_non_differentiable({ids});
    context->save_for_backward({ids, probs, effective, force.value_or(Tensor())});
    context->saved_data["rule"] = std::string(weight_rule);
    context->saved_data["logits_dtype"] = logits.scalar_type();
    context->saved_data["has_bias"] = bias.has_value();
    if (bias) {
      context->saved_data["bias_dtype"] = bias->scalar_type();
      context->saved_data["one_bias"] = one_row(*bias, logits.sym_size(0));
    }
    return {ids, weights, probs, effective};
  }

  static variable_list backward(AutogradContext* context, const variable_list& grad) {
    const auto saved = context->get_saved_variables();
    const Tensor grad_z =
        call_backward().call(if_defined(grad[1]), if_defined(grad[2]), if_defined(grad[3]), saved[0], saved[1],
                             saved[2], if_defined(saved[3]), context->saved_data["rule"].toStringView());
    variable_list result(7);
    if (context->needs_input_grad(0)) result[0] = grad_z.to(context->saved_data["logits_dtype"].toScalarType());
    if (context->saved_data["has_bias"].toBool() && context->needs_input_grad(1)) {
      const Tensor per_row = context->saved_data["one_bias"].toBool() ? grad_z.sum(0, /*keepdim=*/true) : grad_z;
      result[1] = per_row.to(context->saved_data["bias_dtype"].toScalarType());
    }
    return result;
  }
};

RoutingTensors forward_autograd(const OptionalTensor& logits, int64_t k, const OptionalTensor& rows,
                                const OptionalTensor& bias, const OptionalTensor& ablate, const OptionalTensor& force,
                                const OptionalTensor& replay, std::string_view weight_rule) {
  TORCH_CHECK_NOT_IMPLEMENTED(!rows || !must_record(*rows), kName, ": rows have no gradient; detach them");
  if (!rows && must_record(logits.value_or(Tensor()), bias.value_or(Tensor()))) {
    const auto out = Route::apply(scores_of(logits, rows), bias, k, ablate, force, replay, weight_rule);
    return {out[0], out[1], out[2], out[3]};
  }
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return call_forward().call(logits, k, rows, bias, ablate, force, replay, weight_rule);
}

Tensor backward_autograd(const OptionalTensor& grad_weights, const OptionalTensor& grad_probs,
                         const OptionalTensor& grad_effective, const Tensor& ids, const Tensor& probs,
                         const Tensor& effective, const OptionalTensor& force, std::string_view weight_rule) {
  refuse_second_derivative(kName, grad_weights.value_or(Tensor()), grad_probs.value_or(Tensor()),
                           grad_effective.value_or(Tensor()), probs, effective);
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return call_backward().call(grad_weights, grad_probs, grad_effective, ids, probs, effective, force, weight_rule);
}

}  // namespace

Routing route(const std::optional<Tensor>& logits, int64_t k, const RouteOptions& options) {
  scores_of(logits, options.rows);  // without a tensor there is no device to dispatch on
  auto [ids, weights, probs, effective] =
      call_forward().call(logits, k, options.rows, options.bias, options.ablate, options.force, options.replay,
                          rule_name(options.weight_rule));
  return {ids, weights, probs, effective};
}

TORCH_LIBRARY_FRAGMENT(micro, m) {
  m.def(
      "route(Tensor? logits, int k, Tensor? rows=None, Tensor? bias=None, Tensor? ablate=None, Tensor? force=None,"
      " Tensor? replay=None, str weight_rule='renormalized')"
      " -> (Tensor ids, Tensor weights, Tensor probs, Tensor effective)");
  m.def(
      "route_backward(Tensor? grad_weights, Tensor? grad_probs, Tensor? grad_effective, Tensor ids, Tensor probs,"
      " Tensor effective, Tensor? force, str weight_rule) -> Tensor");
}
TORCH_LIBRARY_IMPL(micro, Autograd, m) {
  m.impl("route", forward_autograd);
  m.impl("route_backward", backward_autograd);
}
TORCH_LIBRARY_IMPL(micro, CPU, m) {
  m.impl("route", forward);
  m.impl("route_backward", backward);
}
TORCH_LIBRARY_IMPL(micro, CUDA, m) {
  m.impl("route", forward);
  m.impl("route_backward", backward);
}
TORCH_LIBRARY_IMPL(micro, Meta, m) {
  m.impl("route", forward_meta);
  m.impl("route_backward", backward_meta);
}

}  // namespace micro
