#include "micro/stacked_linear.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <array>
#include <tuple>

#include "micro_kernels/stacked_linear.h"
#include "ops/linear.h"

namespace micro {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr char kName[] = "micro::stacked_linear";

void check_arguments(const Tensor& x, const Tensor& weight, const OptionalTensor& offsets) {
  TORCH_CHECK_VALUE(x.dim() == 3, kName, ": x must be [E or 1, T, in], got ", x.sym_sizes());
  check_weight(kName, weight, x);
  TORCH_CHECK_VALUE(
      x.sym_size(0).sym_eq(1).sym_or(x.sym_size(0).sym_eq(weight.sym_size(0))).expect_true(__FILE__, __LINE__), kName,
      ": x has ", x.sym_size(0), " slices; expected 1 or one per expert, ", weight.sym_size(0));
  if (offsets) check_offsets(kName, *offsets, weight.sym_size(0), x);
}

std::vector<bool> used_experts(const OptionalTensor& offsets, int64_t experts) {
  std::vector<bool> used(experts, true);
  if (!offsets) return used;
  const std::vector<int64_t> bounds = expert_bounds(kName, *offsets, -1);
  for (int64_t e = 0; e < experts; ++e) used[e] = bounds[e] < bounds[e + 1];
  return used;
}

// ---- forward -------------------------------------------------------------------------------------------------------

Tensor allocate_forward(const Tensor& x, const Tensor& weight) {
  return at::empty_symint({weight.sym_size(0), x.sym_size(1), weight.sym_size(1)}, x.options());
}

Tensor forward_meta(const Tensor& x, const Tensor& weight, const OptionalTensor& offsets) {
  check_arguments(x, weight, offsets);
  return allocate_forward(x, weight);
}

Tensor forward_cpu(const Tensor& x_, const Tensor& weight_, const OptionalTensor& offsets) {
  check_arguments(x_, weight_, offsets);
  const Tensor x = x_.contiguous(), weight = weight_.contiguous();
  const std::vector<bool> used = used_experts(offsets, weight.size(0));
  Tensor y = allocate_forward(x, weight);
  LinearBatch batch(kName, x);
  for (int64_t e = 0; e < weight.size(0); ++e) {
    if (used[e]) {
      batch.product(x[x.size(0) == 1 ? 0 : e], weight[e], y[e]);
    } else {
      y[e].zero_();
    }
  }
  batch.run();
  return y;
}

Tensor forward_cuda(const Tensor& x_, const Tensor& weight_, const OptionalTensor& offsets_) {
  check_arguments(x_, weight_, offsets_);
  const c10::DeviceGuard device(x_.device());
  const Tensor x = x_.contiguous(), weight = weight_.contiguous();
  const OptionalTensor offsets = contiguous(offsets_);
  Tensor y = allocate_forward(x, weight);
  const micro_kernels::StackedLinearParams params{
      .x = x.const_data_ptr(),
      .weight = weight.const_data_ptr(),
      .offsets = offsets ? offsets->const_data_ptr<int32_t>() : nullptr,
      .y = y.mutable_data_ptr(),
      .inputs = x.size(0),
      .tokens = x.size(1),
      .experts = weight.size(0),
      .in = weight.size(2),
      .out = weight.size(1),
      .dtype = kernel_dtype(kName, x),
      .tf32 = tf32_allowed(),
  };
  check(kName, micro_kernels::cuda::stacked_linear(params, current_stream(x)));
  return y;
}

// ---- backward ------------------------------------------------------------------------------------------------------

// wanted: gradients of {x, weight}; what is not wanted is not computed and comes back undefined.
std::tuple<Tensor, Tensor> allocate_backward(const Tensor& x, const Tensor& weight, std::array<bool, 2> wanted) {
  return {wanted[0] ? at::empty_like(x, at::MemoryFormat::Contiguous) : Tensor(),
          wanted[1] ? at::empty_like(weight, at::MemoryFormat::Contiguous) : Tensor()};
}

std::tuple<Tensor, Tensor> backward_meta(const Tensor&, const Tensor& x, const Tensor& weight, const OptionalTensor&,
                                         std::array<bool, 2> wanted) {
  return allocate_backward(x, weight, wanted);
}

// Where all experts read the same x its gradient is the sum over experts, in one chain, so that bfloat16 is rounded
// once.
std::tuple<Tensor, Tensor> backward_cpu(const Tensor& grad_y_, const Tensor& x_, const Tensor& weight_,
                                        const OptionalTensor& offsets, std::array<bool, 2> wanted) {
  const Tensor grad_y = grad_y_.contiguous(), x = x_.contiguous(), weight = weight_.contiguous();
  const std::vector<bool> used = used_experts(offsets, weight.size(0));
  const bool shared = x.size(0) == 1;
  auto [grad_x, grad_weight] = allocate_backward(x, weight, wanted);
  LinearBatch batch(kName, x);
  std::vector<std::pair<Tensor, Tensor>> sources;
  for (int64_t e = 0; e < weight.size(0); ++e) {
    if (wanted[1]) {
      Tensor matrix = grad_weight[e];
      used[e] ? batch.grad_weight(grad_y[e], x[shared ? 0 : e], matrix, false) : void(matrix.zero_());
    }
    if (used[e]) sources.emplace_back(grad_y[e], weight[e]);
    if (wanted[0] && (!shared || e + 1 == weight.size(0))) {
      batch.grad_x(sources, grad_x[shared ? 0 : e]);
      sources.clear();
    }
  }
  batch.run();
  return {grad_x, grad_weight};
}

std::tuple<Tensor, Tensor> backward_cuda(const Tensor& grad_y_, const Tensor& x_, const Tensor& weight_,
                                         const OptionalTensor& offsets_, std::array<bool, 2> wanted) {
  const c10::DeviceGuard device(x_.device());
  const Tensor grad_y = grad_y_.contiguous(), x = x_.contiguous(), weight = weight_.contiguous();
  const OptionalTensor offsets = contiguous(offsets_);
  auto [grad_x, grad_weight] = allocate_backward(x, weight, wanted);
  const micro_kernels::StackedLinearBackwardParams params{
      .grad_y = grad_y.const_data_ptr(),
      .x = x.const_data_ptr(),
      .weight = weight.const_data_ptr(),
      .offsets = offsets ? offsets->const_data_ptr<int32_t>() : nullptr,
      .grad_x = wanted[0] ? grad_x.mutable_data_ptr() : nullptr,
      .grad_weight = wanted[1] ? grad_weight.mutable_data_ptr() : nullptr,
      .inputs = x.size(0),
      .tokens = x.size(1),
      .experts = weight.size(0),
      .in = weight.size(2),
      .out = weight.size(1),
      .dtype = kernel_dtype(kName, x),
      .tf32 = tf32_allowed(),
  };
  check(kName, micro_kernels::cuda::stacked_linear_backward(params, current_stream(x)));
  return {grad_x, grad_weight};
}

// ---- autograd ------------------------------------------------------------------------------------------------------

auto call_forward() {
  static const auto call = op<Tensor(const Tensor&, const Tensor&, const OptionalTensor&)>("micro::stacked_linear");
  return call;
}

auto call_backward() {
  static const auto call = op<decltype(backward_cpu)>("micro::stacked_linear_backward");
  return call;
}

struct StackedLinear : torch::autograd::Function<StackedLinear> {
  static Tensor forward(AutogradContext* context, const Tensor& x, const Tensor& weight,
                        const OptionalTensor& offsets) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    context->save_for_backward({x, weight, offsets.value_or(Tensor())});
    return call_forward().call(x, weight, offsets);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grad) {
    const auto saved = context->get_saved_variables();
    const OptionalTensor offsets = saved[2].defined() ? OptionalTensor(saved[2]) : std::nullopt;
    const std::array<bool, 2> wanted{context->needs_input_grad(0), context->needs_input_grad(1)};
    auto [grad_x, grad_weight] = call_backward().call(grad[0], saved[0], saved[1], offsets, wanted);
    return {grad_x, grad_weight, Tensor()};
  }
};

