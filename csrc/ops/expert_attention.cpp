#include "micro/expert_attention.h"

#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <array>
#include <cmath>
#include <tuple>

#include "micro_kernels/expert_attention.h"
#include "ops/linear.h"
#include "ops/workspace.h"

namespace micro {
namespace {

using at::Tensor;
using c10::SymInt;
using micro_kernels::AttentionMask;
using micro_kernels::ExpertAttentionShape;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr char kName[] = "micro::expert_attention";
constexpr int64_t kLargestHead = 256;
constexpr int64_t kHeadStep = 8;  // the kernels take multiples of it

// ---- checks --------------------------------------------------------------------------------------------------------

void check_heads(const Tensor& q, const Tensor& k, const Tensor& v) {
  TORCH_CHECK_VALUE(q.dim() == 3, kName, ": q must be [N, A, D], got ", q.sym_sizes());
  TORCH_CHECK_VALUE(k.dim() == 5 && same(k.sym_size(4), q.sym_size(2)), kName, ": k must be [B, E, G, J, ",
                    q.sym_size(2), "], got ", k.sym_sizes());
  TORCH_CHECK_VALUE(v.dim() == 5 && same(v.sym_sizes(), k.sym_sizes()), kName, ": v must be like k, ", k.sym_sizes(),
                    ", got ", v.sym_sizes());
  TORCH_CHECK_TYPE(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(), kName, ": q is ",
                   q.scalar_type(), " but k is ", k.scalar_type(), " and v is ", v.scalar_type());
  TORCH_CHECK_VALUE(k.device() == q.device() && v.device() == q.device(), kName, ": q is on ", q.device(),
                    " but k is on ", k.device(), " and v is on ", v.device());
  // Of the model, never symbolic. size() would fix every size of a traced tensor.
  auto fixed = [](const SymInt& size) { return size.guard_int(__FILE__, __LINE__); };
  const int64_t head_dim = fixed(q.sym_size(2)), heads = fixed(q.sym_size(1)), groups = fixed(k.sym_size(2));
  TORCH_CHECK_VALUE(head_dim > 0 && head_dim <= kLargestHead, kName, ": the head size must lie in 1 .. ", kLargestHead,
                    ", got ", head_dim);
  TORCH_CHECK_VALUE(groups > 0 && heads > 0 && heads % groups == 0, kName, ": ", heads, " query heads cannot share ",
                    groups, " key heads evenly");
}

void check_mask(const Tensor& mask, const Tensor& q, const Tensor& k, const SymInt& slots) {
  TORCH_CHECK_VALUE(mask.dim() == 2 || mask.dim() == 3, kName, ": mask must be [B, J] or [B or 1, S, J], got ",
                    mask.sym_sizes());
  TORCH_CHECK_VALUE(mask.device() == q.device(), kName, ": mask is on ", mask.device(), " but q is on ", q.device());
  TORCH_CHECK_VALUE(same(mask.sym_size(-1), k.sym_size(3)), kName, ": mask must cover the ", k.sym_size(3),
                    " key slots, got ", mask.sym_sizes());
  TORCH_CHECK_VALUE(!mask.requires_grad(), kName, ": mask gets no gradient; detach it");
  if (mask.dim() == 2) {
    TORCH_CHECK_TYPE(mask.scalar_type() == at::kBool, kName, ": a mask [B, J] must be bool, got ", mask.scalar_type());
    TORCH_CHECK_VALUE(same(mask.sym_size(0), k.sym_size(0)), kName, ": mask must be [", k.sym_size(0), ", ",
                      k.sym_size(3), "], got ", mask.sym_sizes());
    return;
  }
  TORCH_CHECK_TYPE(mask.scalar_type() == at::kBool || mask.is_floating_point(), kName,
                   ": mask must be bool or floating, got ", mask.scalar_type());
  const auto one_or_each = mask.sym_size(0).sym_eq(1).sym_or(mask.sym_size(0).sym_eq(k.sym_size(0)));
  TORCH_CHECK_VALUE(one_or_each.expect_true(__FILE__, __LINE__) && same(mask.sym_size(1), slots), kName,
                    ": mask must be [", k.sym_size(0), " or 1, ", slots, ", ", k.sym_size(3), "], got ",
                    mask.sym_sizes());
}

void check_arguments(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& tokens, const Tensor& offsets,
                     const SymInt& slots, const SymInt& start, const OptionalTensor& mask) {
  check_heads(q, k, v);
  TORCH_CHECK_TYPE(tokens.scalar_type() == at::kInt, kName, ": tokens must be int32, got ", tokens.scalar_type());
  TORCH_CHECK_VALUE(tokens.dim() == 1 && same(tokens.sym_size(0), q.sym_size(0)), kName, ": tokens must be [",
                    q.sym_size(0), "], got ", tokens.sym_sizes());
  TORCH_CHECK_VALUE(tokens.device() == q.device(), kName, ": tokens is on ", tokens.device(), " but q is on ",
                    q.device());
  check_offsets(kName, offsets, k.sym_size(1), q);
  TORCH_CHECK_VALUE(slots.sym_gt(0).expect_true(__FILE__, __LINE__), kName, ": slots must be positive, got ", slots);
  TORCH_CHECK_VALUE(start.sym_ge(0).expect_true(__FILE__, __LINE__), kName, ": start must not be negative, got ",
                    start);
  TORCH_CHECK_VALUE((start + slots).sym_le(k.sym_size(3)).expect_true(__FILE__, __LINE__), kName,
                    ": slots end at start + slots = ", start + slots, " but there are only ", k.sym_size(3), " keys");
  if (mask) check_mask(*mask, q, k, slots);
}

// ---- head sizes between the steps of the kernels ------------------------------------------------------------------

// Zeros that lack to the next multiple of the step.
int64_t missing_columns(const Tensor& q) {
  const int64_t head_dim = q.sym_size(2).guard_int(__FILE__, __LINE__);
  return (kHeadStep - head_dim % kHeadStep) % kHeadStep;
}

// Columns of zeros change neither a score nor the columns before them; the scale stays that of the true size.
Tensor attention_widened(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& tokens, const Tensor& offsets,
                         const SymInt& slots, const SymInt& start, const OptionalTensor& mask,
                         std::optional<double> scale) {
  const SymInt size = q.sym_size(2);
  const int64_t missing = missing_columns(q);
  const auto wide = [missing](const Tensor& t) { return at::constant_pad_nd(t, {0, missing}); };
  const double true_scale = 1 / std::sqrt(static_cast<double>(size.guard_int(__FILE__, __LINE__)));
  return expert_attention(wide(q), wide(k), wide(v), tokens, offsets, slots, start, mask, scale.value_or(true_scale))
      .narrow_symint(2, 0, size);
}

// ---- tensors to kernel parameters ----------------------------------------------------------------------------------

// Tensors in the layout that the kernels read, kept alive while they run.
struct Inputs {
  Tensor q, k, v, tokens, offsets;
  OptionalTensor mask;

