#pragma once
// What the ops of a whole layer share: their lists of tensors by name, checks, and the way to kernel parameters.

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <cmath>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "micro/block_forward.h"
#include "micro_kernels/block_forward.h"
#include "ops/arguments.h"
#include "ops/common.h"
#include "ops/weight_rules.h"

namespace micro {

using OptionalTensors = c10::List<OptionalTensor>;

constexpr int64_t kLargestHead = 256;
constexpr int64_t kHeadStep = 8;  // the kernels take multiples of it
constexpr size_t kBlockParameters = 14, kBlockControls = 5;

// ---- lists of the op to names and back -----------------------------------------------------------------------------

inline OptionalTensors list_of(const BlockParameters& p) {
  OptionalTensors list;
  list.reserve(kBlockParameters);
  for (const OptionalTensor& tensor :
       {OptionalTensor(p.q_proj), OptionalTensor(p.k_proj), OptionalTensor(p.v_proj), OptionalTensor(p.o_proj),
        OptionalTensor(p.gate_proj), OptionalTensor(p.up_proj), OptionalTensor(p.down_proj), p.router_in,
        OptionalTensor(p.router_out), p.input_norm, OptionalTensor(p.post_attention_norm), p.post_ffn_norm, p.q_norm,
        p.k_norm})
    list.push_back(tensor);
  return list;
}

inline BlockParameters parameters_of(const char* function, const OptionalTensors& list) {
  TORCH_CHECK_VALUE(list.size() == kBlockParameters, function, ": parameters must be ", kBlockParameters,
                    " tensors or None, in the order of BlockParameters, got ", list.size());
  const auto given = [&](size_t i, const char* name) {
    const OptionalTensor tensor = list.get(i);
    TORCH_CHECK_VALUE(tensor.has_value(), function, ": ", name, " is missing");
    return *tensor;
  };
  return {given(0, "q_proj"),
          given(1, "k_proj"),
          given(2, "v_proj"),
          given(3, "o_proj"),
          given(4, "gate_proj"),
          given(5, "up_proj"),
          given(6, "down_proj"),
          list.get(7),
          given(8, "router_out"),
          list.get(9),
          given(10, "post_attention_norm"),
          list.get(11),
          list.get(12),
          list.get(13)};
}

inline OptionalTensors list_of(const RouteOptions& o) {
  OptionalTensors list;
  list.reserve(kBlockControls);
  for (const OptionalTensor& tensor : {o.rows, o.bias, o.ablate, o.force, o.replay}) list.push_back(tensor);
  return list;
}

// What FFN experts share gets an axis of one expert.
inline void add_expert_axis(BlockParameters& p) {
  for (at::Tensor* t : {&p.q_proj, &p.k_proj, &p.v_proj, &p.o_proj, &p.post_attention_norm}) *t = t->unsqueeze(0);
  for (OptionalTensor* t : {&p.input_norm, &p.post_ffn_norm, &p.q_norm, &p.k_norm})
    if (*t) *t = (*t)->unsqueeze(0);
}

struct BlockControls {
  OptionalTensor rows, bias, ablate, force, replay;

  BlockControls(const char* function, const OptionalTensors& list) {
    TORCH_CHECK_VALUE(list.size() == kBlockControls, function,
                      ": controls must be rows, bias, ablate, force and replay, tensors or None, got ", list.size(),
                      " values");
    rows = list.get(0);
    bias = list.get(1);
    ablate = list.get(2);
    force = list.get(3);
    replay = list.get(4);
  }
};

// ---- checks --------------------------------------------------------------------------------------------------------

// What the sizes of the parameters say.
struct BlockSizes {
  int64_t tokens, batch, hidden, heads, groups, head_dim, inner, experts, attention_experts, router_hidden;

