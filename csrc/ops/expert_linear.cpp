#include "micro/expert_linear.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <array>
#include <tuple>

#include "ops/linear.h"

namespace micro {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr char kName[] = "micro::expert_linear";

void check_arguments(const Tensor& x, const Tensor& weight, const Tensor& offsets) {
  TORCH_CHECK_VALUE(x.dim() == 2, kName, ": x must be [N, in], got ", x.sym_sizes());
  check_weight(kName, weight, x);
  check_offsets(kName, offsets, weight.sym_size(0), x);
}

// ---- forward -------------------------------------------------------------------------------------------------------

Tensor allocate_forward(const Tensor& x, const Tensor& weight) {
  return at::empty_symint({x.sym_size(0), weight.sym_size(1)}, x.options());
}

Tensor forward_meta(const Tensor& x, const Tensor& weight, const Tensor& offsets) {
  check_arguments(x, weight, offsets);
  return allocate_forward(x, weight);
}

Tensor forward_cpu(const Tensor& x_, const Tensor& weight_, const Tensor& offsets) {
  check_arguments(x_, weight_, offsets);
  const Tensor x = x_.contiguous(), weight = weight_.contiguous();
  const std::vector<int64_t> bounds = expert_bounds(kName, offsets, x.size(0));
  Tensor y = allocate_forward(x, weight);
  LinearBatch batch(kName, x);
  for (int64_t e = 0; e < weight.size(0); ++e)
    batch.product(x.slice(0, bounds[e], bounds[e + 1]), weight[e], y.slice(0, bounds[e], bounds[e + 1]));
  batch.run();
  y.slice(0, bounds.back()).zero_();
  return y;
}

Tensor forward_cuda(const Tensor& x_, const Tensor& weight_, const Tensor& offsets_) {
  check_arguments(x_, weight_, offsets_);
  const c10::DeviceGuard device(x_.device());
  const Tensor x = x_.contiguous(), weight = weight_.contiguous(), offsets = offsets_.contiguous();
  Tensor y = allocate_forward(x, weight);
  const micro_kernels::ExpertLinearParams params{
      .x = x.const_data_ptr(),
      .weight = weight.const_data_ptr(),
      .offsets = offsets.const_data_ptr<int32_t>(),
      .y = y.mutable_data_ptr(),
      .rows = x.size(0),
      .experts = weight.size(0),
      .in = weight.size(2),
      .out = weight.size(1),
      .dtype = kernel_dtype(kName, x),
      .tf32 = tf32_allowed(),
  };
  check(kName, micro_kernels::cuda::expert_linear(params, current_stream(x)));
  return y;
}

// ---- backward: grad_x = grad_y weight, grad_weight = grad_y^T x, per expert ----------------------------------------

// wanted: gradients of {x, weight}; what is not wanted is not computed and comes back undefined.
std::tuple<Tensor, Tensor> allocate_backward(const Tensor& x, const Tensor& weight, std::array<bool, 2> wanted) {
  return {wanted[0] ? at::empty_like(x, at::MemoryFormat::Contiguous) : Tensor(),
          wanted[1] ? at::empty_like(weight, at::MemoryFormat::Contiguous) : Tensor()};
}

std::tuple<Tensor, Tensor> backward_meta(const Tensor&, const Tensor& x, const Tensor& weight, const Tensor&,
                                         std::array<bool, 2> wanted) {
  return allocate_backward(x, weight, wanted);
}

std::tuple<Tensor, Tensor> backward_cpu(const Tensor& grad_y_, const Tensor& x_, const Tensor& weight_,
                                        const Tensor& offsets, std::array<bool, 2> wanted) {
  const Tensor grad_y = grad_y_.contiguous(), x = x_.contiguous(), weight = weight_.contiguous();
  const std::vector<int64_t> bounds = expert_bounds(kName, offsets, x.size(0));
  auto [grad_x, grad_weight] = allocate_backward(x, weight, wanted);
  LinearBatch batch(kName, x);
  for (int64_t e = 0; e < weight.size(0); ++e) {
    const auto rows = [&](const Tensor& t) { return t.slice(0, bounds[e], bounds[e + 1]); };
    if (wanted[0]) batch.grad_x({{rows(grad_y), weight[e]}}, rows(grad_x));
    if (wanted[1]) batch.grad_weight(rows(grad_y), rows(x), grad_weight[e], false);
  }
  batch.run();
  if (wanted[0]) grad_x.slice(0, bounds.back()).zero_();
  return {grad_x, grad_weight};
}

std::tuple<Tensor, Tensor> backward_cuda(const Tensor& grad_y_, const Tensor& x_, const Tensor& weight_,
                                         const Tensor& offsets_, std::array<bool, 2> wanted) {
  const c10::DeviceGuard device(x_.device());
  const Tensor grad_y = grad_y_.contiguous(), x = x_.contiguous(), weight = weight_.contiguous();
  const Tensor offsets = offsets_.contiguous();
  auto [grad_x, grad_weight] = allocate_backward(x, weight, wanted);
  const micro_kernels::ExpertLinearBackwardParams params{
      .grad_y = grad_y.const_data_ptr(),
      .x = x.const_data_ptr(),
      .weight = weight.const_data_ptr(),
      .offsets = offsets.const_data_ptr<int32_t>(),
      .grad_x = wanted[0] ? grad_x.mutable_data_ptr() : nullptr,
      .grad_weight = wanted[1] ? grad_weight.mutable_data_ptr() : nullptr,
      .rows = x.size(0),
      .experts = weight.size(0),
      .in = weight.size(2),
      .out = weight.size(1),
      .dtype = kernel_dtype(kName, x),
      .tf32 = tf32_allowed(),
  };
  check(kName, micro_kernels::cuda::expert_linear_backward(params, current_stream(x)));
  return {grad_x, grad_weight};
}

// ---- autograd ------------------------------------------------------------------------------------------------------

auto call_forward() {
  static const auto call = op<Tensor(const Tensor&, const Tensor&, const Tensor&)>("micro::expert_linear");
  return call;
}

auto call_backward() {
  static const auto call = op<decltype(backward_cpu)>("micro::expert_linear_backward");
  return call;
}

struct ExpertLinear : torch::autograd::Function<ExpertLinear> {
  static Tensor forward(AutogradContext* context, const Tensor& x, const Tensor& weight, const Tensor& offsets) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    context->save_for_backward({x, weight, offsets});
    return call_forward().call(x, weight, offsets);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grad) {
    const auto saved = context->get_saved_variables();
    const std::array<bool, 2> wanted{context->needs_input_grad(0), context->needs_input_grad(1)};
    auto [grad_x, grad_weight] = call_backward().call(grad[0], saved[0], saved[1], saved[2], wanted);
    return {grad_x, grad_weight, Tensor()};
  }
};

