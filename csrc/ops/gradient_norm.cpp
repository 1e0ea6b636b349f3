#include "micro/gradient_norm.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <vector>

#include "micro_kernels/gradient_norm.h"
#include "ops/common.h"
#include "ops/workspace.h"

namespace micro {
namespace {

using at::Tensor;
using at::TensorList;

constexpr char kName[] = "micro::gradient_norm";

// Where the dispatcher sees no tensor of a device that we know.
Tensor forward_elsewhere(TensorList gradients) {
  TORCH_CHECK_VALUE(!gradients.empty(), kName, ": gradients must hold at least one tensor");
  TORCH_CHECK_NOT_IMPLEMENTED(false, kName, ": no kernel for ", gradients[0].device());
}

Tensor forward_meta(TensorList gradients) {
  for (size_t i = 0; i < gradients.size(); ++i) {
    kernel_dtype(kName, gradients[i]);
    TORCH_CHECK_VALUE(gradients[i].device() == gradients[0].device(), kName, ": gradients[", i, "] is on ",
                      gradients[i].device(), " but gradients[0] is on ", gradients[0].device());
  }
  return at::empty({}, gradients[0].options().dtype(at::kDouble));
}

Tensor forward(TensorList gradients) {
  const Tensor norm = forward_meta(gradients);
  const c10::DeviceGuard device(norm.device());
  std::vector<Tensor> kept;
  std::vector<micro_kernels::GradientTensor> tensors;
  for (const Tensor& gradient : gradients) {
    kept.push_back(gradient.is_non_overlapping_and_dense() ? gradient : gradient.contiguous());
    tensors.push_back({kept.back().const_data_ptr(), gradient.numel(), kernel_dtype(kName, gradient)});
  }
  const micro_kernels::GradientNormParams params{
      .tensors = tensors.data(),
      .count = static_cast<int64_t>(tensors.size()),
      .norm = norm.mutable_data_ptr<double>(),
  };
  if (norm.is_cuda()) {
    const Tensor workspace = device_workspace(norm, micro_kernels::cuda::gradient_norm_workspace(params));
    check(kName, micro_kernels::cuda::gradient_norm(params, workspace.mutable_data_ptr(), current_stream(norm)));
  } else {
    check(kName, micro_kernels::cpu::gradient_norm(params, parallel_for));
  }
  return norm;
}

}  // namespace

Tensor gradient_norm(TensorList gradients) {
  static const auto call = op<decltype(gradient_norm)>(kName);
  return call.call(gradients);
}

TORCH_LIBRARY_FRAGMENT(micro, m) { m.def("gradient_norm(Tensor[] gradients) -> Tensor"); }
TORCH_LIBRARY_IMPL(micro, CompositeExplicitAutograd, m) { m.impl("gradient_norm", forward_elsewhere); }
TORCH_LIBRARY_IMPL(micro, CPU, m) { m.impl("gradient_norm", forward); }
TORCH_LIBRARY_IMPL(micro, CUDA, m) { m.impl("gradient_norm", forward); }
TORCH_LIBRARY_IMPL(micro, Meta, m) { m.impl("gradient_norm", forward_meta); }

}  // namespace micro