  BlockSizes(const char* function, const at::Tensor& x, const BlockParameters& p, const at::Tensor& cos, int64_t heads_,
             bool whole_block, int64_t slots)
      : heads(heads_) {
    TORCH_CHECK_VALUE(x.dim() == 2 || x.dim() == 3, function, ": x must be [B * S, H] or [B, S, H], got ", x.sizes());
    Argument{function, "cos", cos}.has_dims(2, "[T, D / 2]");
    Argument{function, "k_proj", p.k_proj}.has_dims(3, "[E, G * D, H], or [G * D, H] under FFN experts");
    Argument{function, "gate_proj", p.gate_proj}.has_dims(3, "[E, F, H]");
    hidden = x.size(-1);
    tokens = c10::multiply_integers(x.sizes().slice(0, x.dim() - 1));
    TORCH_CHECK_VALUE(slots > 0 && tokens % slots == 0, function, ": slots must divide the ", tokens, " tokens, got ",
                      slots);
    batch = tokens / slots;
    head_dim = cos.size(1) * 2;
    TORCH_CHECK_VALUE(head_dim > 0 && head_dim <= kLargestHead && head_dim % kHeadStep == 0, function,
                      ": the head size, twice the width of cos, must be a multiple of ", kHeadStep, " up to ",
                      kLargestHead, ", got ", head_dim);
    groups = p.k_proj.size(1) / head_dim;
    TORCH_CHECK_VALUE(groups > 0 && heads > 0 && heads % groups == 0, function, ": ", heads,
                      " query heads cannot share ", groups, " key heads evenly");
    inner = p.gate_proj.size(1);
    experts = p.gate_proj.size(0);
    attention_experts = whole_block ? experts : 1;
    router_hidden = p.router_in ? p.router_in->size(0) : 0;
  }
};

inline void check_like_x(const char* function, const char* name, const at::Tensor& tensor, at::IntArrayRef sizes,
                         const at::Tensor& x, at::ScalarType type) {
  const Argument argument{function, name, tensor};
  TORCH_CHECK_TYPE(tensor.scalar_type() == type, function, ": ", name, " must be ", type, ", got ",
                   tensor.scalar_type());
  argument.has_sizes(c10::fromIntArrayRefSlow(sizes));
  argument.is_beside("x", x);
}

inline void check_parameters(const char* function, const at::Tensor& x, const BlockParameters& p, const BlockSizes& n) {
  const int64_t e = n.experts, a = n.attention_experts, h = n.hidden;
  const int64_t queries = n.heads * n.head_dim, keys = n.groups * n.head_dim;
  const at::ScalarType type = x.scalar_type();
  const auto check = [&](const char* name, const at::Tensor& tensor, at::IntArrayRef sizes) {
    check_like_x(function, name, tensor, sizes, x, type);
  };
  const auto check_gain = [&](const char* name, const OptionalTensor& gain, int64_t size) {
    if (gain) check(name, *gain, {a, size});
  };
  kernel_dtype(function, x);
  check("q_proj", p.q_proj, {a, queries, h});
  check("k_proj", p.k_proj, {a, keys, h});
  check("v_proj", p.v_proj, {a, keys, h});
  check("o_proj", p.o_proj, {a, h, queries});
  check("gate_proj", p.gate_proj, {e, n.inner, h});
  check("up_proj", p.up_proj, {e, n.inner, h});
  check("down_proj", p.down_proj, {e, h, n.inner});
  if (p.router_in) check("router_in", *p.router_in, {n.router_hidden, h});
  if (p.router_in)
    check("router_out", p.router_out, {e, n.router_hidden});
  else
    check_like_x(function, "router_out", p.router_out, {e, h}, x, accumulator_dtype(x));
  const bool post_norm = p.post_ffn_norm.has_value();
  TORCH_CHECK_VALUE(
      p.q_norm.has_value() == post_norm && p.k_norm.has_value() == post_norm && p.input_norm.has_value() == !post_norm,
      function, ": give input_norm, or post_ffn_norm, q_norm and k_norm");
  check_gain("input_norm", p.input_norm, h);
  check_gain("post_attention_norm", p.post_attention_norm, h);
  check_gain("post_ffn_norm", p.post_ffn_norm, h);
  check_gain("q_norm", p.q_norm, queries);
  check_gain("k_norm", p.k_norm, keys);
}

inline void check_tables(const char* function, const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin,
                         const BlockSizes& n) {
  for (const auto& [name, table] : {std::pair<const char*, const at::Tensor&>{"cos", cos}, {"sin", sin}})
    check_like_x(function, name, table, {n.tokens, n.head_dim / 2}, x, accumulator_dtype(x));
}

inline void check_store(const char* function, const char* name, const OptionalTensor& store, const at::Tensor& x,
                        const BlockSizes& n, int64_t end) {
  Argument{function, name, *store}.has_dims(5, "[B, E or 1, G, J, D]");
  check_like_x(function, name, *store, {n.batch, n.attention_experts, n.groups, store->size(3), n.head_dim}, x,
               x.scalar_type());
  TORCH_CHECK_VALUE(store->size(3) >= end && store->stride(4) == 1, function, ": ", name, " must have at least ", end,
                    " slots and contiguous heads, got ", store->sizes(), " with strides ", store->strides());
}

inline void check_mask(const char* function, const OptionalTensor& mask, const at::Tensor& x, const BlockSizes& n,
                       int64_t slots, int64_t keys) {
  if (!mask) return;
  const Argument argument{function, "mask", *mask};
  argument.is_beside("x", x);
  if (mask->dim() == 2) {
    argument.is(at::kBool);
    argument.has_sizes(c10::SymDimVector{n.batch, keys});
    return;
  }
  argument.has_dims(3, "[B, J] or [B or 1, S, J]");
  TORCH_CHECK_TYPE(mask->scalar_type() == at::kBool || mask->is_floating_point(), function,
                   ": mask must be bool or floating, got ", mask->scalar_type());
  argument.has_sizes(c10::SymDimVector{mask->size(0) == 1 ? 1 : n.batch, slots, keys});
}

inline void check_controls(const char* function, const at::Tensor& x, const BlockControls& c,
                           const OptionalTensor& real, const BlockSizes& n, int64_t k) {
  TORCH_CHECK_VALUE(k >= 1 && k <= n.experts, function, ": k must lie in 1 .. E = ", n.experts, ", got ", k);
  const auto check = [&](const char* name, const OptionalTensor& tensor, bool one_row, at::IntArrayRef sizes,
                         bool floating, at::ScalarType type) {
    if (!tensor) return;
    const Argument argument{function, name, *tensor};
    floating ? argument.is_floating() : argument.is(type);
    std::vector<int64_t> wanted(sizes.begin(), sizes.end());
    if (one_row && tensor->dim() > 0 && tensor->size(0) == 1) wanted[0] = 1;
    argument.has_sizes(c10::fromIntArrayRefSlow(wanted));
    argument.is_beside("x", x);
  };
  check("rows", c.rows, false, {n.tokens, n.experts}, true, at::kFloat);
  check("bias", c.bias, true, {n.tokens, n.experts}, true, at::kFloat);
  check("ablate", c.ablate, true, {n.tokens, n.experts}, false, at::kBool);
  check("force", c.force, true, {n.tokens}, false, at::kInt);
  check("replay", c.replay, false, {n.tokens, k}, false, at::kInt);
  check("real", real, false, {n.tokens}, false, at::kBool);
}

// ---- tensors to kernel parameters ----------------------------------------------------------------------------------

inline std::vector<micro_kernels::Matrix> matrices(const at::Tensor& weight) {
  std::vector<micro_kernels::Matrix> list(weight.size(0));
  const char* data = static_cast<const char*>(weight.const_data_ptr());
  const int64_t bytes = weight.size(1) * weight.size(2) * weight.element_size();
  for (size_t e = 0; e < list.size(); ++e) list[e].data = data + static_cast<int64_t>(e) * bytes;
  return list;
}

inline const void* pointer(const OptionalTensor& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; }

inline OptionalTensor wide(const OptionalTensor& tensor, const at::Tensor& x) {
  return tensor ? OptionalTensor(tensor->to(accumulator_dtype(x)).contiguous()) : std::nullopt;
}

inline int64_t token_stride(const OptionalTensor& tensor, int64_t tokens, int64_t width) {
  return tensor && tensor->size(0) == tokens ? width : 0;
}

inline micro_kernels::HeadStrides strides(const OptionalTensor& t) {
  if (!t) return {};
  return {t->stride(0), t->stride(1), t->stride(2), t->stride(3)};
}

inline void make_contiguous(BlockParameters& p) {
  for (at::Tensor* t : {&p.q_proj, &p.k_proj, &p.v_proj, &p.o_proj, &p.gate_proj, &p.up_proj, &p.down_proj,
                        &p.router_out, &p.post_attention_norm})
    *t = t->contiguous();
  for (OptionalTensor* t : {&p.router_in, &p.input_norm, &p.post_ffn_norm, &p.q_norm, &p.k_norm}) *t = contiguous(*t);
}

inline micro_kernels::AttentionMask mask_kind(const OptionalTensor& mask) {
  if (!mask) return micro_kernels::AttentionMask::kNone;
  if (mask->dim() == 2) return micro_kernels::AttentionMask::kKeys;
  return mask->scalar_type() == at::kBool ? micro_kernels::AttentionMask::kPairs : micro_kernels::AttentionMask::kBias;
}

// ---- one call ------------------------------------------------------------------------------------------------------

// The arguments of a call, checked, contiguous, and held as long as the kernel parameters that point at them.
struct BlockArguments {
  BlockParameters p;
  BlockSizes n;
  at::Tensor x, cos, sin;
  OptionalTensor mask, real, rows, bias, ablate, force, replay;
  std::vector<micro_kernels::Matrix> q, k, v, o, gate, up, down;
  int64_t slots, start;

