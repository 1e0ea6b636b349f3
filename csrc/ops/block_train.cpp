#include "micro/block_train.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <array>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "micro_kernels/block_train.h"
#include "ops/block_arguments.h"
#include "ops/linear.h"
#include "ops/workspace.h"

namespace micro {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Tensors = std::vector<Tensor>;
// The six results of a layer, and what the backward pass reads.
using Recorded = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensors>;

constexpr char kName[] = "micro::block_train";
constexpr int64_t kMostSureExperts = 32;          // the largest of so many probabilities is not tiny (block_train.h)
constexpr size_t kSaved = 14;                     // tensors of BlockSaved, in its order
constexpr size_t kWanted = kBlockParameters + 2;  // gradients: x, the parameters in their order, the logits
using Wanted = std::array<bool, kWanted>;
constexpr size_t kWantsX = 0, kWantsParameter = 1;  // and, last, the logits

// ---- what is kept --------------------------------------------------------------------------------------------------

bool saves(std::string_view activations) {
  TORCH_CHECK_VALUE(activations == "save" || activations == "recompute", kName,
                    ": activations must be save or recompute, got '", std::string(activations), "'");
  return activations == "save";
}

// Sizes of the tensors of BlockSaved; what is not kept is empty.
Tensors allocate_saved(const Tensor& x, const BlockParameters& p, const Tensor& cos, int64_t heads, int64_t slots,
                       int64_t k, const BlockControls& controls, bool run_router, std::string_view weight_rule,
                       bool save) {
  const bool given = controls.rows.has_value();
  const c10::SymInt tokens = x.dim() == 3 ? x.sym_size(0) * x.sym_size(1) : x.sym_size(0), pairs = tokens * k;
  const c10::SymInt hidden = x.sym_size(-1), inner = p.gate_proj.sym_size(1), size = cos.sym_size(1) * 2;
  const c10::SymInt experts = p.gate_proj.sym_size(0), groups = p.k_proj.sym_size(1) / size;
  // The weight of a token's only expert is 1: its gradient hardly ever needs the expert's output.
  const bool weights_learn =
      !given && (k > 1 || weight_rule != rule_name(WeightRule::kRenormalized) || x.scalar_type() == at::kDouble);
  // It does where the expert's probability is tiny, and there CUDA cannot look before it decides what to compute.
  const bool may_be_tiny = controls.replay || experts.guard_int(__FILE__, __LINE__) > kMostSureExperts;
  const bool keeps_mid = save && (given ? run_router : weights_learn);
  const bool keeps_out =
      (save && (weights_learn || p.post_ffn_norm)) || (x.is_cuda() && !given && !weights_learn && may_be_tiny);
  const auto make = [&](const at::TensorOptions& options, c10::SymIntArrayRef sizes, bool kept = true) {
    return kept ? at::empty_symint(sizes, options) : at::empty({0}, options);
  };
  const auto own = x.options(), integers = own.dtype(at::kInt), wide = own.dtype(accumulator_dtype(x));
  const c10::SymDimVector keys{tokens / slots, experts, groups, slots, size};
  return {make(integers, {pairs}),
          make(integers, {pairs}),
          make(integers, {experts + 1}),
          make(integers, {tokens, k}),
          make(own, {pairs, heads, size}),
          make(own, keys),
          make(own, keys),
          make(own, {pairs, heads, size}),
          make(wide, {pairs, heads}),
          make(own, {pairs, hidden}),
          make(own, {tokens, p.router_out.sym_size(1)}, keeps_mid),
          make(own, {pairs, inner}, save),
          make(own, {pairs, inner}, save),
          make(own, {pairs, hidden}, keeps_out)};
}

micro_kernels::BlockSaved pointers(at::TensorList saved) {
  const auto integers = [&](size_t i) { return static_cast<int32_t*>(saved[i].data_ptr()); };
  const auto any = [&](size_t i) { return saved[i].numel() ? saved[i].data_ptr() : nullptr; };
  return {.tokens = integers(0),
          .experts = integers(1),
          .offsets = integers(2),
          .inverse = integers(3),
          .q = any(4),
          .k = any(5),
          .v = any(6),
          .attention = any(7),
          .logsumexp = any(8),
          .behind = any(9),
          .router_mid = any(10),
          .gate = any(11),
          .up = any(12),
          .out = any(13)};
}

// ---- forward -------------------------------------------------------------------------------------------------------

void check_router(const BlockParameters& p) {
  TORCH_CHECK_VALUE(p.router_in, kName, ": router_in is missing: a folded router has no gradient");
}

micro_kernels::Status run_forward(micro_kernels::BlockForwardParams& params, const Tensor& x) {
  if (x.is_cuda()) {
    params.tf32 = tf32_allowed();
    const Tensor workspace = device_workspace(x, micro_kernels::cuda::block_forward_workspace(params));
    return micro_kernels::cuda::block_forward(params, workspace.mutable_data_ptr(), current_stream(x));
  }
  const Workspace workspace(micro_kernels::cpu::block_forward_workspace(params));
  return micro_kernels::cpu::block_forward(params, workspace.data(), parallel_for);
}

Recorded forward(const Tensor& x, const OptionalTensors& parameters, const Tensor& cos, const Tensor& sin,
                 int64_t heads, double eps, int64_t slots, const OptionalTensor& mask, const OptionalTensor& real,
                 int64_t k, const OptionalTensors& controls, std::string_view weight_rule, bool run_router,
                 std::string_view activations) {
  const c10::DeviceGuard device(x.device());
  const BlockArguments in(kName, x, parameters, cos, sin, heads, true, slots, 0, mask, real, k, controls);
  check_router(in.p);
  run_router = run_router || !in.rows;
  auto [y, raw, ids, weights, probs, effective] = allocate_block(in.x, in.n.experts, k, false, run_router);
  auto params =
      in.forward(kName, true, eps, k, weight_rule, y, run_router ? raw : Tensor(), ids, weights, probs, effective);
  Tensors saved = allocate_saved(in.x, in.p, in.cos, heads, slots, k, BlockControls(kName, controls), run_router,
                                 weight_rule, saves(activations));
  const micro_kernels::BlockSaved places = pointers(saved);
  params.saved = &places;
  check_block(kName, run_forward(params, in.x), in.n.experts);
  return {y, raw, ids, weights, probs, effective, saved};
}

Recorded forward_meta(const Tensor& x, const OptionalTensors& parameters, const Tensor& cos, const Tensor&,
                      int64_t heads, double, int64_t slots, const OptionalTensor&, const OptionalTensor&, int64_t k,
                      const OptionalTensors& controls, std::string_view weight_rule, bool run_router,
                      std::string_view activations) {
  const BlockParameters p = parameters_of(kName, parameters);
  check_router(p);
  const BlockControls steering(kName, controls);
  run_router = run_router || !steering.rows;
  auto [y, raw, ids, weights, probs, effective] =
      allocate_block(x, p.gate_proj.sym_size(0).guard_int(__FILE__, __LINE__), k, false, run_router);
  return {y,
          raw,
          ids,
          weights,
          probs,
          effective,
          allocate_saved(x, p, cos, heads, slots, k, steering, run_router, weight_rule, saves(activations))};
}

// ---- backward ------------------------------------------------------------------------------------------------------

// The wanted gradients, in the order of `wanted`: like x, like each parameter, [T, E] in the accumulator type.
Tensors allocate_gradients(const Tensor& x, const OptionalTensors& parameters, const Tensor& probs,
                           const Wanted& wanted) {
  Tensors gradients;
  const auto like = [&](const Tensor& t) {
    const Tensor& gradient = gradients.emplace_back(at::empty_like(t, at::MemoryFormat::Contiguous));
    if (gradient.is_cpu()) prefer_large_pages(gradient.mutable_data_ptr(), gradient.nbytes());
  };
  if (wanted[kWantsX]) like(x);
  for (size_t i = 0; i < kBlockParameters; ++i)
    if (wanted[kWantsParameter + i]) like(*OptionalTensor(parameters.get(i)));
  if (wanted.back()) like(probs);
  return gradients;
}

micro_kernels::BlockGradients places(const Tensors& gradients, const Wanted& wanted) {
  auto next = gradients.begin();
  const auto take = [&](size_t i) { return wanted[i] ? (next++)->mutable_data_ptr() : nullptr; };
  micro_kernels::BlockGradients g{};
  void** const fields[kWanted] = {&g.x,
                                  &g.q,
                                  &g.k,
                                  &g.v,
                                  &g.o,
                                  &g.gate,
                                  &g.up,
                                  &g.down,
                                  &g.router_in,
                                  &g.router_out,
                                  &g.input_norm,
                                  &g.post_attention_norm,
                                  &g.post_ffn_norm,
                                  &g.q_norm,
                                  &g.k_norm,
                                  &g.logits};
  for (size_t i = 0; i < kWanted; ++i) *fields[i] = take(i);
  return g;
}

micro_kernels::Status run_backward(const micro_kernels::BlockTrainBackwardParams& params, const Tensor& x) {
  if (x.is_cuda()) {
    const Tensor workspace = device_workspace(x, micro_kernels::cuda::block_train_backward_workspace(params));
    return micro_kernels::cuda::block_train_backward(params, workspace.mutable_data_ptr(), current_stream(x));
  }
  const Workspace workspace(micro_kernels::cpu::block_train_backward_workspace(params));
  return micro_kernels::cpu::block_train_backward(params, workspace.data(), parallel_for);
}

Tensors backward(const OptionalTensor& grad_y_, const OptionalTensor& grad_raw_, const OptionalTensor& grad_weights_,
                 const OptionalTensor& grad_probs_, const OptionalTensor& grad_effective_, const Tensor& x,
                 const OptionalTensors& parameters, const Tensor& cos, const Tensor& sin, int64_t heads, double eps,
                 int64_t slots, const OptionalTensor& mask, const OptionalTensor& force, bool given,
                 std::string_view weight_rule, const Tensor& ids, const Tensor& weights, const Tensor& probs,
                 const Tensor& effective, at::TensorList saved, Wanted wanted) {
  const c10::DeviceGuard device(x.device());
  TORCH_CHECK_VALUE(saved.size() == kSaved, kName, ": saved must have ", kSaved, " tensors, got ", saved.size());
  const OptionalTensors controls({std::nullopt, std::nullopt, std::nullopt, force, std::nullopt});
  const BlockArguments in(kName, x, parameters, cos, sin, heads, true, slots, 0, mask, std::nullopt, ids.size(1),
                          controls);
  const OptionalTensor grad_y = contiguous(grad_y_), grad_raw = contiguous(grad_raw_),
                       grad_weights = contiguous(grad_weights_), grad_probs = contiguous(grad_probs_),
                       grad_effective = contiguous(grad_effective_);
  const Tensors gradients = allocate_gradients(x, parameters, probs, wanted);
  const micro_kernels::BlockTrainBackwardParams params{
      .shape = in.shape(kName, true, eps),
      .weights = in.weights(),
      .saved = pointers(saved),
      .x = in.x.const_data_ptr(),
      .batch = in.n.batch,
      .slots = slots,
      .mask = pointer(in.mask),
      .mask_kind = mask_kind(in.mask),
      .masks = in.mask ? in.mask->size(0) : 0,
      .cos = in.cos.const_data_ptr(),
      .sin = in.sin.const_data_ptr(),
      .scale = 1 / std::sqrt(static_cast<double>(in.n.head_dim)),
      .routing = weights.const_data_ptr(),
      .given = given,
      .route = {.grad_weights = pointer(grad_weights),
                .grad_probs = pointer(grad_probs),
                .grad_effective = pointer(grad_effective),
                .ids = ids.const_data_ptr<int32_t>(),
                .probs = probs.const_data_ptr(),
                .effective = effective.const_data_ptr(),
                .force = static_cast<const int32_t*>(pointer(in.force)),
                .grad_z = nullptr,
                .force_stride = token_stride(in.force, in.n.tokens, 1),
                .tokens = in.n.tokens,
                .experts = in.n.experts,
                .k = ids.size(1),
                .rule = kernel_rule(kName, weight_rule),
                .dtype = kernel_dtype(kName, x)},
      .grad_y = pointer(grad_y),
      .grad_raw = pointer(grad_raw),
      .grad = places(gradients, wanted),
      .tf32 = in.x.is_cuda() && tf32_allowed(),
  };
  check(kName, run_backward(params, in.x));
  return gradients;
}

Tensors backward_meta(const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                      const OptionalTensor&, const Tensor& x, const OptionalTensors& parameters, const Tensor&,
                      const Tensor&, int64_t, double, int64_t, const OptionalTensor&, const OptionalTensor&, bool,
                      std::string_view, const Tensor&, const Tensor&, const Tensor& probs, const Tensor&,
                      at::TensorList, Wanted wanted) {
  return allocate_gradients(x, parameters, probs, wanted);
}

// ---- autograd ------------------------------------------------------------------------------------------------------

auto call_forward() {
  static const auto call = op<decltype(forward)>("micro::block_train_forward");
  return call;
}

auto call_backward() {
  static const auto call = op<decltype(backward)>("micro::block_train_backward");
  return call;
}

// What one call is made of, beside the tensors that a gradient may reach.
struct Call {
  Tensor cos, sin;
  int64_t heads;
  double eps;
  int64_t slots;
  OptionalTensor mask, real;
  int64_t k;
  BlockControls controls;
  std::string weight_rule;
  bool run_router;
  std::string activations;
};

OptionalTensor if_defined(const Tensor& tensor) { return tensor.defined() ? OptionalTensor(tensor) : std::nullopt; }
Tensor or_undefined(const OptionalTensor& tensor) { return tensor.value_or(Tensor()); }

Recorded record(const Tensor& x, const OptionalTensors& parameters, const OptionalTensor& bias, const Call& c) {
  const OptionalTensors controls({c.controls.rows, bias, c.controls.ablate, c.controls.force, c.controls.replay});
  return call_forward().call(x, parameters, c.cos, c.sin, c.heads, c.eps, c.slots, c.mask, c.real, c.k, controls,
                             c.weight_rule, c.run_router, c.activations);
}

// Saved, in this order: x, the parameters, cos, sin, mask, force, the decision, and what the forward kept.
struct BlockTrain : torch::autograd::Function<BlockTrain> {
  static constexpr size_t kFirstParameter = 1, kTables = kFirstParameter + kBlockParameters, kDecision = kTables + 4,
                          kKept = kDecision + 4;

