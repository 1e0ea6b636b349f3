#include "micro/rope.h"

#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "micro_kernels/rope.h"
#include "ops/arguments.h"
#include "ops/common.h"

namespace micro {
namespace {

using at::Tensor;
using micro_kernels::RopeDirection;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr char kName[] = "micro::rope";

void check_table(const char* name, const Tensor& table, const Tensor& x, const c10::SymInt& positions) {
  const Argument argument{kName, name, table};
  TORCH_CHECK_TYPE(table.scalar_type() == at::kFloat || table.scalar_type() == at::kDouble, kName, ": ", name,
                   " must be float32 or float64, got ", table.scalar_type());
  argument.has_sizes({positions, x.sym_size(-1) / 2});
  argument.is_beside("x", x);
}

void check_arguments(const Tensor& x, const Tensor& cos, const Tensor& sin, const OptionalTensor& tokens) {
  kernel_dtype(kName, x);
  TORCH_CHECK_VALUE(x.dim() >= 3, kName, ": x must be [..., T, heads, D], got ", x.sym_sizes());
  TORCH_CHECK_VALUE((x.sym_size(-1) % 2).sym_eq(0).expect_true(__FILE__, __LINE__), kName,
                    ": the last size of x must be even, got ", x.sym_sizes());
  if (tokens) {
    Argument{kName, "x", x}.has_dims(3, "[N, heads, D] where tokens are given");
    const Argument argument{kName, "tokens", *tokens};
    argument.is(at::kInt);
    argument.has_sizes(x.sym_sizes().slice(0, 1));
    argument.is_beside("x", x);
  }
  Argument{kName, "cos", cos}.has_dims(2, "[T, D / 2]");
  const c10::SymInt positions = tokens ? cos.sym_size(0) : x.sym_size(-3);
  check_table("cos", cos, x, positions);
  check_table("sin", sin, x, positions);
}

// ---- forward and backward: one turn, in two directions, for both devices -------------------------------------------

Tensor allocate(const Tensor& x) { return at::empty_like(x, at::MemoryFormat::Contiguous); }

Tensor turn(const Tensor& x_, const Tensor& cos_, const Tensor& sin_, const OptionalTensor& tokens_,
            RopeDirection direction) {
  check_arguments(x_, cos_, sin_, tokens_);
  const c10::DeviceGuard device(x_.device());
  const Tensor x = x_.contiguous();
  const Tensor cos = cos_.to(accumulator_dtype(x)).contiguous(), sin = sin_.to(accumulator_dtype(x)).contiguous();
  const OptionalTensor tokens = contiguous(tokens_);
  Tensor y = allocate(x);
  const int64_t heads = x.size(-2), head_dim = x.size(-1);
  const micro_kernels::RopeParams params{
      .x = x.const_data_ptr(),
      .cos = cos.const_data_ptr(),
      .sin = sin.const_data_ptr(),
      .tokens = tokens ? tokens->const_data_ptr<int32_t>() : nullptr,
      .y = y.mutable_data_ptr(),
      .rows = x.numel() == 0 ? 0 : x.numel() / (heads * head_dim),
      .positions = cos.size(0),
      .heads = heads,
      .head_dim = head_dim,
      .direction = direction,
      .dtype = kernel_dtype(kName, x),
  };
  const auto status = x.is_cuda() ? micro_kernels::cuda::rope(params, current_stream(x))
                                  : micro_kernels::cpu::rope(params, parallel_for);
  TORCH_CHECK_VALUE(status != micro_kernels::Status::kIndexOutOfRange, kName, ": tokens must lie in [0, ", cos.size(0),
                    "), the rows of cos and sin");
  check(kName, status);
  return y;
}

Tensor forward(const Tensor& x, const Tensor& cos, const Tensor& sin, const OptionalTensor& tokens) {
  return turn(x, cos, sin, tokens, RopeDirection::kForward);
}

Tensor backward(const Tensor& grad_y, const Tensor& cos, const Tensor& sin, const OptionalTensor& tokens) {
  return turn(grad_y, cos, sin, tokens, RopeDirection::kBackward);
}

Tensor turn_meta(const Tensor& x, const Tensor& cos, const Tensor& sin, const OptionalTensor& tokens) {
  check_arguments(x, cos, sin, tokens);
  return allocate(x);
}

// ---- autograd: both directions go through the dispatcher, so that tracing sees them --------------------------------

auto call_forward() {
  static const auto call = op<decltype(forward)>("micro::rope");
  return call;
}

auto call_backward() {
  static const auto call = op<decltype(backward)>("micro::rope_backward");
  return call;
}

struct Rope : torch::autograd::Function<Rope> {
  static Tensor forward(AutogradContext* context, const Tensor& x, const Tensor& cos, const Tensor& sin,
                        const OptionalTensor& tokens) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    context->save_for_backward({cos, sin, tokens.value_or(Tensor())});
    return call_forward().call(x, cos, sin, tokens);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grad) {
    const auto saved = context->get_saved_variables();
    const OptionalTensor tokens = saved[2].defined() ? OptionalTensor(saved[2]) : std::nullopt;
    return {call_backward().call(grad[0], saved[0], saved[1], tokens), Tensor(), Tensor(), Tensor()};
  }
};

Tensor forward_autograd(const Tensor& x, const Tensor& cos, const Tensor& sin, const OptionalTensor& tokens) {
  TORCH_CHECK_NOT_IMPLEMENTED(!must_record(cos, sin), kName, ": cos and sin are constants; detach them");
  if (must_record(x)) return Rope::apply(x, cos, sin, tokens);
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return call_forward().call(x, cos, sin, tokens);
}

Tensor backward_autograd(const Tensor& grad_y, const Tensor& cos, const Tensor& sin, const OptionalTensor& tokens) {
  refuse_second_derivative(kName, grad_y);
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return call_backward().call(grad_y, cos, sin, tokens);
}

}  // namespace

Tensor rope(const Tensor& x, const Tensor& cos, const Tensor& sin, const OptionalTensor& tokens) {
  return call_forward().call(x, cos, sin, tokens);
}

TORCH_LIBRARY_FRAGMENT(micro, m) {
  m.def("rope(Tensor x, Tensor cos, Tensor sin, Tensor? tokens=None) -> Tensor");
  m.def("rope_backward(Tensor grad_y, Tensor cos, Tensor sin, Tensor? tokens) -> Tensor");
}
TORCH_LIBRARY_IMPL(micro, Autograd, m) {
  m.impl("rope", forward_autograd);
  m.impl("rope_backward", backward_autograd);
}
TORCH_LIBRARY_IMPL(micro, CPU, m) {
  m.impl("rope", forward);
  m.impl("rope_backward", backward);
}
TORCH_LIBRARY_IMPL(micro, CUDA, m) {
  m.impl("rope", forward);
  m.impl("rope_backward", backward);
}
TORCH_LIBRARY_IMPL(micro, Meta, m) {
  m.impl("rope", turn_meta);
  m.impl("rope_backward", turn_meta);
}

}  // namespace micro
