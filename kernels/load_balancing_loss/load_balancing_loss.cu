#include "common/cuda/launch.cuh"
#include "load_balancing_loss/load_balancing_loss.cuh"

namespace micro_kernels::cuda {
namespace {

// Calls body.operator()<T>() with the type of the probabilities, which are never narrower than float32.
template <class Body>
Status dispatch_wide(DType dtype, Body&& body) {
  return dtype == DType::kFloat64 ? body.template operator()<double>() : body.template operator()<float>();
}

int64_t partial_sums(const LoadBalancingLossParams& p) { return p.layers * token_blocks(p.tokens) * p.experts; }

LoadBalancingLaunch launch_of(const LoadBalancingLossParams& p, void* workspace) {
  LoadBalancingLaunch launch{};
  launch.op = p;
  launch.blocks = token_blocks(p.tokens);
  launch.groups = ceil_div(p.experts, kExpertsPerBlock);
  launch.chosen = static_cast<double*>(workspace);
  launch.probability = launch.chosen + partial_sums(p);
  launch.mean_chosen = launch.probability + partial_sums(p);
  launch.mean_probability = launch.mean_chosen + p.layers * p.experts;
  launch.real = launch.mean_probability + p.layers * p.experts;
  return launch;
}

}  // namespace

int64_t load_balancing_loss_workspace(const LoadBalancingLossParams& p) {
  const int64_t doubles = 2 * partial_sums(p) + 2 * p.layers * p.experts + token_blocks(p.tokens);
  return ceil_div(doubles * static_cast<int64_t>(sizeof(double)), 16) * 16;
}

Status load_balancing_loss(const LoadBalancingLossParams& p, void* workspace, void* stream) {
  const LoadBalancingLaunch params = launch_of(p, workspace);
  return dispatch_wide(p.dtype, [&]<class T>() {
    const auto sum_tokens = [&]<int kWidth>() {
      return launch(load_balancing_sums_kernel<T, kWidth>, token_grid(p.layers * params.groups, p.tokens),
                    dim3(kTokenThreads), sizeof(LoadBalancingShared), stream, params);
    };
    if (p.layers * p.tokens * p.experts > 0) {
      const Status status = dispatch_width<T>(p.experts, sum_tokens, static_cast<const T*>(p.probs));
      if (status != Status::kOk) return status;
    }
    return launch(load_balancing_total_kernel<T>, dim3(1), dim3(kTokenThreads), sizeof(TokenSumMemory), stream, params);
  });
}

Status load_balancing_loss_backward(const LoadBalancingLossBackwardParams& p, void* stream) {
  if (p.layers * p.tokens == 0) return Status::kOk;
  const LoadBalancingBackwardLaunch params{p, token_blocks(p.tokens)};
  return dispatch_wide(p.dtype, [&]<class T>() {
    const auto start = [&]<int kWidth>() {
      return launch(load_balancing_backward_kernel<T, kWidth>, token_grid(p.layers, p.tokens), dim3(kTokenThreads),
                    stream, params);
    };
    return dispatch_width<T>(p.experts, start, static_cast<const T*>(p.slope), static_cast<const T*>(p.grad_probs));
  });
}

}  // namespace micro_kernels::cuda
