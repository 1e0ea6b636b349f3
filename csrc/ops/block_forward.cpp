#include "micro/block_forward.h"

#include <ATen/core/List.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>
#include <cstdlib>
#include <memory>
#include <new>
#include <string_view>
#include <tuple>
#include <vector>

#include "micro_kernels/block_forward.h"
#include "ops/arguments.h"
#include "ops/common.h"
#include "ops/weight_rules.h"

namespace micro {
namespace {

using at::Tensor;
using micro_kernels::AttentionMask;
using micro_kernels::Matrix;
using TensorList = c10::List<OptionalTensor>;
// y, raw router logits ([0, E] where the router did not run), ids, weights, probs, effective.
using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

constexpr char kName[] = "micro::block_forward";
constexpr int64_t kLargestHead = 256;
constexpr int64_t kHeadStep = 8;  // the kernels take multiples of it
constexpr size_t kParameters = 14, kControls = 5;

// ---- lists of the op to names and back -----------------------------------------------------------------------------

TensorList list_of(const BlockParameters& p) {
  TensorList list;
  list.reserve(kParameters);
  for (const OptionalTensor& tensor :
       {OptionalTensor(p.q_proj), OptionalTensor(p.k_proj), OptionalTensor(p.v_proj), OptionalTensor(p.o_proj),
        OptionalTensor(p.gate_proj), OptionalTensor(p.up_proj), OptionalTensor(p.down_proj), p.router_in,
        OptionalTensor(p.router_out), p.input_norm, OptionalTensor(p.post_attention_norm), p.post_ffn_norm, p.q_norm,
        p.k_norm})
    list.push_back(tensor);
  return list;
}

BlockParameters parameters_of(const TensorList& list) {
  TORCH_CHECK_VALUE(list.size() == kParameters, kName, ": parameters must be ", kParameters,
                    " tensors or None, in the order of BlockParameters, got ", list.size());
  const auto given = [&](size_t i, const char* name) {
    const OptionalTensor tensor = list.get(i);
    TORCH_CHECK_VALUE(tensor.has_value(), kName, ": ", name, " is missing");
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

TensorList list_of(const RouteOptions& o) {
  TensorList list;
  list.reserve(kControls);
  for (const OptionalTensor& tensor : {o.rows, o.bias, o.ablate, o.force, o.replay}) list.push_back(tensor);
  return list;
}

// What FFN experts share gets an axis of one expert.
void add_expert_axis(BlockParameters& p) {
  for (Tensor* t : {&p.q_proj, &p.k_proj, &p.v_proj, &p.o_proj, &p.post_attention_norm}) *t = t->unsqueeze(0);
  for (OptionalTensor* t : {&p.input_norm, &p.post_ffn_norm, &p.q_norm, &p.k_norm})
    if (*t) *t = (*t)->unsqueeze(0);
}

struct Controls {
  OptionalTensor rows, bias, ablate, force, replay;

  explicit Controls(const TensorList& list) {
    TORCH_CHECK_VALUE(list.size() == kControls, kName,
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
struct Sizes {
  int64_t tokens, batch, hidden, heads, groups, head_dim, inner, experts, attention_experts, router_hidden;

  Sizes(const Tensor& x, const BlockParameters& p, const Tensor& cos, int64_t heads_, bool whole_block, int64_t slots)
      : heads(heads_) {
    TORCH_CHECK_VALUE(x.dim() == 2 || x.dim() == 3, kName, ": x must be [B * S, H] or [B, S, H], got ", x.sizes());
    Argument{kName, "cos", cos}.has_dims(2, "[T, D / 2]");
    Argument{kName, "k_proj", p.k_proj}.has_dims(3, "[E, G * D, H], or [G * D, H] under FFN experts");
    Argument{kName, "gate_proj", p.gate_proj}.has_dims(3, "[E, F, H]");
    hidden = x.size(-1);
    tokens = c10::multiply_integers(x.sizes().slice(0, x.dim() - 1));
    TORCH_CHECK_VALUE(slots > 0 && tokens % slots == 0, kName, ": slots must divide the ", tokens, " tokens, got ",
                      slots);
    batch = tokens / slots;
    head_dim = cos.size(1) * 2;
    TORCH_CHECK_VALUE(head_dim > 0 && head_dim <= kLargestHead && head_dim % kHeadStep == 0, kName,
                      ": the head size, twice the width of cos, must be a multiple of ", kHeadStep, " up to ",
                      kLargestHead, ", got ", head_dim);
    groups = p.k_proj.size(1) / head_dim;
    TORCH_CHECK_VALUE(groups > 0 && heads > 0 && heads % groups == 0, kName, ": ", heads, " query heads cannot share ",
                      groups, " key heads evenly");
    inner = p.gate_proj.size(1);
    experts = p.gate_proj.size(0);
    attention_experts = whole_block ? experts : 1;
    router_hidden = p.router_in ? p.router_in->size(0) : 0;
  }
};

void check_like_x(const char* name, const Tensor& tensor, at::IntArrayRef sizes, const Tensor& x, at::ScalarType type) {
  const Argument argument{kName, name, tensor};
  TORCH_CHECK_TYPE(tensor.scalar_type() == type, kName, ": ", name, " must be ", type, ", got ", tensor.scalar_type());
  argument.has_sizes(c10::fromIntArrayRefSlow(sizes));
  argument.is_beside("x", x);
}

void check_parameters(const Tensor& x, const BlockParameters& p, const Sizes& n) {
  const int64_t e = n.experts, a = n.attention_experts, h = n.hidden;
  const int64_t queries = n.heads * n.head_dim, keys = n.groups * n.head_dim;
  const at::ScalarType type = x.scalar_type();
  const auto check = [&](const char* name, const Tensor& tensor, at::IntArrayRef sizes) {
    check_like_x(name, tensor, sizes, x, type);
  };
  const auto check_gain = [&](const char* name, const OptionalTensor& gain, int64_t size) {
    if (gain) check(name, *gain, {a, size});
  };
  kernel_dtype(kName, x);
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
    check_like_x("router_out", p.router_out, {e, h}, x, accumulator_dtype(x));
  const bool post_norm = p.post_ffn_norm.has_value();
  TORCH_CHECK_VALUE(
      p.q_norm.has_value() == post_norm && p.k_norm.has_value() == post_norm && p.input_norm.has_value() == !post_norm,
      kName, ": give input_norm, or post_ffn_norm, q_norm and k_norm");
  check_gain("input_norm", p.input_norm, h);
  check_gain("post_attention_norm", p.post_attention_norm, h);
  check_gain("post_ffn_norm", p.post_ffn_norm, h);
  check_gain("q_norm", p.q_norm, queries);
  check_gain("k_norm", p.k_norm, keys);
}

void check_tables(const Tensor& x, const Tensor& cos, const Tensor& sin, const Sizes& n) {
  for (const auto& [name, table] : {std::pair<const char*, const Tensor&>{"cos", cos}, {"sin", sin}})
    check_like_x(name, table, {n.tokens, n.head_dim / 2}, x, accumulator_dtype(x));
}

void check_store(const char* name, const OptionalTensor& store, const Tensor& x, const Sizes& n, int64_t end) {
  Argument{kName, name, *store}.has_dims(5, "[B, E or 1, G, J, D]");
  check_like_x(name, *store, {n.batch, n.attention_experts, n.groups, store->size(3), n.head_dim}, x, x.scalar_type());
  TORCH_CHECK_VALUE(store->size(3) >= end && store->stride(4) == 1, kName, ": ", name, " must have at least ", end,
                    " slots and contiguous heads, got ", store->sizes(), " with strides ", store->strides());
}

void check_mask(const OptionalTensor& mask, const Tensor& x, const Sizes& n, int64_t slots, int64_t keys) {
  if (!mask) return;
  const Argument argument{kName, "mask", *mask};
  argument.is_beside("x", x);
  if (mask->dim() == 2) {
    argument.is(at::kBool);
    argument.has_sizes(c10::SymDimVector{n.batch, keys});
    return;
  }
  argument.has_dims(3, "[B, J] or [B or 1, S, J]");
  TORCH_CHECK_TYPE(mask->scalar_type() == at::kBool || mask->is_floating_point(), kName,
                   ": mask must be bool or floating, got ", mask->scalar_type());
  argument.has_sizes(c10::SymDimVector{mask->size(0) == 1 ? 1 : n.batch, slots, keys});
}

void check_controls(const Tensor& x, const Controls& c, const OptionalTensor& real, const Sizes& n, int64_t k) {
  TORCH_CHECK_VALUE(k >= 1 && k <= n.experts, kName, ": k must lie in 1 .. E = ", n.experts, ", got ", k);
  const auto check = [&](const char* name, const OptionalTensor& tensor, bool one_row, at::IntArrayRef sizes,
                         bool floating, at::ScalarType type) {
    if (!tensor) return;
    const Argument argument{kName, name, *tensor};
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

std::vector<Matrix> matrices(const Tensor& weight) {
  std::vector<Matrix> list(weight.size(0));
  const char* data = static_cast<const char*>(weight.const_data_ptr());
  const int64_t bytes = weight.size(1) * weight.size(2) * weight.element_size();
  for (size_t e = 0; e < list.size(); ++e) list[e].data = data + static_cast<int64_t>(e) * bytes;
  return list;
}

const void* pointer(const OptionalTensor& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; }

OptionalTensor wide(const OptionalTensor& tensor, const Tensor& x) {
  return tensor ? OptionalTensor(tensor->to(accumulator_dtype(x)).contiguous()) : std::nullopt;
}

int64_t token_stride(const OptionalTensor& tensor, int64_t tokens, int64_t width) {
  return tensor && tensor->size(0) == tokens ? width : 0;
}

micro_kernels::HeadStrides strides(const OptionalTensor& t) {
  if (!t) return {};
  return {t->stride(0), t->stride(1), t->stride(2), t->stride(3)};
}

void make_contiguous(BlockParameters& p) {
  for (Tensor* t : {&p.q_proj, &p.k_proj, &p.v_proj, &p.o_proj, &p.gate_proj, &p.up_proj, &p.down_proj, &p.router_out,
                    &p.post_attention_norm})
    *t = t->contiguous();
  for (OptionalTensor* t : {&p.router_in, &p.input_norm, &p.post_ffn_norm, &p.q_norm, &p.k_norm}) *t = contiguous(*t);
}

AttentionMask mask_kind(const OptionalTensor& mask) {
  if (!mask) return AttentionMask::kNone;
  if (mask->dim() == 2) return AttentionMask::kKeys;
  return mask->scalar_type() == at::kBool ? AttentionMask::kPairs : AttentionMask::kBias;
}

// Memory for one call. A decoded token comes back for as much a hundred times a second, so some is kept per thread.
class Workspace {
 public:
  explicit Workspace(int64_t bytes) {
    if (bytes > kKept) {
      own_ = allocate(bytes);
      return;
    }
    if (bytes > kept_size) {
      kept = allocate(bytes);
      kept_size = bytes;
    }
  }
  char* data() const { return own_ ? own_.get() : kept.get(); }

 private:
  struct Free {
    void operator()(char* memory) const { std::free(memory); }
  };
  using Memory = std::unique_ptr<char, Free>;
  static constexpr int64_t kKept = 16 << 20;

  static Memory allocate(int64_t bytes) {
    Memory memory(static_cast<char*>(std::aligned_alloc(64, static_cast<size_t>((bytes + 63) / 64 * 64 + 64))));
    if (!memory) throw std::bad_alloc();
    return memory;
  }

  Memory own_;
  static thread_local Memory kept;
  static thread_local int64_t kept_size;
};
thread_local Workspace::Memory Workspace::kept;
thread_local int64_t Workspace::kept_size = 0;

// ---- the op --------------------------------------------------------------------------------------------------------

Results allocate(const Tensor& x, int64_t experts, int64_t k, bool folded, bool run_router) {
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

Results forward(const Tensor& x_, const TensorList& parameters, const Tensor& cos_, const Tensor& sin_, int64_t heads,
                bool whole_block, double eps, int64_t slots, int64_t start, const OptionalTensor& keys,
                const OptionalTensor& values, const OptionalTensor& mask_, const OptionalTensor& real_, int64_t k,
                const TensorList& controls, std::string_view weight_rule, bool run_router) {
  BlockParameters p = parameters_of(parameters);
  if (!whole_block) add_expert_axis(p);
  const Controls c(controls);
  const Sizes n(x_, p, cos_, heads, whole_block, slots);
  check_parameters(x_, p, n);
  check_tables(x_, cos_, sin_, n);
  check_controls(x_, c, real_, n, k);
  TORCH_CHECK_VALUE(keys.has_value() == values.has_value() && (keys || start == 0) && start >= 0, kName,
                    ": start > 0 needs keys and values, and those come together; got start = ", start);
  if (keys) check_store("keys", keys, x_, n, start + slots);
  if (keys) check_store("values", values, x_, n, start + slots);
  const int64_t key_slots = start + slots;
  check_mask(mask_, x_, n, slots, key_slots);

  make_contiguous(p);
  const Tensor x = x_.contiguous(), cos = cos_.contiguous(), sin = sin_.contiguous();
  const bool additive = mask_ && mask_->scalar_type() != at::kBool;
  const OptionalTensor mask = additive ? wide(mask_, x) : contiguous(mask_), real = contiguous(real_),
                       rows = wide(c.rows, x), bias = wide(c.bias, x), ablate = contiguous(c.ablate),
                       force = contiguous(c.force), replay = contiguous(c.replay);
  const auto q = matrices(p.q_proj), key = matrices(p.k_proj), value = matrices(p.v_proj), o = matrices(p.o_proj),
             gate = matrices(p.gate_proj), up = matrices(p.up_proj), down = matrices(p.down_proj);
  run_router = run_router || !rows;
  auto [y, raw, ids, weights, probs, effective] = allocate(x, n.experts, k, !p.router_in, run_router);
  const micro_kernels::BlockForwardParams params{
      .shape = {.hidden = n.hidden,
                .heads = heads,
                .groups = n.groups,
                .head_dim = n.head_dim,
                .inner = n.inner,
                .experts = n.experts,
                .router_hidden = n.router_hidden,
                .whole_block = whole_block,
                .post_norm = p.post_ffn_norm.has_value(),
                .eps = eps,
                .rounding = p.post_ffn_norm ? micro_kernels::GainRounding::kAfterGain
                                            : micro_kernels::GainRounding::kBeforeGain,
                .dtype = kernel_dtype(kName, x)},
      .weights = {.q = q.data(),
                  .k = key.data(),
                  .v = value.data(),
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
                  .k_norm = pointer(p.k_norm)},
      .cache = {.k = keys ? keys->mutable_data_ptr() : nullptr,
                .v = values ? values->mutable_data_ptr() : nullptr,
                .k_strides = strides(keys),
                .v_strides = strides(values),
                .x = nullptr,
                .x_batch_stride = 0,
                .filled = nullptr,
                .positions = nullptr,
                .positions_stride = 0},
      .x = x.const_data_ptr(),
      .y = y.mutable_data_ptr(),
      .batch = n.batch,
      .slots = slots,
      .start = start,
      .starts = nullptr,
      .keys = key_slots,
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
                .weights = weights.mutable_data_ptr(),
                .probs = probs.mutable_data_ptr(),
                .effective = effective.mutable_data_ptr(),
                .bias_stride = token_stride(bias, n.tokens, n.experts),
                .ablate_stride = token_stride(ablate, n.tokens, n.experts),
                .force_stride = token_stride(force, n.tokens, 1),
                .tokens = n.tokens,
                .experts = n.experts,
                .k = k,
                .rule = kernel_rule(kName, weight_rule),
                .dtype = kernel_dtype(kName, x)},
      .raw = run_router ? raw.mutable_data_ptr() : nullptr,
      .regions = nullptr,
  };
  const Workspace workspace(micro_kernels::cpu::block_forward_workspace(params));
  const auto status = micro_kernels::cpu::block_forward(params, workspace.data(), parallel_for);
  TORCH_CHECK_VALUE(status != micro_kernels::Status::kIndexOutOfRange, kName,
                    ": force must hold -1 or an expert, replay an expert in [0, ", n.experts, ")");
  check(kName, status);
  return {y, raw, ids, weights, probs, effective};
}

Results forward_meta(const Tensor& x, const TensorList& parameters, const Tensor&, const Tensor&, int64_t, bool, double,
                     int64_t, int64_t, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                     const OptionalTensor&, int64_t k, const TensorList& controls, std::string_view, bool run_router) {
  const BlockParameters p = parameters_of(parameters);
  return allocate(x, p.gate_proj.sym_size(0).guard_int(__FILE__, __LINE__), k, !p.router_in,
                  run_router || !Controls(controls).rows);
}

Results forward_cuda(const Tensor& x, const TensorList&, const Tensor&, const Tensor&, int64_t, bool, double, int64_t,
                     int64_t, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                     const OptionalTensor&, int64_t, const TensorList&, std::string_view, bool) {
  check(kName, micro_kernels::cuda::block_forward({}, current_stream(x)));
  TORCH_INTERNAL_ASSERT(false, "a stand-in never succeeds");
}

auto call_forward() {
  static const auto call = op<decltype(forward)>("micro::block_forward");
  return call;
}

// Nothing is recorded: a gradient that somebody expects is refused rather than lost.
Results forward_autograd(const Tensor& x, const TensorList& parameters, const Tensor& cos, const Tensor& sin,
                         int64_t heads, bool whole_block, double eps, int64_t slots, int64_t start,
                         const OptionalTensor& keys, const OptionalTensor& values, const OptionalTensor& mask,
                         const OptionalTensor& real, int64_t k, const TensorList& controls,
                         std::string_view weight_rule, bool run_router) {
  bool recorded = must_record(x);
  for (const TensorList& list : {parameters, controls})
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
TORCH_LIBRARY_IMPL(micro, CUDA, m) { m.impl("block_forward", forward_cuda); }
TORCH_LIBRARY_IMPL(micro, Meta, m) { m.impl("block_forward", forward_meta); }

}  // namespace micro
