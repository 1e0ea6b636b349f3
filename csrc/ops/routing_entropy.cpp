#include "micro/routing_entropy.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "micro_kernels/routing_entropy.h"
#include "ops/decisions.h"
#include "ops/workspace.h"

namespace micro {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr char kName[] = "micro::routing_entropy";

Tensor forward_meta(const Tensor& probs, const OptionalTensor& mask) {
  TORCH_CHECK_VALUE(probs.dim() >= 2, kName, ": probs must be [..., T, E], got ", probs.sym_sizes());
  TORCH_CHECK_TYPE(probs.scalar_type() == at::kFloat || probs.scalar_type() == at::kDouble, kName,
                   ": probs must be float32 or float64, got ", probs.scalar_type());
  check_mask(kName, mask, probs);
  return at::empty_symint(probs.sym_sizes().slice(0, probs.dim() - 2), probs.options());
}

Tensor forward(const Tensor& probs_, const OptionalTensor& mask_) {
  const c10::DeviceGuard device(probs_.device());
  const Tensor entropy = forward_meta(probs_, mask_), probs = probs_.contiguous();
  const OptionalTensor mask = contiguous(mask_);
  const micro_kernels::RoutingEntropyParams params{
      .probs = probs.const_data_ptr(),
      .mask = mask_pointer(mask),
      .entropy = entropy.mutable_data_ptr(),
      .layers = entropy.numel(),
      .tokens = probs.size(-2),
      .experts = probs.size(-1),
      .dtype = kernel_dtype(kName, probs),
  };
  if (probs.is_cuda()) {
    const Tensor workspace = device_workspace(probs, micro_kernels::cuda::routing_entropy_workspace(params));
    check(kName, micro_kernels::cuda::routing_entropy(params, workspace.mutable_data_ptr(), current_stream(probs)));
  } else {
    check(kName, micro_kernels::cpu::routing_entropy(params, parallel_for));
  }
  return entropy;
}

Tensor backward_meta(const Tensor&, const Tensor& probs, const OptionalTensor&) {
  return at::empty_like(probs, at::MemoryFormat::Contiguous);
}

Tensor backward(const Tensor& grad_entropy_, const Tensor& probs_, const OptionalTensor& mask_) {
  const c10::DeviceGuard device(probs_.device());
  const Tensor grad_entropy = grad_entropy_.contiguous(), probs = probs_.contiguous();
  const Tensor grad_probs = at::empty_like(probs);
  const OptionalTensor mask = contiguous(mask_);
  const micro_kernels::RoutingEntropyBackwardParams params{
      .grad_entropy = grad_entropy.const_data_ptr(),
      .probs = probs.const_data_ptr(),
      .mask = mask_pointer(mask),
      .grad_probs = grad_probs.mutable_data_ptr(),
      .layers = grad_entropy.numel(),
      .tokens = probs.size(-2),
      .experts = probs.size(-1),
      .dtype = kernel_dtype(kName, probs),
  };
  check(kName, probs.is_cuda() ? micro_kernels::cuda::routing_entropy_backward(params, current_stream(probs))
                               : micro_kernels::cpu::routing_entropy_backward(params, parallel_for));
  return grad_probs;
}

auto call_backward() {
  static const auto call = op<decltype(backward)>("micro::routing_entropy_backward");
  return call;
}

struct RoutingEntropy : torch::autograd::Function<RoutingEntropy> {
  static Tensor forward(AutogradContext* context, const Tensor& probs, const OptionalTensor& mask) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    context->save_for_backward({probs, mask.value_or(Tensor())});
    return routing_entropy(probs, mask);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grad) {
    const auto saved = context->get_saved_variables();
    return {call_backward().call(grad[0], saved[0], optional(saved[1])), Tensor()};
  }
};

Tensor routing_entropy_autograd(const Tensor& probs, const OptionalTensor& mask) {
  return RoutingEntropy::apply(probs, mask);
}

Tensor backward_autograd(const Tensor& grad_entropy, const Tensor& probs, const OptionalTensor& mask) {
  refuse_second_derivative(kName, grad_entropy, probs);
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return call_backward().call(grad_entropy, probs, mask);
}

}  // namespace

Tensor routing_entropy(const Tensor& probs, const OptionalTensor& mask) {
  static const auto call = op<Tensor(const Tensor&, const OptionalTensor&)>(kName);
  return call.call(probs, mask);
}

TORCH_LIBRARY_FRAGMENT(micro, m) {
  m.def("routing_entropy(Tensor probs, Tensor? mask=None) -> Tensor");
  m.def("routing_entropy_backward(Tensor grad_entropy, Tensor probs, Tensor? mask) -> Tensor");
}
TORCH_LIBRARY_IMPL(micro, Autograd, m) {
  m.impl("routing_entropy", routing_entropy_autograd);
  m.impl("routing_entropy_backward", backward_autograd);
}
TORCH_LIBRARY_IMPL(micro, CPU, m) {
  m.impl("routing_entropy", forward);
  m.impl("routing_entropy_backward", backward);
}
TORCH_LIBRARY_IMPL(micro, CUDA, m) {
  m.impl("routing_entropy", forward);
  m.impl("routing_entropy_backward", backward);
}
TORCH_LIBRARY_IMPL(micro, Meta, m) {
  m.impl("routing_entropy", forward_meta);
  m.impl("routing_entropy_backward", backward_meta);
}

}  // namespace micro
