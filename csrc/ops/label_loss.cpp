#include "micro/label_loss.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "micro_kernels/label_loss.h"
#include "ops/decisions.h"
#include "ops/workspace.h"

namespace micro {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr char kName[] = "micro::label_loss";

Tensor forward_meta(const Tensor& logits, const Tensor& labels, const OptionalTensor& mask,
                    const OptionalTensor& layer_weights) {
  check_decisions(kName, "logits", logits, false);
  check_mask(kName, mask, logits);
  TORCH_CHECK_TYPE(labels.scalar_type() == at::kLong, kName, ": labels must be int64, got ", labels.scalar_type());
  TORCH_CHECK_VALUE(labels.dim() == 1 && same(labels.sym_size(0), logits.sym_size(1)), kName, ": labels must be [",
                    logits.sym_size(1), "], got ", labels.sym_sizes());
  TORCH_CHECK_VALUE(labels.device() == logits.device(), kName, ": labels are on ", labels.device(),
                    " but logits are on ", logits.device());
  if (layer_weights) {
    TORCH_CHECK_VALUE(layer_weights->dim() == 1 && same(layer_weights->sym_size(0), logits.sym_size(0)), kName,
                      ": layer_weights must be [", logits.sym_size(0), "], got ", layer_weights->sym_sizes());
    TORCH_CHECK_TYPE(layer_weights->is_floating_point(), kName, ": layer_weights must be a floating type, got ",
                     layer_weights->scalar_type());
    TORCH_CHECK_VALUE(layer_weights->device() == logits.device(), kName, ": layer_weights are on ",
                      layer_weights->device(), " but logits are on ", logits.device());
  }
  return at::empty({}, logits.options().dtype(accumulator_dtype(logits)));
}

OptionalTensor wide_weights(const OptionalTensor& layer_weights, const Tensor& logits) {
  if (!layer_weights) return std::nullopt;
  return layer_weights->to(logits.options().dtype(accumulator_dtype(logits))).contiguous();
}

const void* pointer(const OptionalTensor& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; }

// An index outside is an expert id here too, but the argument has another name.
void check_status(micro_kernels::Status status) {
  TORCH_CHECK_VALUE(status != micro_kernels::Status::kIndexOutOfRange, kName,
                    ": labels must be expert ids below E, or negative for tokens without a label");
  check(kName, status);
}

Tensor forward(const Tensor& logits_, const Tensor& labels_, const OptionalTensor& mask_,
               const OptionalTensor& layer_weights_) {
  const c10::DeviceGuard device(logits_.device());
  const Tensor loss = forward_meta(logits_, labels_, mask_, layer_weights_);
  const Tensor logits = logits_.contiguous(), labels = labels_.contiguous();
  const OptionalTensor mask = contiguous(mask_), layer_weights = wide_weights(layer_weights_, logits);
  const micro_kernels::LabelLossParams params{
      .logits = logits.const_data_ptr(),
      .labels = labels.const_data_ptr<int64_t>(),
      .mask = mask_pointer(mask),
      .layer_weights = pointer(layer_weights),
      .loss = loss.mutable_data_ptr(),
      .layers = logits.size(0),
      .tokens = logits.size(1),
      .experts = logits.size(2),
      .dtype = kernel_dtype(kName, logits),
  };
  if (logits.is_cuda()) {
    const Tensor workspace = device_workspace(logits, micro_kernels::cuda::label_loss_workspace(params));
    check_status(micro_kernels::cuda::label_loss(params, workspace.mutable_data_ptr(), current_stream(logits)));
  } else {
    check_status(micro_kernels::cpu::label_loss(params, parallel_for));
  }
  return loss;
}

Tensor backward_meta(const Tensor&, const Tensor& logits, const Tensor&, const OptionalTensor&, const OptionalTensor&) {
  return at::empty_like(logits, at::MemoryFormat::Contiguous);
}

Tensor backward(const Tensor& grad_loss_, const Tensor& logits_, const Tensor& labels_, const OptionalTensor& mask_,
                const OptionalTensor& layer_weights_) {
  const c10::DeviceGuard device(logits_.device());
  const Tensor grad_loss = grad_loss_.contiguous(), logits = logits_.contiguous(), labels = labels_.contiguous();
  const OptionalTensor mask = contiguous(mask_), layer_weights = wide_weights(layer_weights_, logits);
  const Tensor grad_logits = at::empty_like(logits);
  const micro_kernels::LabelLossBackwardParams params{
      .grad_loss = grad_loss.const_data_ptr(),
      .logits = logits.const_data_ptr(),
      .labels = labels.const_data_ptr<int64_t>(),
      .mask = mask_pointer(mask),
      .layer_weights = pointer(layer_weights),
      .grad_logits = grad_logits.mutable_data_ptr(),
      .layers = logits.size(0),
      .tokens = logits.size(1),
      .experts = logits.size(2),
      .dtype = kernel_dtype(kName, logits),
  };
  check_status(logits.is_cuda() ? micro_kernels::cuda::label_loss_backward(params, current_stream(logits))
                                : micro_kernels::cpu::label_loss_backward(params, parallel_for));
  return grad_logits;
}

auto call_backward() {
  static const auto call = op<decltype(backward)>("micro::label_loss_backward");
  return call;
}

struct LabelLoss : torch::autograd::Function<LabelLoss> {
  static Tensor forward(AutogradContext* context, const Tensor& logits, const Tensor& labels,
                        const OptionalTensor& mask, const OptionalTensor& layer_weights) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    context->save_for_backward({logits, labels, mask.value_or(Tensor()), layer_weights.value_or(Tensor())});
    return label_loss(logits, labels, mask, layer_weights);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grad) {
    const auto saved = context->get_saved_variables();
    const Tensor grad_logits =
        call_backward().call(grad[0], saved[0], saved[1], optional(saved[2]), optional(saved[3]));
    return {grad_logits, Tensor(), Tensor(), Tensor()};
  }
};