Tensor forward_autograd(const Tensor& x, const Tensor& weight, const OptionalTensor& offsets) {
  return StackedLinear::apply(x, weight, offsets);
}

std::tuple<Tensor, Tensor> backward_autograd(const Tensor& grad_y, const Tensor& x, const Tensor& weight,
                                             const OptionalTensor& offsets, std::array<bool, 2> wanted) {
  refuse_second_derivative(kName, grad_y, x, weight);
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return call_backward().call(grad_y, x, weight, offsets, wanted);
}

Tensor forward_autocast(const Tensor& x, const Tensor& weight, const OptionalTensor& offsets) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  return stacked_linear(lower_precision(x), lower_precision(weight), offsets);
}

}  // namespace

Tensor stacked_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& offsets) {
  return call_forward().call(x, weight, offsets);
}

TORCH_LIBRARY_FRAGMENT(micro, m) {
  m.def("stacked_linear(Tensor x, Tensor weight, Tensor? offsets=None) -> Tensor");
  m.def(
      "stacked_linear_backward(Tensor grad_y, Tensor x, Tensor weight, Tensor? offsets, bool[2] wanted)"
      " -> (Tensor grad_x, Tensor grad_weight)");
}
TORCH_LIBRARY_IMPL(micro, Autograd, m) {
  m.impl("stacked_linear", forward_autograd);
  m.impl("stacked_linear_backward", backward_autograd);
}
TORCH_LIBRARY_IMPL(micro, AutocastCPU, m) { m.impl("stacked_linear", forward_autocast); }
TORCH_LIBRARY_IMPL(micro, AutocastCUDA, m) { m.impl("stacked_linear", forward_autocast); }
TORCH_LIBRARY_IMPL(micro, CPU, m) {
  m.impl("stacked_linear", forward_cpu);
  m.impl("stacked_linear_backward", backward_cpu);
}
TORCH_LIBRARY_IMPL(micro, CUDA, m) {
  m.impl("stacked_linear", forward_cuda);
  m.impl("stacked_linear_backward", backward_cuda);
}
TORCH_LIBRARY_IMPL(micro, Meta, m) {
  m.impl("stacked_linear", forward_meta);
  m.impl("stacked_linear_backward", backward_meta);
}

}  // namespace micro
