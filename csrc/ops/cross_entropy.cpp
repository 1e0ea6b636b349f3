#include "micro/cross_entropy.h"

#include <ATen/autocast_mode.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/clamp.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/ne.h>
#include <ATen/ops/nonzero.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <tuple>

#include "micro/plan.h"
#include "micro_kernels/cross_entropy.h"
#include "ops/linear.h"

namespace micro {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr char kName[] = "micro::cross_entropy";
constexpr int64_t kLogitBytes = 64 << 20;  // a chunk's logits: enough rows for fast products, small beside the head

void check_arguments(const Tensor& hidden, const Tensor& weight, const Tensor& targets) {
  TORCH_CHECK_VALUE(hidden.dim() == 2, kName, ": hidden must be [T, H], got ", hidden.sym_sizes());
  TORCH_CHECK_VALUE(weight.dim() == 2 && same(weight.sym_size(1), hidden.sym_size(1)), kName, ": weight must be [V, ",
                    hidden.sym_size(1), "], got ", weight.sym_sizes());
  TORCH_CHECK_TYPE(weight.scalar_type() == hidden.scalar_type(), kName, ": weight is ", weight.scalar_type(),
                   " but hidden is ", hidden.scalar_type());
  TORCH_CHECK_TYPE(targets.scalar_type() == at::kLong, kName, ": targets must be int64, got ", targets.scalar_type());
  TORCH_CHECK_VALUE(targets.dim() == 1 && same(targets.sym_size(0), hidden.sym_size(0)), kName, ": targets must be [",
                    hidden.sym_size(0), "], got ", targets.sym_sizes());
  TORCH_CHECK_VALUE(weight.device() == hidden.device() && targets.device() == hidden.device(), kName, ": weight is on ",
                    weight.device(), " and targets are on ", targets.device(), " but hidden is on ", hidden.device());
}

// ---- forward: loss and the gradients that are wanted, for an upstream gradient of 1 --------------------------------

// A gradient that is not wanted is a tensor without elements: traced graphs know no undefined tensors.
std::tuple<Tensor, Tensor, Tensor> allocate(const Tensor& hidden, const Tensor& weight, std::array<bool, 2> wanted) {
  const auto wide = hidden.options().dtype(accumulator_dtype(hidden));
  return {at::zeros({}, wide),
          wanted[0] ? at::zeros_symint(hidden.sym_sizes(), hidden.options()) : at::empty({0}, wide),
          wanted[1] ? at::empty_symint(weight.sym_sizes(), weight.options()) : at::empty({0}, wide)};
}

// What both devices do alike: sizes of a chunk, and where the sum over chunks of grad_weight is kept.
struct Chunks {
  int64_t rows, vocabulary, size;
  Tensor logits;         // [size, V], of one chunk after the other
  Tensor weight_sum;     // undefined: grad_weight is not wanted
  bool several = false;  // then they are added in the accumulator type: their number costs bfloat16 no precision

  Chunks(int64_t rows_, const Tensor& hidden, const Tensor& weight, const Tensor& loss, const Tensor& grad_weight,
         bool wanted)
      : rows(rows_), vocabulary(weight.size(0)) {
    const int64_t row_bytes = std::max<int64_t>(1, vocabulary * static_cast<int64_t>(hidden.element_size()));
    size = std::min(rows, std::max<int64_t>(1, kLogitBytes / row_bytes));
    logits = at::empty({size, vocabulary}, hidden.options());
    several = rows > size;
    if (wanted) weight_sum = several ? at::zeros(weight.sizes(), loss.options()) : grad_weight;
    if (wanted && rows == 0) grad_weight.zero_();
  }