Tensor label_loss_autograd(const Tensor& logits, const Tensor& labels, const OptionalTensor& mask,
                           const OptionalTensor& layer_weights) {
  return LabelLoss::apply(logits, labels, mask, layer_weights);
}

Tensor backward_autograd(const Tensor& grad_loss, const Tensor& logits, const Tensor& labels,
                         const OptionalTensor& mask, const OptionalTensor& layer_weights) {
  refuse_second_derivative(kName, grad_loss, logits);
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return call_backward().call(grad_loss, logits, labels, mask, layer_weights);
}

}  // namespace

Tensor label_loss(const Tensor& logits, const Tensor& labels, const OptionalTensor& mask,
                  const OptionalTensor& layer_weights) {
  static const auto call = op<decltype(label_loss)>(kName);
  return call.call(logits, labels, mask, layer_weights);
}

TORCH_LIBRARY_FRAGMENT(micro, m) {
  m.def("label_loss(Tensor logits, Tensor labels, Tensor? mask=None, Tensor? layer_weights=None) -> Tensor");
  m.def(
      "label_loss_backward(Tensor grad_loss, Tensor logits, Tensor labels, Tensor? mask, Tensor? layer_weights)"
      " -> Tensor");
}
TORCH_LIBRARY_IMPL(micro, Autograd, m) {
  m.impl("label_loss", label_loss_autograd);
  m.impl("label_loss_backward", backward_autograd);
}
TORCH_LIBRARY_IMPL(micro, CPU, m) {
  m.impl("label_loss", forward);
  m.impl("label_loss_backward", backward);
}
TORCH_LIBRARY_IMPL(micro, CUDA, m) {
  m.impl("label_loss", forward);
  m.impl("label_loss_backward", backward);
}
TORCH_LIBRARY_IMPL(micro, Meta, m) {
  m.impl("label_loss", forward_meta);
  m.impl("label_loss_backward", backward_meta);
}

}  // namespace micro
