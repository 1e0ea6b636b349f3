#include "micro/combine.h"

#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <array>
#include <tuple>

#include "micro_kernels/combine.h"
#include "ops/arguments.h"
#include "ops/common.h"

namespace micro {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr char kName[] = "micro::combine";

void check_arguments(const Tensor& y, const Tensor& weights, const Tensor& experts, const Tensor& offsets,
                     const Tensor& inverse) {
  kernel_dtype(kName, y);
  Argument{kName, "y", y}.has_dims(2, "[N, H]");
  const Argument weights_argument{kName, "weights", weights};
  weights_argument.is_floating();
  weights_argument.has_dims(2, "[T, K]");
  weights_argument.is_beside("y", y);
  for (const Argument& argument : {Argument{kName, "experts", experts}, Argument{kName, "offsets", offsets},
                                   Argument{kName, "inverse", inverse}}) {
    argument.is(at::kInt);
    argument.is_beside("y", y);
  }
  Argument{kName, "y", y}.has_sizes({weights.sym_numel(), y.sym_size(1)});
  Argument{kName, "experts", experts}.has_sizes({weights.sym_numel()});
  Argument{kName, "offsets", offsets}.is_offsets();
  Argument{kName, "inverse", inverse}.has_sizes(weights.sym_sizes());
}

void check_rows(const Tensor& inverse, micro_kernels::Status status) {
  TORCH_CHECK_VALUE(status != micro_kernels::Status::kIndexOutOfRange, kName, ": inverse must lie in [0, ",
                    inverse.numel(), "), the rows of y");
  check(kName, status);
}

// ---- forward and backward, one function for both devices -----------------------------------------------------------

Tensor allocate_forward(const Tensor& y, const Tensor& weights) {
  return at::empty_symint({weights.sym_size(0), y.sym_size(1)}, y.options());
}

Tensor forward(const Tensor& y_, const Tensor& weights_, const Tensor& experts_, const Tensor& offsets_,
               const Tensor& inverse_) {
  check_arguments(y_, weights_, experts_, offsets_, inverse_);
  const c10::DeviceGuard device(y_.device());
  const Tensor y = y_.contiguous(), weights = weights_.to(y.scalar_type()).contiguous();
  const Tensor experts = experts_.contiguous(), offsets = offsets_.contiguous(), inverse = inverse_.contiguous();
  Tensor out = allocate_forward(y, weights);
  const micro_kernels::CombineParams params{
      .y = y.const_data_ptr(),
      .weights = weights.const_data_ptr(),
      .experts = experts.const_data_ptr<int32_t>(),
      .offsets = offsets.const_data_ptr<int32_t>(),
      .inverse = inverse.const_data_ptr<int32_t>(),
      .out = out.mutable_data_ptr(),
      .token_count = weights.size(0),
      .k = weights.size(1),
      .hidden = y.size(1),
      .expert_count = offsets.numel() - 1,
      .dtype = kernel_dtype(kName, y),
  };
  check_rows(inverse, y.is_cuda() ? micro_kernels::cuda::combine(params, current_stream(y))
                                  : micro_kernels::cpu::combine(params, parallel_for));
  return out;
}

Tensor forward_meta(const Tensor& y, const Tensor& weights, const Tensor& experts, const Tensor& offsets,
                    const Tensor& inverse) {
  check_arguments(y, weights, experts, offsets, inverse);
  return allocate_forward(y, weights);
}

// wanted: gradients of {y, weights}; what is not wanted is not computed and comes back undefined.
std::tuple<Tensor, Tensor> allocate_backward(const Tensor& grad, const Tensor& weights, std::array<bool, 2> wanted,
                                             at::ScalarType weights_dtype) {
  return {wanted[0] ? at::empty_symint({weights.sym_numel(), grad.sym_size(1)}, grad.options()) : Tensor(),
          wanted[1] ? at::empty_symint(weights.sym_sizes(), grad.options().dtype(weights_dtype)) : Tensor()};
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad_, const OptionalTensor& y_, const Tensor& weights_,
                                    const Tensor& offsets_, const Tensor& inverse_, std::array<bool, 2> wanted) {
  TORCH_CHECK_VALUE(y_ || !wanted[1], kName, ": the gradient of weights needs y");
  const c10::DeviceGuard device(grad_.device());
  const Tensor grad = grad_.contiguous(), weights = weights_.to(grad.scalar_type()).contiguous();
  const Tensor offsets = offsets_.contiguous(), inverse = inverse_.contiguous();
  const OptionalTensor y = contiguous(y_);
  auto [grad_y, grad_weights] = allocate_backward(grad, weights, wanted, accumulator_dtype(grad));
  const micro_kernels::CombineBackwardParams params{
      .grad = grad.const_data_ptr(),
      .y = y ? y->const_data_ptr() : nullptr,
      .weights = weights.const_data_ptr(),
      .offsets = offsets.const_data_ptr<int32_t>(),
      .inverse = inverse.const_data_ptr<int32_t>(),
      .grad_y = wanted[0] ? grad_y.mutable_data_ptr() : nullptr,
      .grad_weights = wanted[1] ? grad_weights.mutable_data_ptr() : nullptr,
      .token_count = weights.size(0),
      .k = weights.size(1),
      .hidden = grad.size(1),
      .expert_count = offsets.numel() - 1,
      .dtype = kernel_dtype(kName, grad),
  };
  check_rows(inverse, grad.is_cuda() ? micro_kernels::cuda::combine_backward(params, current_stream(grad))
                                     : micro_kernels::cpu::combine_backward(params, parallel_for));
  return {grad_y, wanted[1] ? grad_weights.to(weights_.scalar_type()) : grad_weights};
}

std::tuple<Tensor, Tensor> backward_meta(const Tensor& grad, const OptionalTensor&, const Tensor& weights,
                                         const Tensor&, const Tensor&, std::array<bool, 2> wanted) {
  return allocate_backward(grad, weights, wanted, weights.scalar_type());
}

// ---- autograd: both directions go through the dispatcher, so that tracing sees them --------------------------------

auto call_forward() {
  static const auto call = op<decltype(forward)>("micro::combine");
  return call;
}

auto call_backward() {
  static const auto call = op<decltype(backward)>("micro::combine_backward");
  return call;
}

struct Combine : torch::autograd::Function<Combine> {
  static Tensor forward(AutogradContext* context, const Tensor& y, const Tensor& weights, const Tensor& experts,
                        const Tensor& offsets, const Tensor& inverse) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    // y is the largest tensor of a layer's tail: it is kept only where the weights need it.
    context->save_for_backward({weights.requires_grad() ? y : Tensor(), weights, offsets, inverse});
    return call_forward().call(y, weights, experts, offsets, inverse);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grad) {
    const auto saved = context->get_saved_variables();
    const OptionalTensor y = saved[0].defined() ? OptionalTensor(saved[0]) : std::nullopt;
    const std::array<bool, 2> wanted{context->needs_input_grad(0), context->needs_input_grad(1)};
    auto [grad_y, grad_weights] = call_backward().call(grad[0], y, saved[1], saved[2], saved[3], wanted);
    return {grad_y, grad_weights, Tensor(), Tensor(), Tensor()};
  }
};

