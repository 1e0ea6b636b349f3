#include "micro/adamw_step.h"

#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <vector>

#include "micro_kernels/adamw_step.h"
#include "ops/common.h"

namespace micro {
namespace {

using at::Tensor;
using at::TensorList;

constexpr char kName[] = "micro::adamw_step";

// ---- checks --------------------------------------------------------------------------------------------------------

void check_scalars(int64_t step, double learning_rate, double beta1, double beta2, double eps, double weight_decay) {
  TORCH_CHECK_VALUE(step >= 1, kName, ": step must be at least 1, got ", step);
  TORCH_CHECK_VALUE(learning_rate >= 0, kName, ": learning_rate must not be negative, got ", learning_rate);
  TORCH_CHECK_VALUE(beta1 >= 0 && beta1 < 1, kName, ": beta1 must lie in [0, 1), got ", beta1);
  TORCH_CHECK_VALUE(beta2 >= 0 && beta2 < 1, kName, ": beta2 must lie in [0, 1), got ", beta2);
  TORCH_CHECK_VALUE(eps >= 0, kName, ": eps must not be negative, got ", eps);
  TORCH_CHECK_VALUE(weight_decay >= 0, kName, ": weight_decay must not be negative, got ", weight_decay);
}

// Elements at the same place in memory belong together, so that all tensors are walked as flat arrays.
bool same_layout(const Tensor& a, const Tensor& b) {
  return (a.is_contiguous() && b.is_contiguous()) || a.strides() == b.strides();
}

void check_partner(const char* what, size_t index, const Tensor& partner, const Tensor& parameter, at::ScalarType dtype,
                   bool in_place) {
  TORCH_CHECK_VALUE(partner.sizes() == parameter.sizes(), kName, ": ", what, "[", index, "] must be ",
                    parameter.sizes(), ", got ", partner.sizes());
  TORCH_CHECK_TYPE(partner.scalar_type() == dtype, kName, ": ", what, "[", index, "] must be ", dtype, ", got ",
                   partner.scalar_type());
  TORCH_CHECK_VALUE(partner.device() == parameter.device(), kName, ": ", what, "[", index, "] is on ", partner.device(),
                    " but the parameter is on ", parameter.device());
  TORCH_CHECK_VALUE(!in_place || same_layout(partner, parameter), kName, ": ", what, "[", index,
                    "] must have the memory layout of its parameter, strides ", parameter.strides(), ", got ",
                    partner.strides());
}

void check_parameter(size_t index, const Tensor& parameter, const Tensor& first, bool has_masters) {
  kernel_dtype(kName, parameter);
  TORCH_CHECK_VALUE(parameter.is_non_overlapping_and_dense(), kName, ": parameters[", index,
                    "] must be dense, got strides ", parameter.strides(), " for ", parameter.sizes());
  const bool narrow = parameter.element_size() < 4;
  TORCH_CHECK_TYPE(
      narrow == has_masters, kName, ": parameters[", index, "] is ", parameter.scalar_type(),
      has_masters ? ": masters belong to parameters of 16 bits only" : ": parameters of 16 bits need float32 masters");
  TORCH_CHECK_VALUE(first.device().type() == parameter.device().type(), kName, ": first_moments[", index, "] is on ",
                    first.device(), " but the parameter is on ", parameter.device());
  TORCH_CHECK(!(at::GradMode::is_enabled() && parameter.requires_grad()), kName, ": parameters[", index,
              "] requires gradients and would be changed in place: call adamw_step under no_grad");
}

void check_tensors(TensorList parameters, TensorList gradients, TensorList first, TensorList second,
                   TensorList masters) {
  const size_t count = parameters.size();
  TORCH_CHECK_VALUE(gradients.size() == count && first.size() == count && second.size() == count, kName, ": got ",
                    count, " parameters, ", gradients.size(), " gradients, ", first.size(), " first and ",
                    second.size(), " second moments");
  TORCH_CHECK_VALUE(masters.empty() || masters.size() == count, kName, ": masters must be empty or have ", count,
                    " tensors, got ", masters.size());
  for (size_t i = 0; i < count; ++i) {
    const at::ScalarType wide = accumulator_dtype(parameters[i]);
    TORCH_CHECK_VALUE(parameters[i].device() == parameters[0].device(), kName, ": parameters[", i, "] is on ",
                      parameters[i].device(), " but parameters[0] is on ", parameters[0].device());
    check_parameter(i, parameters[i], first[i], !masters.empty());
    check_partner("gradients", i, gradients[i], parameters[i], parameters[i].scalar_type(), false);
    check_partner("first_moments", i, first[i], parameters[i], wide, true);
    check_partner("second_moments", i, second[i], parameters[i], wide, true);
    if (!masters.empty()) check_partner("masters", i, masters[i], parameters[i], at::kFloat, true);
  }
}

// ---- the step ------------------------------------------------------------------------------------------------------

Tensor in_layout_of(const Tensor& gradient, const Tensor& parameter) {
  return same_layout(gradient, parameter) ? gradient : at::empty_like(parameter).copy_(gradient);
}

// Autograd notices a saved tensor that was changed in place by its version.
void mark_changed(TensorList tensors) {
  for (const Tensor& tensor : tensors)
    if (!tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
}

void step_all(TensorList parameters, TensorList gradients, TensorList first, TensorList second, TensorList masters,
              int64_t step, double learning_rate, double beta1, double beta2, double eps, double weight_decay,
              double gradient_scale) {
  check_scalars(step, learning_rate, beta1, beta2, eps, weight_decay);
  check_tensors(parameters, gradients, first, second, masters);
  if (parameters.empty()) return;
  const c10::DeviceGuard device(parameters[0].device());
  std::vector<Tensor> kept;  // gradients that had to be copied live until the kernel is done
  std::vector<micro_kernels::AdamWTensor> tensors;
  for (size_t i = 0; i < parameters.size(); ++i) {
    kept.push_back(in_layout_of(gradients[i], parameters[i]));
    tensors.push_back({.parameter = parameters[i].mutable_data_ptr(),
                       .gradient = kept.back().const_data_ptr(),
                       .first_moment = first[i].mutable_data_ptr(),
                       .second_moment = second[i].mutable_data_ptr(),
                       .master = masters.empty() ? nullptr : masters[i].mutable_data_ptr(),
                       .size = parameters[i].numel(),
                       .dtype = kernel_dtype(kName, parameters[i])});
  }
  const micro_kernels::AdamWStepParams params{
      .tensors = tensors.data(),
      .count = static_cast<int64_t>(tensors.size()),
      .step = step,
      .learning_rate = learning_rate,
      .beta1 = beta1,
      .beta2 = beta2,
      .eps = eps,
      .weight_decay = weight_decay,
      .gradient_scale = gradient_scale,
  };
  check(kName, parameters[0].is_cuda() ? micro_kernels::cuda::adamw_step(params, current_stream(parameters[0]))
                                       : micro_kernels::cpu::adamw_step(params, parallel_for));
  for (const TensorList changed : {parameters, first, second, masters}) mark_changed(changed);
}

void step_meta(TensorList parameters, TensorList gradients, TensorList first, TensorList second, TensorList masters,
               int64_t step, double learning_rate, double beta1, double beta2, double eps, double weight_decay,
               double) {
  check_scalars(step, learning_rate, beta1, beta2, eps, weight_decay);
  check_tensors(parameters, gradients, first, second, masters);
}

// Where the dispatcher sees no tensor of a device that we know: without parameters there is nothing to do.
void step_elsewhere(TensorList parameters, TensorList, TensorList, TensorList, TensorList, int64_t, double, double,
                    double, double, double, double) {
  TORCH_CHECK_NOT_IMPLEMENTED(parameters.empty(), kName, ": no kernel for ", parameters[0].device());
}

}  // namespace

void adamw_step(TensorList parameters, TensorList gradients, TensorList first_moments, TensorList second_moments,
                TensorList masters, int64_t step, double learning_rate, double beta1, double beta2, double eps,
                double weight_decay, double gradient_scale) {
  static const auto call = op<decltype(adamw_step)>(kName);
  call.call(parameters, gradients, first_moments, second_moments, masters, step, learning_rate, beta1, beta2, eps,
            weight_decay, gradient_scale);
}

TORCH_LIBRARY_FRAGMENT(micro, m) {
  m.def(
      "adamw_step(Tensor(a!)[] parameters, Tensor[] gradients, Tensor(b!)[] first_moments,"
      " Tensor(c!)[] second_moments, Tensor(d!)[] masters, *, int step, float learning_rate, float beta1=0.9,"
      " float beta2=0.999, float eps=1e-08, float weight_decay=0.0, float gradient_scale=1.0) -> ()");
}
TORCH_LIBRARY_IMPL(micro, CompositeExplicitAutograd, m) { m.impl("adamw_step", step_elsewhere); }
TORCH_LIBRARY_IMPL(micro, CPU, m) { m.impl("adamw_step", step_all); }
TORCH_LIBRARY_IMPL(micro, CUDA, m) { m.impl("adamw_step", step_all); }
TORCH_LIBRARY_IMPL(micro, Meta, m) { m.impl("adamw_step", step_meta); }

}  // namespace micro
