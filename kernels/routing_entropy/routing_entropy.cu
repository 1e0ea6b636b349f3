#include "common/cuda/launch.cuh"
#include "routing_entropy/routing_entropy.cuh"

namespace micro_kernels::cuda {

int64_t routing_entropy_workspace(const RoutingEntropyParams& p) { return token_sums_workspace(p); }

Status routing_entropy(const RoutingEntropyParams& p, void* workspace, void* stream) {
  if (p.layers == 0) return Status::kOk;
  const TokenSumsLaunch<RoutingEntropyParams> params{p, static_cast<double*>(workspace), token_blocks(p.tokens)};
  return dispatch_device(p.dtype, [&]<class T>() {
    const auto sum_tokens = [&]<int kWidth>() {
      return launch_token_sums<RoutingEntropyTerm<T, kWidth>>(params, stream);
    };
    const Status status = dispatch_width<T>(p.experts, sum_tokens, static_cast<const T*>(p.probs));
    if (status != Status::kOk) return status;
    return launch(routing_entropy_mean_kernel<accumulator_t<T>>, dim3(1), dim3(kTokenThreads), sizeof(TokenSumMemory),
                  stream, params);
  });
}

Status routing_entropy_backward(const RoutingEntropyBackwardParams& p, void* stream) {
  if (p.layers * p.tokens == 0) return Status::kOk;
  const RoutingEntropyBackwardLaunch params{p, token_blocks(p.tokens)};
  return dispatch_device(p.dtype, [&]<class T>() {
    const auto start = [&]<int kWidth>() {
      return launch(routing_entropy_backward_kernel<T, kWidth>, token_grid(p.layers, p.tokens), dim3(kTokenThreads),
                    sizeof(TokenSumMemory), stream, params);
    };
    return dispatch_width<T>(p.experts, start, static_cast<const T*>(p.probs), static_cast<const T*>(p.grad_probs));
  });
}

}  // namespace micro_kernels::cuda
