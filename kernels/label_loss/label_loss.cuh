#pragma once
// Device code of the label loss: one thread per token of a layer.

#include "common/cuda/arch/trap.cuh"
#include "common/cuda/tokens.cuh"
#include "micro_kernels/label_loss.h"

namespace micro_kernels::cuda {

inline constexpr double kSmallestLayerWeight = 1e-30;  // all layer weights 0: the loss is 0, not 0/0

template <class Acc, class Params>
__device__ double layer_weight(const Params& p, int64_t layer) {
  return p.layer_weights ? static_cast<double>(load(static_cast<const Acc*>(p.layer_weights) + layer)) : 1.0;
}

// What the weights are divided by. Summed by the whole block.
template <class Acc, class Params>
__device__ double layer_weight_sum(const Params& p, TokenSumMemory& memory) {
  double sum = 0;
  for (int64_t layer = threadIdx.x; layer < p.layers; layer += kTokenThreads) sum += layer_weight<Acc>(p, layer);
  sum = block_sum<kTokenThreads>(sum, memory);
  return sum < kSmallestLayerWeight ? kSmallestLayerWeight : sum;
}

template <class T, int kWidth>
struct LabelLossTerm {
  using Params = LabelLossParams;
  static __device__ bool inside(const Params& p, int64_t token) { return load(p.labels + token) < p.experts; }
  static __device__ bool wanted(const Params& p, int64_t layer) {
    return layer_weight<accumulator_t<T>>(p, layer) != 0;
  }
  static __device__ double value(const Params& p, int64_t layer, int64_t token) {
    const int64_t label = load(p.labels + token);
    if (label < 0) return 0;
    const ScoreRow<T, kWidth> z(static_cast<const T*>(p.logits) + (layer * p.tokens + token) * p.experts, p.experts);
    return log_sum_exp(z) - static_cast<double>(z.at(static_cast<int>(label)));
  }
};

template <class Acc>
__global__ void __launch_bounds__(kTokenThreads, 1) label_loss_total_kernel(TokenSumsLaunch<LabelLossParams> launch) {
  const LabelLossParams& p = launch.op;
  auto& memory = shared_memory<TokenSumMemory>();
  const double weights = layer_weight_sum<Acc>(p, memory);
  double sum = 0;
  for (int64_t i = threadIdx.x; i < p.layers * launch.blocks; i += kTokenThreads) {
    const double share = layer_weight<Acc>(p, i / launch.blocks) / weights;
    if (share != 0) sum += share * load(launch.sums + i);
  }
  sum = block_sum<kTokenThreads>(sum, memory);
  if (threadIdx.x == 0) store(static_cast<Acc*>(p.loss), static_cast<Acc>(sum));
}

struct LabelLossBackwardLaunch {
  LabelLossBackwardParams op;
  int64_t blocks;  // of each layer
};

template <class T, int kWidth>
__global__ void __launch_bounds__(kTokenThreads, 1) label_loss_backward_kernel(LabelLossBackwardLaunch launch) {
  using Acc = accumulator_t<T>;
  const LabelLossBackwardParams& p = launch.op;
  const TokenShare share(launch.blocks);
  const double weights = layer_weight_sum<Acc>(p, shared_memory<TokenSumMemory>());
  const double grad_loss = static_cast<double>(load(static_cast<const Acc*>(p.grad_loss)));
  const double scale = grad_loss * (layer_weight<Acc>(p, share.layer) / weights);
  for (int64_t t = share.first; t < p.tokens; t += share.step) {
    const int64_t label = load(p.labels + t);
    require(label < p.experts);
    const int64_t row = (share.layer * p.tokens + t) * p.experts;
    NewScoreRow<T, kWidth> grad(static_cast<T*>(p.grad_logits) + row, p.experts);
    if (label >= 0 && is_real(p.mask, t)) {
      const ScoreRow<T, kWidth> z(static_cast<const T*>(p.logits) + row, p.experts);
      const double total = log_sum_exp(z);
#pragma unroll
      for (int e = 0; e < grad.size(); ++e)
        grad.set(e, static_cast<Acc>(scale * (exp(wide_at(z, e) - total) - (e == label ? 1.0 : 0.0))));
    } else {
      fill_zero(grad);
    }
    grad.finish();
  }
}

}  // namespace micro_kernels::cuda
