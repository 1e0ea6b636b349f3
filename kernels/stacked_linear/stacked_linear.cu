#include "micro_kernels/expert_linear.h"
#include "micro_kernels/stacked_linear.h"

namespace micro_kernels::cuda {
namespace {

// Elements from one expert's x to the next one's; 0 where all read the same.
template <class Params>
int64_t expert_stride(const Params& p) {
  return p.inputs == 1 ? 0 : p.tokens * p.in;
}

}  // namespace

Status stacked_linear(const StackedLinearParams& p, void* stream) {
  LinearGroup group;
  group.x = {p.x, nullptr, p.in};
  group.x_expert_stride = expert_stride(p);
  group.weight = p.weight;
  group.weight_expert_stride = p.out * p.in;
  group.y = {p.y, nullptr, p.out};
  group.y_expert_stride = p.tokens * p.out;
  group.used = p.offsets;
  group.rows = p.tokens, group.experts = p.experts, group.in = p.in, group.out = p.out;
  return linear(&group, 1, p.dtype, stream, p.tf32);
}

// Where all experts read the same x its gradient is the sum over them, in one chain, so that it is rounded once.
Status stacked_linear_backward(const StackedLinearBackwardParams& p, void* stream) {
  const ConstRows grad_y{p.grad_y, nullptr, p.out};
  if (p.grad_x) {
    LinearGradXGroup group;
    group.sources[0] = {.grad_y = grad_y,
                        .grad_y_expert_stride = p.tokens * p.out,
                        .weight = p.weight,
                        .weight_expert_stride = p.out * p.in,
                        .out = p.out};
    group.grad_x = {p.grad_x, nullptr, p.in};
    group.grad_x_expert_stride = expert_stride(p);
    group.used = p.offsets;
    group.rows = p.tokens, group.experts = p.experts, group.in = p.in;
    group.sum_experts = p.inputs == 1;
    const Status status = linear_grad_x(&group, 1, p.dtype, stream, p.tf32);
    if (status != Status::kOk) return status;
  }
  if (!p.grad_weight) return Status::kOk;
  LinearGradWeightGroup group;
  group.grad_y = grad_y;
  group.grad_y_expert_stride = p.tokens * p.out;
  group.x = {p.x, nullptr, p.in};
  group.x_expert_stride = expert_stride(p);
  group.grad_weight = p.grad_weight;
  group.used = p.offsets;
  group.rows = p.tokens, group.experts = p.experts, group.in = p.in, group.out = p.out;
  return linear_grad_weight(&group, 1, p.dtype, stream, p.tf32);
}

}  // namespace micro_kernels::cuda
