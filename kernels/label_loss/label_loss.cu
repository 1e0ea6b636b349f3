#include "common/cuda/launch.cuh"
#include "label_loss/label_loss.cuh"

namespace micro_kernels::cuda {

int64_t label_loss_workspace(const LabelLossParams& p) { return token_sums_workspace(p); }

Status label_loss(const LabelLossParams& p, void* workspace, void* stream) {
  const TokenSumsLaunch<LabelLossParams> params{p, static_cast<double*>(workspace), token_blocks(p.tokens)};
  return dispatch_device(p.dtype, [&]<class T>() {
    const auto sum_tokens = [&]<int kWidth>() { return launch_token_sums<LabelLossTerm<T, kWidth>>(params, stream); };
    const Status status = dispatch_width<T>(p.experts, sum_tokens, static_cast<const T*>(p.logits));
    if (status != Status::kOk) return status;
    return launch(label_loss_total_kernel<accumulator_t<T>>, dim3(1), dim3(kTokenThreads), sizeof(TokenSumMemory),
                  stream, params);
  });
}

Status label_loss_backward(const LabelLossBackwardParams& p, void* stream) {
  if (p.layers * p.tokens == 0) return Status::kOk;
  const LabelLossBackwardLaunch params{p, token_blocks(p.tokens)};
  return dispatch_device(p.dtype, [&]<class T>() {
    const auto start = [&]<int kWidth>() {
      return launch(label_loss_backward_kernel<T, kWidth>, token_grid(p.layers, p.tokens), dim3(kTokenThreads),
                    sizeof(TokenSumMemory), stream, params);
    };
    return dispatch_width<T>(p.experts, start, static_cast<const T*>(p.logits), static_cast<const T*>(p.grad_logits));
  });
}

}  // namespace micro_kernels::cuda
