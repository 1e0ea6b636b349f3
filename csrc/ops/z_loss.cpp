#include "micro/z_loss.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "micro_kernels/z_loss.h"
#include "ops/decisions.h"
#include "ops/workspace.h"

namespace micro {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr char kName[] = "micro::z_loss";

Tensor forward_meta(const Tensor& logits, const OptionalTensor& mask) {
  check_decisions(kName, "logits", logits, false);
  check_mask(kName, mask, logits);
  return at::empty({}, logits.options().dtype(accumulator_dtype(logits)));
}

Tensor forward(const Tensor& logits_, const OptionalTensor& mask_) {
  const c10::DeviceGuard device(logits_.device());
  const Tensor loss = forward_meta(logits_, mask_), logits = logits_.contiguous();
  const OptionalTensor mask = contiguous(mask_);
  const micro_kernels::ZLossParams params{
      .logits = logits.const_data_ptr(),
      .mask = mask_pointer(mask),
      .loss = loss.mutable_data_ptr(),
      .layers = logits.size(0),
      .tokens = logits.size(1),
      .experts = logits.size(2),
      .dtype = kernel_dtype(kName, logits),
  };
  if (logits.is_cuda()) {
    const Tensor workspace = device_workspace(logits, micro_kernels::cuda::z_loss_workspace(params));
    check(kName, micro_kernels::cuda::z_loss(params, workspace.mutable_data_ptr(), current_stream(logits)));
  } else {
    check(kName, micro_kernels::cpu::z_loss(params, parallel_for));
  }
  return loss;
}

Tensor backward_meta(const Tensor&, const Tensor& logits, const OptionalTensor&) {
  return at::empty_like(logits, at::MemoryFormat::Contiguous);
}

Tensor backward(const Tensor& grad_loss_, const Tensor& logits_, const OptionalTensor& mask_) {
  const c10::DeviceGuard device(logits_.device());
  const Tensor grad_loss = grad_loss_.contiguous(), logits = logits_.contiguous();
  const Tensor grad_logits = at::empty_like(logits);
  const OptionalTensor mask = contiguous(mask_);
  const micro_kernels::ZLossBackwardParams params{
      .grad_loss = grad_loss.const_data_ptr(),
      .logits = logits.const_data_ptr(),
      .mask = mask_pointer(mask),
      .grad_logits = grad_logits.mutable_data_ptr(),
      .layers = logits.size(0),
      .tokens = logits.size(1),
      .experts = logits.size(2),
      .dtype = kernel_dtype(kName, logits),
  };
  check(kName, logits.is_cuda() ? micro_kernels::cuda::z_loss_backward(params, current_stream(logits))
                                : micro_kernels::cpu::z_loss_backward(params, parallel_for));
  return grad_logits;
}

auto call_backward() {
  static const auto call = op<decltype(backward)>("micro::z_loss_backward");
  return call;
}

struct ZLoss : torch::autograd::Function<ZLoss> {
  static Tensor forward(AutogradContext* context, const Tensor& logits, const OptionalTensor& mask) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    context->save_for_backward({logits, mask.value_or(Tensor())});
    return z_loss(logits, mask);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grad) {
    const auto saved = context->get_saved_variables();
    return {call_backward().call(grad[0], saved[0], optional(saved[1])), Tensor()};
  }
};

Tensor z_loss_autograd(const Tensor& logits, const OptionalTensor& mask) { return ZLoss::apply(logits, mask); }

Tensor backward_autograd(const Tensor& grad_loss, const Tensor& logits, const OptionalTensor& mask) {
  refuse_second_derivative(kName, grad_loss, logits);
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return call_backward().call(grad_loss, logits, mask);
}

}  // namespace

Tensor z_loss(const Tensor& logits, const OptionalTensor& mask) {
  static const auto call = op<Tensor(const Tensor&, const OptionalTensor&)>(kName);
  return call.call(logits, mask);
}

TORCH_LIBRARY_FRAGMENT(micro, m) {
  m.def("z_loss(Tensor logits, Tensor? mask=None) -> Tensor");
  m.def("z_loss_backward(Tensor grad_loss, Tensor logits, Tensor? mask) -> Tensor");
}
TORCH_LIBRARY_IMPL(micro, Autograd, m) {
  m.impl("z_loss", z_loss_autograd);
  m.impl("z_loss_backward", backward_autograd);
}
TORCH_LIBRARY_IMPL(micro, CPU, m) {
  m.impl("z_loss", forward);
  m.impl("z_loss_backward", backward);
}
TORCH_LIBRARY_IMPL(micro, CUDA, m) {
  m.impl("z_loss", forward);
  m.impl("z_loss_backward", backward);
}
TORCH_LIBRARY_IMPL(micro, Meta, m) {
  m.impl("z_loss", forward_meta);
  m.impl("z_loss_backward", backward_meta);
}

}  // namespace micro