  void finish(const Tensor& grad_weight) const {
    if (weight_sum.defined() && several) grad_weight.copy_(weight_sum);
  }
};

// ---- on the CPU: the rows with a target are chosen first, and nothing else is touched ------------------------------

// Losses of a chunk's rows; the logits are replaced by their gradient if that is wanted.
Tensor chunk_losses(const Tensor& logits, const Tensor& targets, bool write_gradient) {
  const Tensor losses = at::empty({logits.size(0)}, logits.options().dtype(accumulator_dtype(logits)));
  const micro_kernels::CrossEntropyParams params{
      .logits = logits.mutable_data_ptr(),
      .targets = targets.const_data_ptr<int64_t>(),
      .losses = losses.mutable_data_ptr(),
      .rows = logits.size(0),
      .vocabulary = logits.size(1),
      .write_gradient = write_gradient,
      .dtype = kernel_dtype(kName, logits),
  };
  const auto status = micro_kernels::cpu::cross_entropy(params, parallel_for);
  TORCH_CHECK_VALUE(status != micro_kernels::Status::kIndexOutOfRange, kName, ": a target lies outside [0, ",
                    logits.size(1), ") and is not ignore_index");
  check(kName, status);
  return losses;
}

std::tuple<Tensor, Tensor, Tensor> forward_cpu(const Tensor& hidden_, const Tensor& weight_, const Tensor& targets,
                                               int64_t ignore_index, std::array<bool, 2> wanted) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const Tensor hidden = hidden_.contiguous(), weight = weight_.contiguous();
  auto [loss, grad_hidden, grad_weight] = allocate(hidden, weight, wanted);
  const Tensor rows = at::nonzero(at::ne(targets, ignore_index)).squeeze(1);
  const Chunks chunks(rows.numel(), hidden, weight, loss, grad_weight, wanted[1]);
  Tensor total = at::zeros({}, loss.options().dtype(at::kDouble));
  for (int64_t begin = 0; begin < chunks.rows; begin += chunks.size) {
    const Tensor chosen = rows.narrow(0, begin, std::min(chunks.size, chunks.rows - begin));
    const Tensor chosen_hidden = hidden.index_select(0, chosen);
    const Tensor logits = chunks.logits.narrow(0, 0, chosen.numel());
    LinearBatch forward(kName, hidden);
    forward.product(chosen_hidden, weight, logits);
    forward.run();
    total += chunk_losses(logits, targets.index_select(0, chosen), wanted[0] || wanted[1]).sum(at::kDouble);
    const Tensor rows_gradient = wanted[0] ? at::empty_like(chosen_hidden) : Tensor();
    LinearBatch backward(kName, hidden);
    if (wanted[0]) backward.grad_x({{logits, weight}}, rows_gradient);
    if (wanted[1]) backward.grad_weight(logits, chosen_hidden, chunks.weight_sum, chunks.several);
    backward.run();
    if (wanted[0]) grad_hidden.index_copy_(0, chosen, rows_gradient);
  }
  chunks.finish(grad_weight);
  loss.copy_(total);
  return {loss, grad_hidden, grad_weight};
}

// ---- on CUDA: the same rows, counted and read through an index on the device, so that nobody waits for it -----------

// The tokens with a target stand first in `tokens`. `bounds` has a row {0, number of rows that are there} per chunk.
struct Kept {
  Tensor tokens, bounds, targets;

  Kept(const Tensor& all, int64_t ignore_index, const Chunks& chunks) {
    const Tensor keep = at::ne(all, ignore_index),
                 one_expert = at::zeros({all.size(0), 1}, all.options().dtype(at::kInt));
    const Plan sorted = plan(one_expert, 1, std::nullopt, keep);
    tokens = sorted.tokens;
    targets = all.index_select(0, tokens);
    const int64_t count = (chunks.rows + chunks.size - 1) / chunks.size;
    const Tensor begins = at::arange(count, tokens.options()) * chunks.size;
    const Tensor there = at::clamp(sorted.offsets[1] - begins, 0, chunks.size);
    bounds = at::stack({at::zeros_like(there), there}, 1);
  }
};

void chunk_losses_cuda(const Tensor& logits, const int64_t* targets, const int32_t* count, const Tensor& losses,
                       bool write_gradient) {
  const micro_kernels::CrossEntropyParams params{
      .logits = logits.mutable_data_ptr(),
      .targets = targets,
      .losses = losses.mutable_data_ptr(),
      .rows = logits.size(0),
      .vocabulary = logits.size(1),
      .write_gradient = write_gradient,
      .dtype = kernel_dtype(kName, logits),
      .count = count,
  };
  check(kName, micro_kernels::cuda::cross_entropy(params, current_stream(logits)));
}