  static variable_list forward(AutogradContext* context, const Tensor& x, const OptionalTensor& p0,
                               const OptionalTensor& p1, const OptionalTensor& p2, const OptionalTensor& p3,
                               const OptionalTensor& p4, const OptionalTensor& p5, const OptionalTensor& p6,
                               const OptionalTensor& p7, const OptionalTensor& p8, const OptionalTensor& p9,
                               const OptionalTensor& p10, const OptionalTensor& p11, const OptionalTensor& p12,
                               const OptionalTensor& p13, const OptionalTensor& bias, const Call& c) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    const OptionalTensors parameters({p0, p1, p2, p3, p4, p5, p6, p7, p8, p9, p10, p11, p12, p13});
    auto [y, raw, ids, weights, probs, effective, kept] = record(x, parameters, bias, c);
    context->set_materialize_grads(false);
    const bool given = c.controls.rows.has_value();
    context->mark_non_differentiable(given ? variable_list{ids, weights, probs, effective} : variable_list{ids});
    if (given && !c.run_router) context->mark_non_differentiable({ids, weights, probs, effective, raw});
    variable_list saved{x};
    for (const OptionalTensor& parameter : parameters) saved.push_back(or_undefined(parameter));
    for (const Tensor& t : {c.cos, c.sin, or_undefined(c.mask), or_undefined(c.controls.force)}) saved.push_back(t);
    for (const Tensor& t : {ids, weights, probs, effective}) saved.push_back(t);
    saved.insert(saved.end(), kept.begin(), kept.end());
    context->save_for_backward(saved);
    context->saved_data["heads"] = c.heads;
    context->saved_data["eps"] = c.eps;
    context->saved_data["slots"] = c.slots;
    context->saved_data["given"] = given;
    context->saved_data["rule"] = c.weight_rule;
    if (bias) {
      context->saved_data["bias_dtype"] = bias->scalar_type();
      context->saved_data["bias_rows"] = bias->size(0);
    }
    return {y, raw, ids, weights, probs, effective};
  }

