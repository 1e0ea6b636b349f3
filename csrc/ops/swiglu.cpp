#include "micro/swiglu.h"

#include <ATen/autocast_mode.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <tuple>

#include "micro_kernels/swiglu.h"
#include "ops/arguments.h"
#include "ops/common.h"

namespace micro {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr char kName[] = "micro::swiglu";

void check_arguments(const Tensor& gate, const Tensor& up) {
  kernel_dtype(kName, gate);
  const Argument argument{kName, "up", up};
  argument.is(gate.scalar_type());
  argument.has_sizes(gate.sym_sizes());
  argument.is_beside("gate", gate);
}

Tensor allocate(const Tensor& like) { return at::empty_like(like, at::MemoryFormat::Contiguous); }

// ---- forward and backward, one function for both devices -----------------------------------------------------------

Tensor forward(const Tensor& gate_, const Tensor& up_) {
  check_arguments(gate_, up_);
  const c10::DeviceGuard device(gate_.device());
  const Tensor gate = gate_.contiguous(), up = up_.contiguous();
  Tensor y = allocate(gate);
  const micro_kernels::SwigluParams params{
      .gate = gate.const_data_ptr(),
      .up = up.const_data_ptr(),
      .y = y.mutable_data_ptr(),
      .count = gate.numel(),
      .dtype = kernel_dtype(kName, gate),
  };
  check(kName, gate.is_cuda() ? micro_kernels::cuda::swiglu(params, current_stream(gate))
                              : micro_kernels::cpu::swiglu(params, parallel_for));
  return y;
}

Tensor forward_meta(const Tensor& gate, const Tensor& up) {
  check_arguments(gate, up);
  return allocate(gate);
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad_y_, const Tensor& gate_, const Tensor& up_) {
  const c10::DeviceGuard device(gate_.device());
  const Tensor grad_y = grad_y_.contiguous(), gate = gate_.contiguous(), up = up_.contiguous();
  Tensor grad_gate = allocate(gate), grad_up = allocate(gate);
  const micro_kernels::SwigluBackwardParams params{
      .grad_y = grad_y.const_data_ptr(),
      .gate = gate.const_data_ptr(),
      .up = up.const_data_ptr(),
      .grad_gate = grad_gate.mutable_data_ptr(),
      .grad_up = grad_up.mutable_data_ptr(),
      .count = gate.numel(),
      .dtype = kernel_dtype(kName, gate),
  };
  check(kName, gate.is_cuda() ? micro_kernels::cuda::swiglu_backward(params, current_stream(gate))
                              : micro_kernels::cpu::swiglu_backward(params, parallel_for));
  return {grad_gate, grad_up};
}

std::tuple<Tensor, Tensor> backward_meta(const Tensor&, const Tensor& gate, const Tensor&) {
  return {allocate(gate), allocate(gate)};
}

// ---- autograd: both directions go through the dispatcher, so that tracing sees them --------------------------------

auto call_forward() {
  static const auto call = op<decltype(forward)>("micro::swiglu");
  return call;
}

auto call_backward() {
  static const auto call = op<decltype(backward)>("micro::swiglu_backward");
  return call;
}

struct Swiglu : torch::autograd::Function<Swiglu> {
  static Tensor forward(AutogradContext* context, const Tensor& gate, const Tensor& up) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    context->save_for_backward({gate, up});
    return call_forward().call(gate, up);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grad) {
    const auto saved = context->get_saved_variables();
    auto [grad_gate, grad_up] = call_backward().call(grad[0], saved[0], saved[1]);
    return {grad_gate, grad_up};
  }
};

Tensor forward_autograd(const Tensor& gate, const Tensor& up) {
  if (must_record(gate, up)) return Swiglu::apply(gate, up);
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return call_forward().call(gate, up);
}

std::tuple<Tensor, Tensor> backward_autograd(const Tensor& grad_y, const Tensor& gate, const Tensor& up) {
  refuse_second_derivative(kName, grad_y, gate, up);
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return call_backward().call(grad_y, gate, up);
}

Tensor forward_autocast(const Tensor& gate, const Tensor& up) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const at::ScalarType wider = c10::promoteTypes(gate.scalar_type(), up.scalar_type());
  return swiglu(gate.to(wider), up.to(wider));
}

}  // namespace

Tensor swiglu(const Tensor& gate, const Tensor& up) { return call_forward().call(gate, up); }

TORCH_LIBRARY_FRAGMENT(micro, m) {
  m.def("swiglu(Tensor gate, Tensor up) -> Tensor");
  m.def("swiglu_backward(Tensor grad_y, Tensor gate, Tensor up) -> (Tensor grad_gate, Tensor grad_up)");
}
TORCH_LIBRARY_IMPL(micro, Autograd, m) {
  m.impl("swiglu", forward_autograd);
  m.impl("swiglu_backward", backward_autograd);
}
TORCH_LIBRARY_IMPL(micro, AutocastCPU, m) { m.impl("swiglu", forward_autocast); }
TORCH_LIBRARY_IMPL(micro, AutocastCUDA, m) { m.impl("swiglu", forward_autocast); }
TORCH_LIBRARY_IMPL(micro, CPU, m) {
  m.impl("swiglu", forward);
  m.impl("swiglu_backward", backward);
}
TORCH_LIBRARY_IMPL(micro, CUDA, m) {
  m.impl("swiglu", forward);
  m.impl("swiglu_backward", backward);
}
TORCH_LIBRARY_IMPL(micro, Meta, m) {
  m.impl("swiglu", forward_meta);
  m.impl("swiglu_backward", backward_meta);
}

}  // namespace micro