void chunk_gradients_cuda(const Tensor& grad_logits, const Tensor& hidden, const Tensor& weight, const int32_t* tokens,
                          const int32_t* offsets, const Tensor& grad_hidden, const Chunks& chunks) {
  const auto dtype = kernel_dtype(kName, hidden);
  const micro_kernels::ConstRows grad_y{grad_logits.const_data_ptr(), nullptr, chunks.vocabulary};
  const int64_t rows = grad_logits.size(0), width = hidden.size(1);
  if (grad_hidden.numel()) {
    micro_kernels::cuda::LinearGradXGroup group;
    group.sources[0] = {.grad_y = grad_y, .weight = weight.const_data_ptr(), .out = chunks.vocabulary};
    group.grad_x = {grad_hidden.mutable_data_ptr(), tokens, width};
    group.offsets = offsets, group.rows = rows, group.in = width;
    check(kName, micro_kernels::cuda::linear_grad_x(&group, 1, dtype, current_stream(hidden), tf32_allowed()));
  }
  if (chunks.weight_sum.defined()) {
    micro_kernels::cuda::LinearGradWeightGroup group;
    group.grad_y = grad_y;
    group.x = {hidden.const_data_ptr(), tokens, width};
    group.grad_weight = chunks.weight_sum.mutable_data_ptr();
    group.offsets = offsets, group.rows = rows, group.in = width, group.out = chunks.vocabulary;
    group.accumulate = chunks.several;
    check(kName, micro_kernels::cuda::linear_grad_weight(&group, 1, dtype, current_stream(hidden), tf32_allowed()));
  }
}

std::tuple<Tensor, Tensor, Tensor> forward_cuda(const Tensor& hidden_, const Tensor& weight_, const Tensor& targets,
                                                int64_t ignore_index, std::array<bool, 2> wanted) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const c10::DeviceGuard device(hidden_.device());
  const Tensor hidden = hidden_.contiguous(), weight = weight_.contiguous();
  auto [loss, grad_hidden, grad_weight] = allocate(hidden, weight, wanted);
  const Chunks chunks(hidden.size(0), hidden, weight, loss, grad_weight, wanted[1]);
  if (chunks.rows == 0) return {loss, grad_hidden, grad_weight};
  const Kept kept(targets, ignore_index, chunks);
  const Tensor losses = at::empty({chunks.rows}, loss.options());
  for (int64_t begin = 0, i = 0; begin < chunks.rows; begin += chunks.size, ++i) {
    const int64_t rows = std::min(chunks.size, chunks.rows - begin);
    const int32_t* const tokens = kept.tokens.const_data_ptr<int32_t>() + begin;
    const int32_t* const offsets = kept.bounds.const_data_ptr<int32_t>() + 2 * i;
    const Tensor logits = chunks.logits.narrow(0, 0, rows);
    micro_kernels::cuda::LinearGroup group;
    group.x = {hidden.const_data_ptr(), tokens, hidden.size(1)};
    group.weight = weight.const_data_ptr();
    group.y = {logits.mutable_data_ptr(), nullptr, chunks.vocabulary};
    group.offsets = offsets, group.rows = rows, group.in = hidden.size(1), group.out = chunks.vocabulary;
    check(kName,
          micro_kernels::cuda::linear(&group, 1, kernel_dtype(kName, hidden), current_stream(hidden), tf32_allowed()));
    chunk_losses_cuda(logits, kept.targets.const_data_ptr<int64_t>() + begin, offsets + 1,
                      losses.narrow(0, begin, rows), wanted[0] || wanted[1]);
    chunk_gradients_cuda(logits, hidden, weight, tokens, offsets, grad_hidden, chunks);
  }
  chunks.finish(grad_weight);
  loss.copy_(losses.sum(at::kDouble));
  return {loss, grad_hidden, grad_weight};
}

std::tuple<Tensor, Tensor, Tensor> forward_meta(const Tensor& hidden, const Tensor& weight, const Tensor&, int64_t,
                                                std::array<bool, 2> wanted) {
  return allocate(hidden, weight, wanted);
}

// ---- autograd ------------------------------------------------------------------------------------------------------

auto call_forward() {
  static const auto call = op<decltype(forward_meta)>("micro::cross_entropy_forward");
  return call;
}

// The gradient `name` that the forward left, times the gradient of the loss. Where the graph is not kept nobody else
// needs it: it is scaled where it stands and handed over, so that the head's gradient never exists twice.
Tensor scaled(AutogradContext* context, const char* name, const Tensor& grad_loss, at::ScalarType dtype) {
  const auto found = context->saved_data.find(name);
  Tensor gradient = found->second.toTensor();
  if (torch::autograd::get_current_graph_task_keep_graph()) return gradient.mul(grad_loss).to(dtype);
  context->saved_data.erase(found);
  return gradient.mul_(grad_loss).to(dtype);
}

