#include "micro/block_forward.h"

#include <torch/library.h>

#include <string_view>

#include "ops/block_arguments.h"
#include "ops/linear.h"
#include "ops/workspace.h"

namespace micro {
namespace {

using at::Tensor;
using Results = BlockResults;

constexpr char kName[] = "micro::block_forward";

// ---- the op --------------------------------------------------------------------------------------------------------

micro_kernels::Status run_cpu(const micro_kernels::BlockForwardParams& params) {
  const Workspace workspace(micro_kernels::cpu::block_forward_workspace(params));
  return micro_kernels::cpu::block_forward(params, workspace.data(), parallel_for);
}

micro_kernels::Status run_cuda(micro_kernels::BlockForwardParams& params, const Tensor& x) {
  params.tf32 = tf32_allowed();
  const Tensor workspace = device_workspace(x, micro_kernels::cuda::block_forward_workspace(params));
  return micro_kernels::cuda::block_forward(params, workspace.mutable_data_ptr(), current_stream(x));
}

Results forward(const Tensor& x_, const OptionalTensors& parameters, const Tensor& cos_, const Tensor& sin_,
                int64_t heads, bool whole_block, double eps, int64_t slots, int64_t start, const OptionalTensor& keys,
                const OptionalTensor& values, const OptionalTensor& mask_, const OptionalTensor& real_, int64_t k,
                const OptionalTensors& controls, std::string_view weight_rule, bool run_router) {
  const c10::DeviceGuard device(x_.device());
  const BlockArguments in(kName, x_, parameters, cos_, sin_, heads, whole_block, slots, start, mask_, real_, k,
                          controls);
  TORCH_CHECK_VALUE(keys.has_value() == values.has_value() && (keys || start == 0) && start >= 0, kName,
                    ": start > 0 needs keys and values, and those come together; got start = ", start);
  if (keys) check_store(kName, "keys", keys, x_, in.n, start + slots);
  if (keys) check_store(kName, "values", values, x_, in.n, start + slots);
  run_router = run_router || !in.rows;
  auto [y, raw, ids, weights, probs, effective] = allocate_block(in.x, in.n.experts, k, !in.p.router_in, run_router);
  auto params = in.forward(kName, whole_block, eps, k, weight_rule, y, run_router ? raw : Tensor(), ids, weights, probs,
                           effective);
  if (keys)
    params.cache = {.k = keys->mutable_data_ptr(),
                    .v = values->mutable_data_ptr(),
                    .k_strides = strides(keys),
                    .v_strides = strides(values),
                    .x = nullptr,
                    .x_batch_stride = 0,
                    .filled = nullptr,
                    .positions = nullptr,
                    .positions_stride = 0};
  check_block(kName, x_.is_cuda() ? run_cuda(params, in.x) : run_cpu(params), in.n.experts);
  return {y, raw, ids, weights, probs, effective};
}

Results forward_meta(const Tensor& x, const OptionalTensors& parameters, const Tensor&, const Tensor&, int64_t, bool,
                     double, int64_t, int64_t, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                     const OptionalTensor&, int64_t k, const OptionalTensors& controls, std::string_view,
                     bool run_router) {
  const BlockParameters p = parameters_of(kName, parameters);
  return allocate_block(x, p.gate_proj.sym_size(0).guard_int(__FILE__, __LINE__), k, !p.router_in,
                        run_router || !BlockControls(kName, controls).rows);
}

auto call_forward() {
  static const auto call = op<decltype(forward)>("micro::block_forward");
  return call;
}

// Nothing is recorded: a gradient that somebody expects is refused rather than lost.
Results forward_autograd(const Tensor& x, const OptionalTensors& parameters, const Tensor& cos, const Tensor& sin,
                         int64_t heads, bool whole_block, double eps, int64_t slots, int64_t start,
                         const OptionalTensor& keys, const OptionalTensor& values, const OptionalTensor& mask,
                         const OptionalTensor& real, int64_t k, const OptionalTensors& controls,
                         std::string_view weight_rule, bool run_router) {
  bool recorded = must_record(x);
  for (const OptionalTensors& list : {parameters, controls})
    for (const OptionalTensor& tensor : list) recorded = recorded || (tensor && must_record(*tensor));
  TORCH_CHECK(!recorded, kName,
              ": an argument requires a gradient, and this operator has none; call it under no_grad, or use the "
              "separate operators");
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  auto results = call_forward().call(x, parameters, cos, sin, heads, whole_block, eps, slots, start, keys, values, mask,
                                     real, k, controls, weight_rule, run_router);
  for (const OptionalTensor& store : {keys, values})
    if (store && !store->is_inference()) store->unsafeGetTensorImpl()->bump_version();
  return results;
}

}  // namespace

BlockResult block_forward(const Tensor& x, const BlockParameters& parameters, const Tensor& cos, const Tensor& sin,
                          int64_t heads, bool whole_block, double eps, const BlockCall& call, int64_t k,
                          const RouteOptions& options, bool run_router) {
  auto [y, raw, ids, weights, probs, effective] = call_forward().call(
      x, list_of(parameters), cos, sin, heads, whole_block, eps, call.slots, call.start, call.keys, call.values,
      call.mask, call.real, k, list_of(options), rule_name(options.weight_rule), run_router);
  const bool ran = run_router || !options.rows;
  return {y, ran ? OptionalTensor(raw) : std::nullopt, {ids, weights, probs, effective}};
}

TORCH_LIBRARY_FRAGMENT(micro, m) {
  m.def(
      "block_forward(Tensor x, Tensor?[] parameters, Tensor cos, Tensor sin, int heads, bool whole_block, float eps,"
      " int slots, int start, Tensor(a!)? keys, Tensor(b!)? values, Tensor? mask, Tensor? real, int k,"
      " Tensor?[] controls, str weight_rule, bool run_router)"
      " -> (Tensor y, Tensor raw, Tensor ids, Tensor weights, Tensor probs, Tensor effective)");
}
TORCH_LIBRARY_IMPL(micro, Autograd, m) { m.impl("block_forward", forward_autograd); }
TORCH_LIBRARY_IMPL(micro, CPU, m) { m.impl("block_forward", forward); }
TORCH_LIBRARY_IMPL(micro, CUDA, m) { m.impl("block_forward", forward); }
TORCH_LIBRARY_IMPL(micro, Meta, m) { m.impl("block_forward", forward_meta); }

}  // namespace micro