  static variable_list backward(AutogradContext* context, const variable_list& grad) {
    const auto saved = context->get_saved_variables();
    OptionalTensors parameters;
    for (size_t i = 0; i < kBlockParameters; ++i) parameters.push_back(if_defined(saved[kFirstParameter + i]));
    const Wanted needed = wanted(context, parameters, grad[0].defined());
    const auto data = [&](const char* name) { return context->saved_data[name]; };
    const Tensors found = call_backward().call(
        if_defined(grad[0]), if_defined(grad[1]), if_defined(grad[3]), if_defined(grad[4]), if_defined(grad[5]),
        saved[0], parameters, saved[kTables], saved[kTables + 1], data("heads").toInt(), data("eps").toDouble(),
        data("slots").toInt(), if_defined(saved[kTables + 2]), if_defined(saved[kTables + 3]), data("given").toBool(),
        data("rule").toStringView(), saved[kDecision], saved[kDecision + 1], saved[kDecision + 2], saved[kDecision + 3],
        at::TensorList(saved).slice(kKept, kSaved), needed);
    variable_list result(kWanted + 1);
    auto next = found.begin();
    for (size_t i = 0; i < kWanted; ++i)
      if (needed[i]) result[i] = *next++;
    if (needed.back()) {
      Tensor& bias = result[kWanted - 1];
      if (data("bias_rows").toInt() != bias.size(0)) bias = bias.sum(0, /*keepdim=*/true);
      bias = bias.to(data("bias_dtype").toScalarType());
    }
    return result;
  }

