#pragma once
// Device code of the load balancing loss, in two launches. In the first, each block counts and sums its share of the
// tokens of a layer, for a few experts; in the second, one block adds the shares in order and multiplies.

#include "common/cuda/arch/trap.cuh"
#include "common/cuda/lane_sums.cuh"
#include "common/cuda/tokens.cuh"
#include "micro_kernels/load_balancing_loss.h"

namespace micro_kernels::cuda {

inline constexpr int kExpertsPerBlock = 4;

struct LoadBalancingLaunch {
  LoadBalancingLossParams op;
  int64_t blocks;            // of each layer and group of experts
  int64_t groups;            // of kExpertsPerBlock experts
  double* chosen;            // [layers, blocks, experts]
  double* probability;       // [layers, blocks, experts]
  double* mean_chosen;       // [layers, experts]: f summed over choices
  double* mean_probability;  // [layers, experts]: P
  double* real;              // [blocks]
};

// Of each warp: the experts' choices, then their probabilities.
struct LoadBalancingShared {
  SharedArray<double, kTokenThreads / kWarp * 2 * kExpertsPerBlock> sums;
  TokenSumMemory real;
};

// Adds the row's probabilities of the experts from `first` on.
template <class T, int kWidth>
__device__ void add_probabilities(const LoadBalancingLossParams& p, int64_t row, int64_t first,
                                  double (&sums)[2 * kExpertsPerBlock]) {
  const T* from = static_cast<const T*>(p.probs) + row * p.experts + first;
  if constexpr (kWidth == kExpertsPerBlock) {
    const ScoreRow<T, kWidth> probs(from, p.experts);
#pragma unroll
    for (int e = 0; e < kExpertsPerBlock; ++e) sums[kExpertsPerBlock + e] += wide_at(probs, e);
  } else {
#pragma unroll
    for (int e = 0; e < kExpertsPerBlock; ++e)
      if (first + e < p.experts) sums[kExpertsPerBlock + e] += static_cast<double>(load(from + e));
  }
}

// Counts the row's choices of the experts from `first` on. False: one of them is no expert.
__device__ inline bool add_choices(const LoadBalancingLossParams& p, int64_t row, int64_t first,
                                   double (&sums)[2 * kExpertsPerBlock]) {
  bool inside = true;
  for (int64_t k = 0; k < p.choices; ++k) {
    const int32_t id = load(p.ids + row * p.choices + k);
    inside = inside && id >= 0 && id < p.experts;
#pragma unroll
    for (int e = 0; e < kExpertsPerBlock; ++e) sums[e] += id - first == e ? 1.0 : 0.0;
  }
  return inside;
}

// Adds what the block's threads have, and stores it at `to` on for the first `experts` of them.
__device__ inline void store_sums(const LoadBalancingLaunch& launch, int64_t to, int64_t experts,
                                  double (&sums)[2 * kExpertsPerBlock], LoadBalancingShared& shared) {
  constexpr int kSums = 2 * kExpertsPerBlock, kLanesPerSum = kWarp / kSums;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const double of_warp = sum_of_lane(sums);
  if (lane % kLanesPerSum == 0) shared.sums.store(warp * kSums + lane / kLanesPerSum, of_warp);
  __syncthreads();
  const int i = static_cast<int>(threadIdx.x), expert = i % kExpertsPerBlock;
  if (i >= kSums || expert >= experts) return;
  double sum = 0;
#pragma unroll
  for (int w = 0; w < kTokenThreads / kWarp; ++w) sum += shared.sums.load(w * kSums + i);
  store((i < kExpertsPerBlock ? launch.chosen : launch.probability) + to + expert, sum);
}

template <class T, int kWidth>
__global__ void __launch_bounds__(kTokenThreads, 1) load_balancing_sums_kernel(LoadBalancingLaunch launch) {
  const LoadBalancingLossParams& p = launch.op;
  auto& shared = shared_memory<LoadBalancingShared>();
  const TokenShare share(launch.blocks);
  const int64_t layer = share.layer / launch.groups, first = share.layer % launch.groups * kExpertsPerBlock;
  double sums[2 * kExpertsPerBlock] = {};  // choices, then probabilities
  double real = 0;
  bool inside = true;
  for (int64_t t = share.first; t < p.tokens; t += share.step) {
    if (!is_real(p.mask, t)) continue;
    real += 1;
    inside = add_choices(p, layer * p.tokens + t, first, sums) && inside;
    add_probabilities<T, kWidth>(p, layer * p.tokens + t, first, sums);
  }
  store_sums(launch, (layer * launch.blocks + share.block) * p.experts + first, p.experts - first, sums, shared);
  if (share.layer == 0) {  // of the whole block
    real = block_sum<kTokenThreads>(real, shared.real);
    if (threadIdx.x == 0) store(launch.real + share.block, real);
  }
  require(inside);
}

// The means of layer and expert number i, from the sums of the blocks.
__device__ inline void average_over_tokens(const LoadBalancingLaunch& launch, int64_t i, double real) {
  const int64_t experts = launch.op.experts;
  const int64_t from = i / experts * launch.blocks * experts + i % experts;
  double chosen = 0, probability = 0;
  for (int64_t block = 0; block < launch.blocks; ++block) {
    chosen += load(launch.chosen + from + block * experts);
    probability += load(launch.probability + from + block * experts);
  }
  store(launch.mean_chosen + i, chosen / real);
  store(launch.mean_probability + i, probability / real);
}

__device__ inline void average_over_layers(const LoadBalancingLossParams& p, int64_t expert, double* means) {
  double sum = 0;
  for (int64_t l = 0; l < p.layers; ++l) sum += load(means + l * p.experts + expert);
  for (int64_t l = 0; l < p.layers; ++l) store(means + l * p.experts + expert, sum / static_cast<double>(p.layers));
}

template <class Acc>
__global__ void __launch_bounds__(kTokenThreads, 1) load_balancing_total_kernel(LoadBalancingLaunch launch) {
  const LoadBalancingLossParams& p = launch.op;
  auto& memory = shared_memory<TokenSumMemory>();
  const double real = counted_tokens(launch.real, p.layers, launch.blocks, memory);
  const int64_t size = p.layers * p.experts;
  for (int64_t i = threadIdx.x; i < size; i += kTokenThreads) average_over_tokens(launch, i, real);
  __syncthreads();
  // With both means pooled over layers, the sum below is L times the pooled product: the division is the same.
  if (p.pooled) {
    for (int64_t e = threadIdx.x; e < p.experts; e += kTokenThreads) {
      average_over_layers(p, e, launch.mean_chosen);
      average_over_layers(p, e, launch.mean_probability);
    }
  }
  __syncthreads();
  const double scale = static_cast<double>(p.experts) / (p.layers > 1 ? static_cast<double>(p.layers) : 1.0);
  double loss = 0;
  for (int64_t i = threadIdx.x; i < size; i += kTokenThreads) {
    const double chosen = load(launch.mean_chosen + i);
    loss += scale * chosen * load(launch.mean_probability + i);
    store(static_cast<Acc*>(p.slope) + i, static_cast<Acc>(scale * chosen / real));
  }
  loss = block_sum<kTokenThreads>(loss, memory);
  if (threadIdx.x == 0) store(static_cast<Acc*>(p.loss), static_cast<Acc>(loss));
}

struct LoadBalancingBackwardLaunch {
  LoadBalancingLossBackwardParams op;
  int64_t blocks;  // of each layer
};

template <class T, int kWidth>
__global__ void __launch_bounds__(kTokenThreads, 1) load_balancing_backward_kernel(LoadBalancingBackwardLaunch launch) {
  const LoadBalancingLossBackwardParams& p = launch.op;
  const TokenShare share(launch.blocks);
  const T grad_loss = load(static_cast<const T*>(p.grad_loss));
  const ScoreRow<T, kWidth> slope(static_cast<const T*>(p.slope) + share.layer * p.experts, p.experts);
  for (int64_t t = share.first; t < p.tokens; t += share.step) {
    const int64_t row = (share.layer * p.tokens + t) * p.experts;
    NewScoreRow<T, kWidth> grad(static_cast<T*>(p.grad_probs) + row, p.experts);
    const bool real = is_real(p.mask, t);
#pragma unroll
    for (int e = 0; e < grad.size(); ++e) grad.set(e, real ? grad_loss * slope[e] : T(0));
    grad.finish();
  }
}

}  // namespace micro_kernels::cuda
