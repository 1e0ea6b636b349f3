#include "micro/permute.h"

#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "micro_kernels/permute.h"
#include "ops/arguments.h"
#include "ops/common.h"

namespace micro {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr char kName[] = "micro::permute";

void check_arguments(const Tensor& x, const Tensor& tokens, const Tensor& offsets, const Tensor& inverse) {
  kernel_dtype(kName, x);
  Argument{kName, "x", x}.has_dims(2, "[T, H]");
  for (const Argument& argument :
       {Argument{kName, "tokens", tokens}, Argument{kName, "offsets", offsets}, Argument{kName, "inverse", inverse}}) {
    argument.is(at::kInt);
    argument.is_beside("x", x);
  }
  Argument{kName, "offsets", offsets}.is_offsets();
  Argument{kName, "inverse", inverse}.has_dims(2, "[T, K]");
  Argument{kName, "inverse", inverse}.has_sizes({x.sym_size(0), inverse.sym_size(1)});
  Argument{kName, "tokens", tokens}.has_sizes({inverse.sym_numel()});
}

// ---- forward and backward, one function for both devices -----------------------------------------------------------

Tensor allocate(const Tensor& x, const c10::SymInt& rows) {
  return at::empty_symint({rows, x.sym_size(1)}, x.options());
}

Tensor forward(const Tensor& x_, const Tensor& tokens_, const Tensor& offsets_, const Tensor& inverse) {
  check_arguments(x_, tokens_, offsets_, inverse);
  const c10::DeviceGuard device(x_.device());
  const Tensor x = x_.contiguous(), tokens = tokens_.contiguous(), offsets = offsets_.contiguous();
  Tensor y = allocate(x, tokens.numel());
  const micro_kernels::PermuteParams params{
      .x = x.const_data_ptr(),
      .tokens = tokens.const_data_ptr<int32_t>(),
      .offsets = offsets.const_data_ptr<int32_t>(),
      .y = y.mutable_data_ptr(),
      .token_count = x.size(0),
      .rows = tokens.numel(),
      .hidden = x.size(1),
      .experts = offsets.numel() - 1,
      .dtype = kernel_dtype(kName, x),
  };
  const auto status = x.is_cuda() ? micro_kernels::cuda::permute(params, current_stream(x))
                                  : micro_kernels::cpu::permute(params, parallel_for);
  TORCH_CHECK_VALUE(status != micro_kernels::Status::kIndexOutOfRange, kName, ": tokens must lie in [0, ", x.size(0),
                    "), the rows of x");
  check(kName, status);
  return y;
}

Tensor forward_meta(const Tensor& x, const Tensor& tokens, const Tensor& offsets, const Tensor& inverse) {
  check_arguments(x, tokens, offsets, inverse);
  return allocate(x, tokens.sym_numel());
}

Tensor backward(const Tensor& grad_y_, const Tensor& offsets_, const Tensor& inverse_) {
  const c10::DeviceGuard device(grad_y_.device());
  const Tensor grad_y = grad_y_.contiguous(), offsets = offsets_.contiguous(), inverse = inverse_.contiguous();
  Tensor grad_x = allocate(grad_y, inverse.size(0));
  const micro_kernels::PermuteBackwardParams params{
      .grad_y = grad_y.const_data_ptr(),
      .offsets = offsets.const_data_ptr<int32_t>(),
      .inverse = inverse.const_data_ptr<int32_t>(),
      .grad_x = grad_x.mutable_data_ptr(),
      .token_count = inverse.size(0),
      .k = inverse.size(1),
      .hidden = grad_y.size(1),
      .experts = offsets.numel() - 1,
      .dtype = kernel_dtype(kName, grad_y),
  };
  const auto status = grad_y.is_cuda() ? micro_kernels::cuda::permute_backward(params, current_stream(grad_y))
                                       : micro_kernels::cpu::permute_backward(params, parallel_for);
  TORCH_CHECK_VALUE(status != micro_kernels::Status::kIndexOutOfRange, kName, ": inverse must lie in [0, ",
                    inverse.numel(), "), the rows of the plan");
  check(kName, status);
  return grad_x;
}

Tensor backward_meta(const Tensor& grad_y, const Tensor&, const Tensor& inverse) {
  return allocate(grad_y, inverse.sym_size(0));
}

// ---- autograd: both directions go through the dispatcher, so that tracing sees them --------------------------------

auto call_forward() {
  static const auto call = op<decltype(forward)>("micro::permute");
  return call;
}

auto call_backward() {
  static const auto call = op<decltype(backward)>("micro::permute_backward");
  return call;
}

struct Permute : torch::autograd::Function<Permute> {
  static Tensor forward(AutogradContext* context, const Tensor& x, const Tensor& tokens, const Tensor& offsets,
                        const Tensor& inverse) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    context->save_for_backward({offsets, inverse});
    return call_forward().call(x, tokens, offsets, inverse);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grad) {
    const auto saved = context->get_saved_variables();
    return {call_backward().call(grad[0], saved[0], saved[1]), Tensor(), Tensor(), Tensor()};
  }
};

Tensor forward_autograd(const Tensor& x, const Tensor& tokens, const Tensor& offsets, const Tensor& inverse) {
  if (must_record(x)) return Permute::apply(x, tokens, offsets, inverse);
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return call_forward().call(x, tokens, offsets, inverse);
}

Tensor backward_autograd(const Tensor& grad_y, const Tensor& offsets, const Tensor& inverse) {
  refuse_second_derivative(kName, grad_y);
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return call_backward().call(grad_y, offsets, inverse);
}

}  // namespace

Tensor permute(const Tensor& x, const Plan& plan) {
  return call_forward().call(x, plan.tokens, plan.offsets, plan.inverse);
}

TORCH_LIBRARY_FRAGMENT(micro, m) {
  m.def("permute(Tensor x, Tensor tokens, Tensor offsets, Tensor inverse) -> Tensor");
  m.def("permute_backward(Tensor grad_y, Tensor offsets, Tensor inverse) -> Tensor");
}
TORCH_LIBRARY_IMPL(micro, Autograd, m) {
  m.impl("permute", forward_autograd);
  m.impl("permute_backward", backward_autograd);
}
TORCH_LIBRARY_IMPL(micro, CPU, m) {
  m.impl("permute", forward);
  m.impl("permute_backward", backward);
}
TORCH_LIBRARY_IMPL(micro, CUDA, m) {
  m.impl("permute", forward);
  m.impl("permute_backward", backward);
}
TORCH_LIBRARY_IMPL(micro, Meta, m) {
  m.impl("permute", forward_meta);
  m.impl("permute_backward", backward_meta);
}

}  // namespace micro