 private:
  // The experts' parameters have a gradient only through y.
  static Wanted wanted(AutogradContext* context, const OptionalTensors& parameters, bool through_y) {
    Wanted list{};
    size_t edge = 0;
    list[kWantsX] = context->needs_input_grad(edge++);
    for (size_t i = 0; i < kBlockParameters; ++i) {
      if (!OptionalTensor(parameters.get(i))) continue;
      const bool of_router = i == 7 || i == 8;
      list[kWantsParameter + i] = context->needs_input_grad(edge++) && (through_y || of_router);
    }
    if (context->saved_data.find("bias_rows") != context->saved_data.end())
      list.back() = context->needs_input_grad(edge);
    return list;
  }
};

BlockResults block_autograd(const Tensor& x, const OptionalTensors& parameters, const Tensor& cos, const Tensor& sin,
                            int64_t heads, double eps, int64_t slots, const OptionalTensor& mask,
                            const OptionalTensor& real, int64_t k, const OptionalTensors& controls,
                            std::string_view weight_rule, bool run_router, std::string_view activations) {
  parameters_of(kName, parameters);
  const BlockControls steering(kName, controls);
  TORCH_CHECK_NOT_IMPLEMENTED(!steering.rows || !must_record(*steering.rows), kName,
                              ": rows have no gradient; detach them");
  const auto p = [&](size_t i) { return OptionalTensor(parameters.get(i)); };
  const Call call{cos,        sin,
                  heads,      eps,
                  slots,      mask,
                  real,       k,
                  steering,   std::string(weight_rule),
                  run_router, std::string(activations)};
  const variable_list out = BlockTrain::apply(x, p(0), p(1), p(2), p(3), p(4), p(5), p(6), p(7), p(8), p(9), p(10),
                                              p(11), p(12), p(13), steering.bias, call);
  return {out[0], out[1], out[2], out[3], out[4], out[5]};
}