  BlockArguments(const char* function, const at::Tensor& x_, const OptionalTensors& parameters, const at::Tensor& cos_,
                 const at::Tensor& sin_, int64_t heads, bool whole_block, int64_t slots_, int64_t start_,
                 const OptionalTensor& mask_, const OptionalTensor& real_, int64_t experts_per_token,
                 const OptionalTensors& controls)
      : p(parameters_of(function, parameters)),
        n(function, x_, whole_block ? p : (add_expert_axis(p), p), cos_, heads, whole_block, slots_),
        slots(slots_),
        start(start_) {
    const BlockControls c(function, controls);
    check_parameters(function, x_, p, n);
    check_tables(function, x_, cos_, sin_, n);
    check_controls(function, x_, c, real_, n, experts_per_token);
    check_mask(function, mask_, x_, n, slots, start + slots);
    make_contiguous(p);
    x = x_.contiguous(), cos = cos_.contiguous(), sin = sin_.contiguous();
    mask = mask_ && mask_->scalar_type() != at::kBool ? wide(mask_, x) : contiguous(mask_);
    real = contiguous(real_), rows = wide(c.rows, x), bias = wide(c.bias, x), ablate = contiguous(c.ablate);
    force = contiguous(c.force), replay = contiguous(c.replay);
    q = matrices(p.q_proj), k = matrices(p.k_proj), v = matrices(p.v_proj), o = matrices(p.o_proj);
    gate = matrices(p.gate_proj), up = matrices(p.up_proj), down = matrices(p.down_proj);
  }

