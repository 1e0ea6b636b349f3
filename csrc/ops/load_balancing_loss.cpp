#include "micro/load_balancing_loss.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <tuple>

#include "micro_kernels/load_balancing_loss.h"
#include "ops/decisions.h"
#include "ops/workspace.h"

namespace micro {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr char kName[] = "micro::load_balancing_loss";

void check_arguments(const Tensor& probs, const Tensor& ids, const OptionalTensor& mask) {
  check_decisions(kName, "probs", probs, true);
  check_mask(kName, mask, probs);
  TORCH_CHECK_TYPE(ids.scalar_type() == at::kInt, kName, ": ids must be int32, got ", ids.scalar_type());
  TORCH_CHECK_VALUE(ids.dim() == 3 && same(ids.sym_sizes().slice(0, 2), probs.sym_sizes().slice(0, 2)), kName,
                    ": ids must be [", probs.sym_size(0), ", ", probs.sym_size(1), ", K], got ", ids.sym_sizes());
  TORCH_CHECK_VALUE(ids.device() == probs.device(), kName, ": ids are on ", ids.device(), " but probs are on ",
                    probs.device());
}

// The loss, and per layer and expert its derivative by the probability of a real token.
std::tuple<Tensor, Tensor> forward_meta(const Tensor& probs, const Tensor& ids, const OptionalTensor& mask, bool) {
  check_arguments(probs, ids, mask);
  return {at::empty({}, probs.options()), at::empty_symint({probs.sym_size(0), probs.sym_size(2)}, probs.options())};
}

std::tuple<Tensor, Tensor> forward(const Tensor& probs_, const Tensor& ids_, const OptionalTensor& mask_, bool pooled) {
  const c10::DeviceGuard device(probs_.device());
  auto [loss, slope] = forward_meta(probs_, ids_, mask_, pooled);
  const Tensor probs = probs_.contiguous(), ids = ids_.contiguous();
  const OptionalTensor mask = contiguous(mask_);
  const micro_kernels::LoadBalancingLossParams params{
      .probs = probs.const_data_ptr(),
      .ids = ids.const_data_ptr<int32_t>(),
      .mask = mask_pointer(mask),
      .loss = loss.mutable_data_ptr(),
      .slope = slope.mutable_data_ptr(),
      .layers = probs.size(0),
      .tokens = probs.size(1),
      .choices = ids.size(2),
      .experts = probs.size(2),
      .pooled = pooled,
      .dtype = kernel_dtype(kName, probs),
  };
  if (probs.is_cuda()) {
    const Tensor workspace = device_workspace(probs, micro_kernels::cuda::load_balancing_loss_workspace(params));
    check(kName, micro_kernels::cuda::load_balancing_loss(params, workspace.mutable_data_ptr(), current_stream(probs)));
  } else {
    check(kName, micro_kernels::cpu::load_balancing_loss(params, parallel_for));
  }
  return {loss, slope};
}

Tensor backward_meta(const Tensor&, const Tensor&, const Tensor& probs, const OptionalTensor&) {
  return at::empty_like(probs, at::MemoryFormat::Contiguous);
}

// Of probs only the shape is read; its values play no part in the gradient.
Tensor backward(const Tensor& grad_loss_, const Tensor& slope, const Tensor& probs, const OptionalTensor& mask_) {
  const c10::DeviceGuard device(probs.device());
  const Tensor grad_loss = grad_loss_.contiguous();
  const Tensor grad_probs = at::empty_like(probs, at::MemoryFormat::Contiguous);
  const OptionalTensor mask = contiguous(mask_);
  const micro_kernels::LoadBalancingLossBackwardParams params{
      .grad_loss = grad_loss.const_data_ptr(),
      .slope = slope.const_data_ptr(),
      .mask = mask_pointer(mask),
      .grad_probs = grad_probs.mutable_data_ptr(),
      .layers = probs.size(0),
      .tokens = probs.size(1),
      .experts = probs.size(2),
      .dtype = kernel_dtype(kName, probs),
  };
  check(kName, probs.is_cuda() ? micro_kernels::cuda::load_balancing_loss_backward(params, current_stream(probs))
                               : micro_kernels::cpu::load_balancing_loss_backward(params, parallel_for));
  return grad_probs;
}

auto call_forward() {
  static const auto call = op<decltype(forward)>("micro::load_balancing_loss_forward");
  return call;
}

auto call_backward() {
  static const auto call = op<decltype(backward)>("micro::load_balancing_loss_backward");
  return call;
}

struct LoadBalancingLoss : torch::autograd::Function<LoadBalancingLoss> {
  static Tensor forward(AutogradContext* context, const Tensor& probs, const Tensor& ids, const OptionalTensor& mask,
                        bool pooled) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    auto [loss, slope] = call_forward().call(probs, ids, mask, pooled);
    context->save_for_backward({slope, probs, mask.value_or(Tensor())});
    return loss;
  }