BlockResults block_below_autograd(const Tensor& x, const OptionalTensors& parameters, const Tensor& cos,
                                  const Tensor& sin, int64_t heads, double eps, int64_t slots,
                                  const OptionalTensor& mask, const OptionalTensor& real, int64_t k,
                                  const OptionalTensors& controls, std::string_view weight_rule, bool run_router,
                                  std::string_view activations) {
  auto [y, raw, ids, weights, probs, effective, kept] = call_forward().call(
      x, parameters, cos, sin, heads, eps, slots, mask, real, k, controls, weight_rule, run_router, activations);
  return {y, raw, ids, weights, probs, effective};
}

Tensors backward_autograd(const OptionalTensor& grad_y, const OptionalTensor& grad_raw,
                          const OptionalTensor& grad_weights, const OptionalTensor& grad_probs,
                          const OptionalTensor& grad_effective, const Tensor& x, const OptionalTensors& parameters,
                          const Tensor& cos, const Tensor& sin, int64_t heads, double eps, int64_t slots,
                          const OptionalTensor& mask, const OptionalTensor& force, bool given,
                          std::string_view weight_rule, const Tensor& ids, const Tensor& weights, const Tensor& probs,
                          const Tensor& effective, at::TensorList saved, Wanted wanted) {
  for (const OptionalTensor& t : {grad_y, grad_raw, grad_weights, grad_probs, grad_effective})
    refuse_second_derivative(kName, or_undefined(t));
  refuse_second_derivative(kName, x);
  for (const OptionalTensor& t : parameters) refuse_second_derivative(kName, or_undefined(t));
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return call_backward().call(grad_y, grad_raw, grad_weights, grad_probs, grad_effective, x, parameters, cos, sin,
                              heads, eps, slots, mask, force, given, weight_rule, ids, weights, probs, effective, saved,
                              wanted);
}

}  // namespace

