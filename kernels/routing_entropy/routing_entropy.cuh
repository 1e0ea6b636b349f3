#pragma once
// Device code of the decision entropy: one thread per token of a layer.

#include "common/cuda/tokens.cuh"
#include "micro_kernels/routing_entropy.h"

namespace micro_kernels::cuda {

template <class T, int kWidth>
struct RoutingEntropyTerm {
  using Params = RoutingEntropyParams;
  static __device__ bool inside(const Params&, int64_t) { return true; }
  static __device__ bool wanted(const Params&, int64_t) { return true; }
  static __device__ double value(const Params& p, int64_t layer, int64_t token) {
    const T* row = static_cast<const T*>(p.probs) + (layer * p.tokens + token) * p.experts;
    const ScoreRow<T, kWidth> probs(row, p.experts);
    double sum = 0;
#pragma unroll
    for (int e = 0; e < probs.size(); ++e) {
      const double value = wide_at(probs, e);
      if (value != 0) sum -= value * log(value);
    }
    return sum;
  }
};

// One warp per layer, whose sums are no more than a warp's lanes.
template <class Acc>
__global__ void __launch_bounds__(kTokenThreads, 1)
    routing_entropy_mean_kernel(TokenSumsLaunch<RoutingEntropyParams> launch) {
  const RoutingEntropyParams& p = launch.op;
  const double real = counted_tokens(launch.real(), p.layers, launch.blocks, shared_memory<TokenSumMemory>());
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  for (int64_t layer = threadIdx.x / kWarp; layer < p.layers; layer += kTokenThreads / kWarp) {
    const double sum = warp_sum(lane < launch.blocks ? load(launch.sums + layer * launch.blocks + lane) : 0.0);
    if (lane == 0) store(static_cast<Acc*>(p.entropy) + layer, static_cast<Acc>(sum / real));
  }
}

struct RoutingEntropyBackwardLaunch {
  RoutingEntropyBackwardParams op;
  int64_t blocks;  // of each layer
};

template <class T, int kWidth>
__global__ void __launch_bounds__(kTokenThreads, 1)
    routing_entropy_backward_kernel(RoutingEntropyBackwardLaunch launch) {
  using Acc = accumulator_t<T>;
  const RoutingEntropyBackwardParams& p = launch.op;
  const TokenShare share(launch.blocks);
  const double real = real_tokens(p.mask, p.tokens, shared_memory<TokenSumMemory>());
  const double scale = static_cast<double>(load(static_cast<const Acc*>(p.grad_entropy) + share.layer)) / real;
  for (int64_t t = share.first; t < p.tokens; t += share.step) {
    const int64_t row = (share.layer * p.tokens + t) * p.experts;
    NewScoreRow<T, kWidth> grad(static_cast<T*>(p.grad_probs) + row, p.experts);
    if (is_real(p.mask, t)) {
      const ScoreRow<T, kWidth> probs(static_cast<const T*>(p.probs) + row, p.experts);
#pragma unroll
      for (int e = 0; e < grad.size(); ++e) {
        const double value = wide_at(probs, e);
        grad.set(e, static_cast<Acc>(value != 0 ? -scale * (log(value) + 1) : 0.0));
      }
    } else {
      fill_zero(grad);
    }
    grad.finish();
  }
}

}  // namespace micro_kernels::cuda