  static variable_list backward(AutogradContext* context, const variable_list& grad) {
    const auto saved = context->get_saved_variables();
    const Tensor grad_probs = call_backward().call(grad[0], saved[0], saved[1], optional(saved[2]));
    return {grad_probs, Tensor(), Tensor(), Tensor()};
  }
};

Tensor load_balancing_loss_autograd(const Tensor& probs, const Tensor& ids, const OptionalTensor& mask, bool pooled) {
  return LoadBalancingLoss::apply(probs, ids, mask, pooled);
}

Tensor load_balancing_loss_below_autograd(const Tensor& probs, const Tensor& ids, const OptionalTensor& mask,
                                          bool pooled) {
  return std::get<0>(call_forward().call(probs, ids, mask, pooled));
}

Tensor backward_autograd(const Tensor& grad_loss, const Tensor& slope, const Tensor& probs,
                         const OptionalTensor& mask) {
  refuse_second_derivative(kName, grad_loss, probs);
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return call_backward().call(grad_loss, slope, probs, mask);
}

}  // namespace

Tensor load_balancing_loss(const Tensor& probs, const Tensor& ids, const OptionalTensor& mask, bool pooled) {
  static const auto call = op<decltype(load_balancing_loss)>(kName);
  return call.call(probs, ids, mask, pooled);
}

TORCH_LIBRARY_FRAGMENT(micro, m) {
  m.def("load_balancing_loss(Tensor probs, Tensor ids, Tensor? mask=None, bool pooled=True) -> Tensor");
  m.def(
      "load_balancing_loss_forward(Tensor probs, Tensor ids, Tensor? mask, bool pooled)"
      " -> (Tensor loss, Tensor slope)");
  m.def("load_balancing_loss_backward(Tensor grad_loss, Tensor slope, Tensor probs, Tensor? mask) -> Tensor");
}
TORCH_LIBRARY_IMPL(micro, CompositeExplicitAutograd, m) {
  m.impl("load_balancing_loss", load_balancing_loss_below_autograd);
}
TORCH_LIBRARY_IMPL(micro, Autograd, m) {
  m.impl("load_balancing_loss", load_balancing_loss_autograd);
  m.impl("load_balancing_loss_backward", backward_autograd);
}
TORCH_LIBRARY_IMPL(micro, CPU, m) {
  m.impl("load_balancing_loss_forward", forward);
  m.impl("load_balancing_loss_backward", backward);
}
TORCH_LIBRARY_IMPL(micro, CUDA, m) {
  m.impl("load_balancing_loss_forward", forward);
  m.impl("load_balancing_loss_backward", backward);
}
TORCH_LIBRARY_IMPL(micro, Meta, m) {
  m.impl("load_balancing_loss_forward", forward_meta);
  m.impl("load_balancing_loss_backward", backward_meta);
}

}  // namespace micro