BlockResult block_train(const Tensor& x, const BlockParameters& parameters, const Tensor& cos, const Tensor& sin,
                        int64_t heads, double eps, const BlockCall& call, int64_t k, const RouteOptions& options,
                        bool run_router, Activations activations) {
  TORCH_CHECK_VALUE(call.start == 0 && !call.keys && !call.values, kName, ": there is no cache in training");
  static const auto train = op<decltype(block_below_autograd)>("micro::block_train");
  auto [y, raw, ids, weights, probs, effective] =
      train.call(x, list_of(parameters), cos, sin, heads, eps, call.slots, call.mask, call.real, k, list_of(options),
                 rule_name(options.weight_rule), run_router, activations == Activations::kSave ? "save" : "recompute");
  const bool ran = run_router || !options.rows;
  return {y, ran ? OptionalTensor(raw) : std::nullopt, {ids, weights, probs, effective}};
}

TORCH_LIBRARY_FRAGMENT(micro, m) {
  m.def(
      "block_train(Tensor x, Tensor?[] parameters, Tensor cos, Tensor sin, int heads, float eps, int slots,"
      " Tensor? mask, Tensor? real, int k, Tensor?[] controls, str weight_rule, bool run_router, str activations)"
      " -> (Tensor y, Tensor raw, Tensor ids, Tensor weights, Tensor probs, Tensor effective)");
  m.def(
      "block_train_forward(Tensor x, Tensor?[] parameters, Tensor cos, Tensor sin, int heads, float eps, int slots,"
      " Tensor? mask, Tensor? real, int k, Tensor?[] controls, str weight_rule, bool run_router, str activations)"
      " -> (Tensor y, Tensor raw, Tensor ids, Tensor weights, Tensor probs, Tensor effective, Tensor[] saved)");
  m.def(
      "block_train_backward(Tensor? grad_y, Tensor? grad_raw, Tensor? grad_weights, Tensor? grad_probs,"
      " Tensor? grad_effective, Tensor x, Tensor?[] parameters, Tensor cos, Tensor sin, int heads, float eps,"
      " int slots, Tensor? mask, Tensor? force, bool given, str weight_rule, Tensor ids, Tensor weights, Tensor probs,"
      " Tensor effective, Tensor[] saved, bool[16] wanted) -> Tensor[]");
}
TORCH_LIBRARY_IMPL(micro, CompositeExplicitAutograd, m) { m.impl("block_train", block_below_autograd); }
TORCH_LIBRARY_IMPL(micro, Autograd, m) {
  m.impl("block_train", block_autograd);
  m.impl("block_train_backward", backward_autograd);
}
TORCH_LIBRARY_IMPL(micro, CPU, m) {
  m.impl("block_train_forward", forward);
  m.impl("block_train_backward", backward);
}
TORCH_LIBRARY_IMPL(micro, CUDA, m) {
  m.impl("block_train_forward", forward);
  m.impl("block_train_backward", backward);
}
TORCH_LIBRARY_IMPL(micro, Meta, m) {
  m.impl("block_train_forward", forward_meta);
  m.impl("block_train_backward", backward_meta);
}

}  // namespace micro