  micro_kernels::BlockShape shape(const char* function, bool whole_block, double eps) const {
    return {.hidden = n.hidden,
            .heads = n.heads,
            .groups = n.groups,
            .head_dim = n.head_dim,
            .inner = n.inner,
            .experts = n.experts,
            .router_hidden = n.router_hidden,
            .whole_block = whole_block,
            .post_norm = p.post_ffn_norm.has_value(),
            .eps = eps,
            .rounding =
                p.post_ffn_norm ? micro_kernels::GainRounding::kAfterGain : micro_kernels::GainRounding::kBeforeGain,
            .dtype = kernel_dtype(function, x)};
  }

  micro_kernels::BlockWeights weights() const {
    return {.q = q.data(),
            .k = k.data(),
            .v = v.data(),
            .o = o.data(),
            .gate = gate.data(),
            .up = up.data(),
            .down = down.data(),
            .router_in = {pointer(p.router_in)},
            .router_out = {p.router_out.const_data_ptr()},
            .input_norm = pointer(p.input_norm),
            .post_attention_norm = p.post_attention_norm.const_data_ptr(),
            .post_ffn_norm = pointer(p.post_ffn_norm),
            .q_norm = pointer(p.q_norm),
            .k_norm = pointer(p.k_norm)};
  }

  // Without a cache; results go into the tensors given, `raw` undefined where the router does not run.
  micro_kernels::BlockForwardParams forward(const char* function, bool whole_block, double eps, int64_t k_,
                                            std::string_view rule, const at::Tensor& y, const at::Tensor& raw,
                                            const at::Tensor& ids, const at::Tensor& weights_, const at::Tensor& probs,
                                            const at::Tensor& effective) const {
    return {
        .shape = shape(function, whole_block, eps),
        .weights = weights(),
        .cache = {},
        .x = x.const_data_ptr(),
        .y = y.mutable_data_ptr(),
        .batch = n.batch,
        .slots = slots,
        .start = start,
        .starts = nullptr,
        .keys = start + slots,
        .real = static_cast<const bool*>(pointer(real)),
        .mask = pointer(mask),
        .mask_kind = mask_kind(mask),
        .masks = mask ? mask->size(0) : 0,
        .cos = cos.const_data_ptr(),
        .sin = sin.const_data_ptr(),
        .positions = n.tokens,
        .position = nullptr,
        .scale = 1 / std::sqrt(static_cast<double>(n.head_dim)),
        .route = {.logits = nullptr,
                  .rows = pointer(rows),
                  .bias = pointer(bias),
                  .ablate = static_cast<const bool*>(pointer(ablate)),
                  .force = static_cast<const int32_t*>(pointer(force)),
                  .replay = static_cast<const int32_t*>(pointer(replay)),
                  .ids = ids.mutable_data_ptr<int32_t>(),
                  .weights = weights_.mutable_data_ptr(),
                  .probs = probs.mutable_data_ptr(),
                  .effective = effective.mutable_data_ptr(),
                  .bias_stride = token_stride(bias, n.tokens, n.experts),
                  .ablate_stride = token_stride(ablate, n.tokens, n.experts),
                  .force_stride = token_stride(force, n.tokens, 1),
                  .tokens = n.tokens,
                  .experts = n.experts,
                  .k = k_,
                  .rule = kernel_rule(function, rule),
                  .dtype = kernel_dtype(function, x)},
        .raw = raw.defined() ? raw.mutable_data_ptr() : nullptr,
        .regions = nullptr,
        .saved = nullptr,
    };
  }
};

inline void check_block(const char* function, micro_kernels::Status status, int64_t experts) {
  TORCH_CHECK_VALUE(status != micro_kernels::Status::kIndexOutOfRange, function,
                    ": force must hold -1 or an expert, replay an expert in [0, ", experts, ")");
  check(function, status);
}

// y, raw router logits ([0, E] where the router did not run), ids, weights, probs, effective.
using BlockResults = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

inline BlockResults allocate_block(const at::Tensor& x, int64_t experts, int64_t k, bool folded, bool run_router) {
  const auto wide = x.options().dtype(accumulator_dtype(x));
  c10::SymInt tokens = x.sym_size(0);
  if (x.dim() == 3) tokens = tokens * x.sym_size(1);
  return {at::empty_symint(x.sym_sizes(), x.options()),
          at::empty_symint({run_router ? tokens : c10::SymInt(0), experts}, folded ? wide : x.options()),
          at::empty_symint({tokens, k}, x.options().dtype(at::kInt)),
          at::empty_symint({tokens, k}, x.options()),
          at::empty_symint({tokens, experts}, wide),
          at::empty_symint({tokens, experts}, wide)};
}

}  // namespace micro
