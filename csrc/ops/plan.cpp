#include "micro/plan.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <limits>
#include <tuple>

#include "micro_kernels/plan.h"
#include "ops/arguments.h"
#include "ops/common.h"

namespace micro {
namespace {

using at::Tensor;
using PlanTensors = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // tokens, experts, offsets, inverse

constexpr char kName[] = "micro::plan";

void check_arguments(const Tensor& ids, int64_t num_experts, const OptionalTensor& weights,
                     const OptionalTensor& mask) {
  const Argument ids_argument{kName, "ids", ids};
  ids_argument.is(at::kInt);
  ids_argument.has_dims(2, "[T, K]");
  TORCH_CHECK_VALUE(ids.sym_size(1).sym_ge(1).expect_true(__FILE__, __LINE__), kName,
                    ": ids must hold at least one expert per token, got ", ids.sym_sizes());
  TORCH_CHECK_VALUE(ids.sym_numel().sym_le(std::numeric_limits<int32_t>::max()).expect_true(__FILE__, __LINE__), kName,
                    ": ids must have fewer than 2^31 elements, because rows are counted in int32, got ",
                    ids.sym_numel());
  TORCH_CHECK_VALUE(num_experts >= 1, kName, ": num_experts must be at least 1, got ", num_experts);
  if (weights) {
    kernel_dtype(kName, *weights);
    const Argument argument{kName, "weights", *weights};
    argument.has_sizes(ids.sym_sizes());
    argument.is_beside("ids", ids);
  }
  if (mask) {
    const Argument argument{kName, "mask", *mask};
    argument.is(at::kBool);
    argument.has_sizes(ids.sym_sizes().slice(0, 1));
    argument.is_beside("ids", ids);
  }
}

PlanTensors allocate(const Tensor& ids, int64_t num_experts) {
  const c10::SymInt rows = ids.sym_numel();
  return {at::empty_symint({rows}, ids.options()), at::empty_symint({rows}, ids.options()),
          at::empty({num_experts + 1}, ids.options()), at::empty_symint(ids.sym_sizes(), ids.options())};
}

PlanTensors forward(const Tensor& ids_, int64_t num_experts, const OptionalTensor& weights_,
                    const OptionalTensor& mask_) {
  check_arguments(ids_, num_experts, weights_, mask_);
  const c10::DeviceGuard device(ids_.device());
  const Tensor ids = ids_.contiguous();
  const OptionalTensor weights = contiguous(weights_), mask = contiguous(mask_);
  auto [tokens, experts, offsets, inverse] = allocate(ids, num_experts);
  const micro_kernels::PlanParams params{
      .ids = ids.const_data_ptr<int32_t>(),
      .weights = weights ? weights->const_data_ptr() : nullptr,
      .mask = mask ? mask->const_data_ptr<bool>() : nullptr,
      .tokens = tokens.mutable_data_ptr<int32_t>(),
      .experts = experts.mutable_data_ptr<int32_t>(),
      .offsets = offsets.mutable_data_ptr<int32_t>(),
      .inverse = inverse.mutable_data_ptr<int32_t>(),
      .token_count = ids.size(0),
      .k = ids.size(1),
      .expert_count = num_experts,
      .dtype = weights ? kernel_dtype(kName, *weights) : micro_kernels::DType::kFloat32,
  };
  check(kName, ids.is_cuda() ? micro_kernels::cuda::plan(params, current_stream(ids))
                             : micro_kernels::cpu::plan(params, parallel_for));
  return {tokens, experts, offsets, inverse};
}

PlanTensors forward_meta(const Tensor& ids, int64_t num_experts, const OptionalTensor& weights,
                         const OptionalTensor& mask) {
  check_arguments(ids, num_experts, weights, mask);
  return allocate(ids, num_experts);
}

auto call_forward() {
  static const auto call = op<decltype(forward)>("micro::plan");
  return call;
}

// Integers carry no gradient, even where the weights do.
PlanTensors forward_autograd(const Tensor& ids, int64_t num_experts, const OptionalTensor& weights,
                             const OptionalTensor& mask) {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return call_forward().call(ids, num_experts, weights, mask);
}

}  // namespace

Plan plan(const Tensor& ids, int64_t num_experts, const OptionalTensor& weights, const OptionalTensor& mask) {
  auto [tokens, experts, offsets, inverse] = call_forward().call(ids, num_experts, weights, mask);
  return {tokens, experts, offsets, inverse};
}

TORCH_LIBRARY_FRAGMENT(micro, m) {
  m.def(
      "plan(Tensor ids, int num_experts, Tensor? weights=None, Tensor? mask=None)"
      " -> (Tensor tokens, Tensor experts, Tensor offsets, Tensor inverse)");
}
TORCH_LIBRARY_IMPL(micro, Autograd, m) { m.impl("plan", forward_autograd); }
TORCH_LIBRARY_IMPL(micro, CPU, m) { m.impl("plan", forward); }
TORCH_LIBRARY_IMPL(micro, CUDA, m) { m.impl("plan", forward); }
TORCH_LIBRARY_IMPL(micro, Meta, m) { m.impl("plan", forward_meta); }

}  // namespace micro
