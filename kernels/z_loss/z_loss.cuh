#pragma once
// Device code of the z-loss: one thread per token of a layer.

#include "common/cuda/tokens.cuh"
#include "micro_kernels/z_loss.h"

namespace micro_kernels::cuda {

template <class T, int kWidth>
struct ZLossTerm {
  using Params = ZLossParams;
  static __device__ bool inside(const Params&, int64_t) { return true; }
  static __device__ bool wanted(const Params&, int64_t) { return true; }
  static __device__ double value(const Params& p, int64_t layer, int64_t token) {
    const T* row = static_cast<const T*>(p.logits) + (layer * p.tokens + token) * p.experts;
    const double z = log_sum_exp(ScoreRow<T, kWidth>(row, p.experts));
    return z * z;
  }
};

template <class Acc>
__global__ void __launch_bounds__(kTokenThreads, 1) z_loss_total_kernel(TokenSumsLaunch<ZLossParams> launch) {
  const ZLossParams& p = launch.op;
  auto& memory = shared_memory<TokenSumMemory>();
  double sum = 0;
  for (int64_t i = threadIdx.x; i < p.layers * launch.blocks; i += kTokenThreads) sum += load(launch.sums + i);
  sum = block_sum<kTokenThreads>(sum, memory);
  const double real = counted_tokens(launch.real(), p.layers, launch.blocks, memory);
  const double layers = p.layers > 1 ? static_cast<double>(p.layers) : 1.0;
  if (threadIdx.x == 0) store(static_cast<Acc*>(p.loss), static_cast<Acc>(sum / (real * layers)));
}

struct ZLossBackwardLaunch {
  ZLossBackwardParams op;
  int64_t blocks;  // of each layer
};

// d/dz[e] of lse^2 = 2 lse softmax(z)[e]
template <class T, int kWidth>
__global__ void __launch_bounds__(kTokenThreads, 1) z_loss_backward_kernel(ZLossBackwardLaunch launch) {
  using Acc = accumulator_t<T>;
  const ZLossBackwardParams& p = launch.op;
  const TokenShare share(launch.blocks);
  const double real = real_tokens(p.mask, p.tokens, shared_memory<TokenSumMemory>());
  const double grad_loss = static_cast<double>(load(static_cast<const Acc*>(p.grad_loss)));
  const double scale = grad_loss / (real * static_cast<double>(p.layers));
  for (int64_t t = share.first; t < p.tokens; t += share.step) {
    const int64_t row = (share.layer * p.tokens + t) * p.experts;
    NewScoreRow<T, kWidth> grad(static_cast<T*>(p.grad_logits) + row, p.experts);
    if (is_real(p.mask, t)) {
      const ScoreRow<T, kWidth> logits(static_cast<const T*>(p.logits) + row, p.experts);
      const double z = log_sum_exp(logits);
#pragma unroll
      for (int e = 0; e < grad.size(); ++e) grad.set(e, static_cast<Acc>(scale * 2 * z * exp(wide_at(logits, e) - z)));
    } else {
      fill_zero(grad);
    }
    grad.finish();
  }
}

}  // namespace micro_kernels::cuda