Tensor forward_autograd(const Tensor& x, const Tensor& weight, const Tensor& offsets) {
  return ExpertLinear::apply(x, weight, offsets);
}

std::tuple<Tensor, Tensor> backward_autograd(const Tensor& grad_y, const Tensor& x, const Tensor& weight,
                                             const Tensor& offsets, std::array<bool, 2> wanted) {
  refuse_second_derivative(kName, grad_y, x, weight);
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return call_backward().call(grad_y, x, weight, offsets, wanted);
}

Tensor forward_autocast(const Tensor& x, const Tensor& weight, const Tensor& offsets) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  return expert_linear(lower_precision(x), lower_precision(weight), offsets);
}

}  // namespace

Tensor expert_linear(const Tensor& x, const Tensor& weight, const Tensor& offsets) {
  return call_forward().call(x, weight, offsets);
}

TORCH_LIBRARY_FRAGMENT(micro, m) {
  m.def("expert_linear(Tensor x, Tensor weight, Tensor offsets) -> Tensor");
  m.def(
      "expert_linear_backward(Tensor grad_y, Tensor x, Tensor weight, Tensor offsets, bool[2] wanted)"
      " -> (Tensor grad_x, Tensor grad_weight)");
}
TORCH_LIBRARY_IMPL(micro, Autograd, m) {
  m.impl("expert_linear", forward_autograd);
  m.impl("expert_linear_backward", backward_autograd);
}
TORCH_LIBRARY_IMPL(micro, AutocastCPU, m) { m.impl("expert_linear", forward_autocast); }
TORCH_LIBRARY_IMPL(micro, AutocastCUDA, m) { m.impl("expert_linear", forward_autocast); }
TORCH_LIBRARY_IMPL(micro, CPU, m) {
  m.impl("expert_linear", forward_cpu);
  m.impl("expert_linear_backward", backward_cpu);
}
TORCH_LIBRARY_IMPL(micro, CUDA, m) {
  m.impl("expert_linear", forward_cuda);
  m.impl("expert_linear_backward", backward_cuda);
}
TORCH_LIBRARY_IMPL(micro, Meta, m) {
  m.impl("expert_linear", forward_meta);
  m.impl("expert_linear_backward", backward_meta);
}

}  // namespace micro