  Inputs(const Tensor& q_, const Tensor& k_, const Tensor& v_, const Tensor& tokens_, const Tensor& offsets_,
         const OptionalTensor& mask_)
      : q(q_.contiguous()),
        k(head_contiguous(k_)),
        v(head_contiguous(v_)),
        tokens(tokens_.contiguous()),
        offsets(offsets_.contiguous()) {
    if (mask_) mask = (mask_->scalar_type() == at::kBool ? *mask_ : mask_->to(accumulator_dtype(q))).contiguous();
  }

  static Tensor head_contiguous(const Tensor& t) { return t.stride(4) == 1 ? t : t.contiguous(); }

  AttentionMask mask_kind() const {
    if (!mask) return AttentionMask::kNone;
    if (mask->dim() == 2) return AttentionMask::kKeys;
    return mask->scalar_type() == at::kBool ? AttentionMask::kPairs : AttentionMask::kBias;
  }

  ExpertAttentionShape shape(const SymInt& slots, const SymInt& start, std::optional<double> scale) const {
    return {
        .tokens = tokens.const_data_ptr<int32_t>(),
        .offsets = offsets.const_data_ptr<int32_t>(),
        .mask = mask ? mask->const_data_ptr() : nullptr,
        .mask_kind = mask_kind(),
        .masks = mask ? mask->size(0) : 0,
        .rows = q.size(0),
        .heads = q.size(1),
        .groups = k.size(2),
        .head_dim = q.size(2),
        .batch = k.size(0),
        .experts = k.size(1),
        .slots = slots.expect_int(),
        .keys = k.size(3),
        .start = start.expect_int(),
        .starts = nullptr,
        .scale = scale.value_or(1 / std::sqrt(static_cast<double>(q.size(2)))),
        .dtype = kernel_dtype(kName, q),
    };
  }
};

micro_kernels::HeadStrides strides(const Tensor& t) {
  if (!t.defined()) return {};
  return {t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

void check_ran(micro_kernels::Status status) {
  TORCH_CHECK_VALUE(status != micro_kernels::Status::kIndexOutOfRange, kName,
                    ": offsets must ascend from 0 to at most N, and tokens must lie in [0, B * slots) and ascend "
                    "within each expert, as plan() makes them");
  check(kName, status);
}

// A launch with the working memory that it asks for.
template <class Params>
micro_kernels::Status on_device(int64_t (*bytes)(const Params&),
                                micro_kernels::Status (*launch)(const Params&, void*, void*), const Params& params,
                                const Tensor& beside) {
  const Tensor workspace = device_workspace(beside, bytes(params));
  return launch(params, workspace.mutable_data_ptr(), current_stream(beside));
}

// ---- forward and backward, one function for both devices -----------------------------------------------------------

std::tuple<Tensor, Tensor> allocate_forward(const Tensor& q) {
  return {at::empty_like(q, at::MemoryFormat::Contiguous),
          at::empty_symint(q.sym_sizes().slice(0, 2), q.options().dtype(accumulator_dtype(q)))};
}

std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& tokens,
                                   const Tensor& offsets, SymInt slots, SymInt start, const OptionalTensor& mask,
                                   std::optional<double> scale) {
  const c10::DeviceGuard device(q.device());
  const Inputs in(q, k, v, tokens, offsets, mask);
  auto [out, logsumexp] = allocate_forward(q);
  const micro_kernels::ExpertAttentionParams params{
      .shape = in.shape(slots, start, scale),
      .q = in.q.const_data_ptr(),
      .k = in.k.const_data_ptr(),
      .v = in.v.const_data_ptr(),
      .k_strides = strides(in.k),
      .v_strides = strides(in.v),
      .out = out.mutable_data_ptr(),
      .logsumexp = logsumexp.mutable_data_ptr(),
  };
  check_ran(q.is_cuda() ? on_device(micro_kernels::cuda::expert_attention_workspace,
                                    micro_kernels::cuda::expert_attention, params, q)
                        : micro_kernels::cpu::expert_attention(params, parallel_for));
  return {out, logsumexp};
}

std::tuple<Tensor, Tensor> forward_meta(const Tensor& q, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                        SymInt, SymInt, const OptionalTensor&, std::optional<double>) {
  return allocate_forward(q);
}

// wanted: gradients of {q, k, v}; what is not wanted is not computed and comes back undefined. Those of k and v lie in
// memory as the projections laid out k and v, [E, B, J, G, D], so that nothing is copied on their way back.
std::tuple<Tensor, Tensor, Tensor> allocate_backward(const Tensor& q, const Tensor& k, const Tensor& v,
                                                     std::array<bool, 3> wanted) {
  auto like = [](const Tensor& t) {
    const auto size = t.sym_sizes();
    return at::empty_symint({size[1], size[0], size[3], size[2], size[4]}, t.options()).permute({1, 0, 3, 2, 4});
  };
  return {wanted[0] ? at::empty_like(q, at::MemoryFormat::Contiguous) : Tensor(), wanted[1] ? like(k) : Tensor(),
          wanted[2] ? like(v) : Tensor()};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_out_, const Tensor& q, const Tensor& k, const Tensor& v,
                                            const Tensor& tokens, const Tensor& offsets, const Tensor& out,
                                            const Tensor& logsumexp, SymInt slots, SymInt start,
                                            const OptionalTensor& mask, std::optional<double> scale,
                                            std::array<bool, 3> wanted) {
  const c10::DeviceGuard device(q.device());
  const Inputs in(q, k, v, tokens, offsets, mask);
  const Tensor grad_out = grad_out_.contiguous();
  auto [grad_q, grad_k, grad_v] = allocate_backward(q, k, v, wanted);
  const micro_kernels::ExpertAttentionBackwardParams params{
      .shape = in.shape(slots, start, scale),
      .grad_out = grad_out.const_data_ptr(),
      .q = in.q.const_data_ptr(),
      .k = in.k.const_data_ptr(),
      .v = in.v.const_data_ptr(),
      .out = out.const_data_ptr(),
      .logsumexp = logsumexp.const_data_ptr(),
      .k_strides = strides(in.k),
      .v_strides = strides(in.v),
      .grad_q = wanted[0] ? grad_q.mutable_data_ptr() : nullptr,
      .grad_k = wanted[1] ? grad_k.mutable_data_ptr() : nullptr,
      .grad_v = wanted[2] ? grad_v.mutable_data_ptr() : nullptr,
      .grad_k_strides = strides(grad_k),
      .grad_v_strides = strides(grad_v),
  };
  check_ran(q.is_cuda() ? on_device(micro_kernels::cuda::expert_attention_backward_workspace,
                                    micro_kernels::cuda::expert_attention_backward, params, q)
                        : micro_kernels::cpu::expert_attention_backward(params, parallel_for));
  return {grad_q, grad_k, grad_v};
}

std::tuple<Tensor, Tensor, Tensor> backward_meta(const Tensor&, const Tensor& q, const Tensor& k, const Tensor& v,
                                                 const Tensor&, const Tensor&, const Tensor&, const Tensor&, SymInt,
                                                 SymInt, const OptionalTensor&, std::optional<double>,
                                                 std::array<bool, 3> wanted) {
  return allocate_backward(q, k, v, wanted);
}

// ---- autograd: both directions go through the dispatcher, so that tracing sees them --------------------------------

auto call_forward() {
  static const auto call = op<decltype(forward)>("micro::expert_attention_forward");
  return call;
}

auto call_backward() {
  static const auto call = op<decltype(backward)>("micro::expert_attention_backward");
  return call;
}

struct ExpertAttention : torch::autograd::Function<ExpertAttention> {
  static Tensor forward(AutogradContext* context, const Tensor& q, const Tensor& k, const Tensor& v,
                        const Tensor& tokens, const Tensor& offsets, const SymInt& slots, const SymInt& start,
                        const OptionalTensor& mask, std::optional<double> scale) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    auto [out, logsumexp] = call_forward().call(q, k, v, tokens, offsets, slots, start, mask, scale);
    context->save_for_backward({q, k, v, tokens, offsets, out, logsumexp, mask.value_or(Tensor())});
    context->saved_data["slots"] = slots;
    context->saved_data["start"] = start;
    context->saved_data["scale"] = scale;
    return out;
  }

  static variable_list backward(AutogradContext* context, const variable_list& grad) {
    const auto s = context->get_saved_variables();
    const OptionalTensor mask = s[7].defined() ? OptionalTensor(s[7]) : std::nullopt;
    const std::array<bool, 3> wanted{context->needs_input_grad(0), context->needs_input_grad(1),
                                     context->needs_input_grad(2)};
    auto [grad_q, grad_k, grad_v] = call_backward().call(
        grad[0], s[0], s[1], s[2], s[3], s[4], s[5], s[6], context->saved_data["slots"].toSymInt(),
        context->saved_data["start"].toSymInt(), mask, context->saved_data["scale"].toOptional<double>(), wanted);
    return {grad_q, grad_k, grad_v, Tensor(), Tensor(), Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

Tensor attention_autograd(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& tokens,
                          const Tensor& offsets, SymInt slots, SymInt start, const OptionalTensor& mask,
                          std::optional<double> scale) {
  check_arguments(q, k, v, tokens, offsets, slots, start, mask);
  if (missing_columns(q) > 0) return attention_widened(q, k, v, tokens, offsets, slots, start, mask, scale);
  return ExpertAttention::apply(q, k, v, tokens, offsets, slots, start, mask, scale);
}

Tensor attention_below_autograd(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& tokens,
                                const Tensor& offsets, SymInt slots, SymInt start, const OptionalTensor& mask,
                                std::optional<double> scale) {
  check_arguments(q, k, v, tokens, offsets, slots, start, mask);
  if (missing_columns(q) > 0) return attention_widened(q, k, v, tokens, offsets, slots, start, mask, scale);
  return std::get<0>(call_forward().call(q, k, v, tokens, offsets, slots, start, mask, scale));
}

std::tuple<Tensor, Tensor, Tensor> backward_autograd(const Tensor& grad_out, const Tensor& q, const Tensor& k,
                                                     const Tensor& v, const Tensor& tokens, const Tensor& offsets,
                                                     const Tensor& out, const Tensor& logsumexp, SymInt slots,
                                                     SymInt start, const OptionalTensor& mask,
                                                     std::optional<double> scale, std::array<bool, 3> wanted) {
  refuse_second_derivative(kName, grad_out, q, k, v);
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return call_backward().call(grad_out, q, k, v, tokens, offsets, out, logsumexp, slots, start, mask, scale, wanted);
}

// As torch's own attention: everything in the type of the autocast region.
Tensor attention_autocast(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& tokens,
                          const Tensor& offsets, SymInt slots, SymInt start, const OptionalTensor& mask,
                          std::optional<double> scale) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  return expert_attention(lower_precision(q), lower_precision(k), lower_precision(v), tokens, offsets, slots, start,
                          mask, scale);
}

}  // namespace

Tensor expert_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& tokens, const Tensor& offsets,
                        SymInt slots, SymInt start, const OptionalTensor& mask, std::optional<double> scale) {
  static const auto call = op<decltype(attention_autograd)>("micro::expert_attention");
  return call.call(q, k, v, tokens, offsets, slots, start, mask, scale);
}

TORCH_LIBRARY_FRAGMENT(micro, m) {
  m.def(
      "expert_attention(Tensor q, Tensor k, Tensor v, Tensor tokens, Tensor offsets, SymInt slots, SymInt start=0,"
      " Tensor? mask=None, float? scale=None) -> Tensor");
  m.def(
      "expert_attention_forward(Tensor q, Tensor k, Tensor v, Tensor tokens, Tensor offsets, SymInt slots,"
      " SymInt start, Tensor? mask, float? scale) -> (Tensor out, Tensor logsumexp)");
  m.def(
      "expert_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor tokens, Tensor offsets,"
      " Tensor out, Tensor logsumexp, SymInt slots, SymInt start, Tensor? mask, float? scale, bool[3] wanted)"
      " -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)");
}
TORCH_LIBRARY_IMPL(micro, CompositeExplicitAutograd, m) { m.impl("expert_attention", attention_below_autograd); }
TORCH_LIBRARY_IMPL(micro, Autograd, m) {
  m.impl("expert_attention", attention_autograd);
  m.impl("expert_attention_backward", backward_autograd);
}
TORCH_LIBRARY_IMPL(micro, AutocastCPU, m) { m.impl("expert_attention", attention_autocast); }
TORCH_LIBRARY_IMPL(micro, AutocastCUDA, m) { m.impl("expert_attention", attention_autocast); }
TORCH_LIBRARY_IMPL(micro, CPU, m) {
  m.impl("expert_attention_forward", forward);
  m.impl("expert_attention_backward", backward);
}
TORCH_LIBRARY_IMPL(micro, CUDA, m) {
  m.impl("expert_attention_forward", forward);
  m.impl("expert_attention_backward", backward);
}
TORCH_LIBRARY_IMPL(micro, Meta, m) {
  m.impl("expert_attention_forward", forward_meta);
  m.impl("expert_attention_backward", backward_meta);
}

}  // namespace micro