struct CrossEntropy : torch::autograd::Function<CrossEntropy> {
  static Tensor forward(AutogradContext* context, const Tensor& hidden, const Tensor& weight, const Tensor& targets,
                        int64_t ignore_index, std::array<bool, 2> wanted) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    auto [loss, grad_hidden, grad_weight] = call_forward().call(hidden, weight, targets, ignore_index, wanted);
    context->save_for_backward({hidden, weight});
    context->saved_data["grad_hidden"] = grad_hidden;
    context->saved_data["grad_weight"] = grad_weight;
    return loss;
  }

  static variable_list backward(AutogradContext* context, const variable_list& grad) {
    const auto saved = context->get_saved_variables();  // refuses a second pass through a graph that was not kept
    const Tensor &hidden = saved[0], &weight = saved[1];
    refuse_second_derivative(kName, grad[0], hidden, weight);
    const auto gradient = [&](size_t index, const char* name, const Tensor& input) {
      return context->needs_input_grad(index) ? scaled(context, name, grad[0], input.scalar_type()) : Tensor();
    };
    return {gradient(0, "grad_hidden", hidden), gradient(1, "grad_weight", weight), Tensor(), Tensor(), Tensor()};
  }
};

Tensor cross_entropy_autograd(const Tensor& hidden, const Tensor& weight, const Tensor& targets, int64_t ignore_index) {
  check_arguments(hidden, weight, targets);
  const bool enabled = at::GradMode::is_enabled();
  const std::array<bool, 2> wanted{enabled && hidden.requires_grad(), enabled && weight.requires_grad()};
  return CrossEntropy::apply(hidden, weight, targets, ignore_index, wanted);
}

Tensor cross_entropy_below_autograd(const Tensor& hidden, const Tensor& weight, const Tensor& targets,
                                    int64_t ignore_index) {
  check_arguments(hidden, weight, targets);
  return std::get<0>(call_forward().call(hidden, weight, targets, ignore_index, {false, false}));
}

// The products run in autocast's type, as those of torch's own linear do.
Tensor cross_entropy_autocast(const Tensor& hidden, const Tensor& weight, const Tensor& targets, int64_t ignore_index) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const auto device = hidden.device().type();
  const at::ScalarType type = at::autocast::get_autocast_dtype(device);
  return cross_entropy(at::autocast::cached_cast(type, hidden, device), at::autocast::cached_cast(type, weight, device),
                       targets, ignore_index);
}

}  // namespace

Tensor cross_entropy(const Tensor& hidden, const Tensor& weight, const Tensor& targets, int64_t ignore_index) {
  static const auto call = op<decltype(cross_entropy)>(kName);
  return call.call(hidden, weight, targets, ignore_index);
}

TORCH_LIBRARY_FRAGMENT(micro, m) {
  m.def("cross_entropy(Tensor hidden, Tensor weight, Tensor targets, int ignore_index=-100) -> Tensor");
  m.def(
      "cross_entropy_forward(Tensor hidden, Tensor weight, Tensor targets, int ignore_index, bool[2] wanted)"
      " -> (Tensor loss, Tensor grad_hidden, Tensor grad_weight)");
}
TORCH_LIBRARY_IMPL(micro, CompositeExplicitAutograd, m) { m.impl("cross_entropy", cross_entropy_below_autograd); }
TORCH_LIBRARY_IMPL(micro, Autograd, m) { m.impl("cross_entropy", cross_entropy_autograd); }
TORCH_LIBRARY_IMPL(micro, AutocastCPU, m) { m.impl("cross_entropy", cross_entropy_autocast); }
TORCH_LIBRARY_IMPL(micro, AutocastCUDA, m) { m.impl("cross_entropy", cross_entropy_autocast); }
TORCH_LIBRARY_IMPL(micro, CPU, m) { m.impl("cross_entropy_forward", forward_cpu); }
TORCH_LIBRARY_IMPL(micro, CUDA, m) { m.impl("cross_entropy_forward", forward_cuda); }
TORCH_LIBRARY_IMPL(micro, Meta, m) { m.impl("cross_entropy_forward", forward_meta); }

}  // namespace micro