Tensor forward_autograd(const Tensor& y, const Tensor& weights, const Tensor& experts, const Tensor& offsets,
                        const Tensor& inverse) {
  if (must_record(y, weights)) return Combine::apply(y, weights, experts, offsets, inverse);
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return call_forward().call(y, weights, experts, offsets, inverse);
}

std::tuple<Tensor, Tensor> backward_autograd(const Tensor& grad, const OptionalTensor& y, const Tensor& weights,
                                             const Tensor& offsets, const Tensor& inverse, std::array<bool, 2> wanted) {
  refuse_second_derivative(kName, grad, y ? *y : Tensor(), weights);
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return call_backward().call(grad, y, weights, offsets, inverse, wanted);
}

}  // namespace

Tensor combine(const Tensor& y, const Tensor& weights, const Plan& plan) {
  return call_forward().call(y, weights, plan.experts, plan.offsets, plan.inverse);
}

TORCH_LIBRARY_FRAGMENT(micro, m) {
  m.def("combine(Tensor y, Tensor weights, Tensor experts, Tensor offsets, Tensor inverse) -> Tensor");
  m.def(
      "combine_backward(Tensor grad, Tensor? y, Tensor weights, Tensor offsets, Tensor inverse, bool[2] wanted)"
      " -> (Tensor grad_y, Tensor grad_weights)");
}
TORCH_LIBRARY_IMPL(micro, Autograd, m) {
  m.impl("combine", forward_autograd);
  m.impl("combine_backward", backward_autograd);
}
TORCH_LIBRARY_IMPL(micro, CPU, m) {
  m.impl("combine", forward);
  m.impl("combine_backward", backward);
}
TORCH_LIBRARY_IMPL(micro, CUDA, m) {
  m.impl("combine", forward);
  m.impl("combine_backward", backward);
}
TORCH_LIBRARY_IMPL(micro, Meta, m) {
  m.impl("combine", forward_meta);
  m.impl("combine_backward", backward_meta);
}

}  // namespace micro
