#pragma once
// Device code of the plan: one launch, no working memory. Each block reads all pairs to learn how many each expert has
// and how many of them come before its own chunk, then gives the pairs of its chunk their rows, in order. Reading all
// of them again in each block costs little: they are a few bytes per pair and come from the cache.

#include "common/cuda/arch/trap.cuh"
#include "common/cuda/lane_sums.cuh"
#include "common/cuda/memory.cuh"
#include "common/cuda/warp.cuh"
#include "micro_kernels/plan.h"

namespace micro_kernels::cuda {

inline constexpr int kPlanThreads = 512;
inline constexpr int kPlanWarps = kPlanThreads / kWarp;
inline constexpr int kPlanMostBlocks = 64;
// Bins counted in one pass over the pairs: the bins of four experts and of idle pairs, and some more.
inline constexpr int kPlanBins = 8;

struct PlanLaunch {
  PlanParams plan;
  int64_t chunk_tokens;  // tokens of each block
};

struct PlanShared {
  // Of each warp: the bins' pairs before the chunk, and the others; then the rows where its pairs of each bin begin.
  SharedArray<int32_t, kPlanWarps * 2 * kPlanBins> counts;
  SharedArray<int32_t, 2 * kPlanBins> sums;
  SharedArray<int32_t, kPlanBins> next_rows;  // of this chunk, per bin
};

// The bin of a pair: its expert, or expert_count where it is idle.
template <class T>
__device__ int32_t bin_of(const PlanParams& p, int64_t token, int64_t pair) {
  const bool padded = p.mask && !load(p.mask + token);
  const bool weightless =
      p.weights && static_cast<accumulator_t<T>>(load(static_cast<const T*>(p.weights) + pair)) == 0;
  return padded || weightless ? static_cast<int32_t>(p.expert_count) : load(p.ids + pair);
}

// This thread's share of the pairs of the tokens [begin, end), one count per bin from first_bin on, to counts[kTo +
// ..].
template <class T, int kTo>
__device__ void count_bins(const PlanParams& p, int64_t begin, int64_t end, int32_t first_bin,
                           int32_t (&counts)[2 * kPlanBins]) {
#pragma unroll 4
  for (int64_t token = begin + threadIdx.x; token < end; token += kPlanThreads) {
    for (int64_t pair = token * p.k; pair < (token + 1) * p.k; ++pair) {
      const int32_t bin = bin_of<T>(p, token, pair) - first_bin;
#pragma unroll
      for (int b = 0; b < kPlanBins; ++b) counts[kTo + b] += bin == b ? 1 : 0;
    }
  }
}

// Sums over the block, to shared.sums: of each bin, the pairs before the chunk, then the others.
template <class T>
__device__ void sum_bins(const PlanParams& p, int64_t begin, int32_t first_bin, PlanShared& shared) {
  int32_t counts[2 * kPlanBins] = {};
  count_bins<T, 0>(p, 0, begin, first_bin, counts);
  count_bins<T, kPlanBins>(p, begin, p.token_count, first_bin, counts);
  const int32_t sum = sum_of_lane(counts);
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  static_assert(4 * kPlanBins == kWarp);
  if (lane % 2 == 0) shared.counts.store(warp * 2 * kPlanBins + lane / 2, sum);
  __syncthreads();
  if (threadIdx.x < 2 * kPlanBins) {
    int32_t sum = 0;
#pragma unroll
    for (int w = 0; w < kPlanWarps; ++w) sum += shared.counts.load(w * 2 * kPlanBins + threadIdx.x);
    shared.sums.store(threadIdx.x, sum);
  }
  __syncthreads();
}

// The first rows of this chunk in each bin. `row` is the first row of the first bin, and returns behind the last one.
__device__ inline void start_rows(const PlanParams& p, int32_t first_bin, int32_t& row, PlanShared& shared) {
#pragma unroll
  for (int b = 0; b < kPlanBins; ++b) {
    if (static_cast<int>(threadIdx.x) == b) {
      shared.next_rows.store(b, row + shared.sums.load(b));
      if (blockIdx.x == 0 && first_bin + b <= p.expert_count) store(p.offsets + first_bin + b, row);
    }
    row += shared.sums.load(b) + shared.sums.load(kPlanBins + b);
  }
  __syncthreads();
}

// Where the pairs of each warp begin: counts [warps, bins] become rows, the warps in order, and next_rows moves on.
__device__ inline void counts_to_rows(PlanShared& shared) {
  if (threadIdx.x < kPlanBins) {
    int32_t row = shared.next_rows.load(threadIdx.x);
#pragma unroll
    for (int w = 0; w < kPlanWarps; ++w) {
      const int32_t here = shared.counts.load(w * kPlanBins + threadIdx.x);
      shared.counts.store(w * kPlanBins + threadIdx.x, row);
      row += here;
    }
    shared.next_rows.store(threadIdx.x, row);
  }
}

// Gives a row to each of the next kPlanThreads pairs (one per thread, the last at `end`) that lie in the bins.
template <class T>
__device__ void place_pairs(const PlanParams& p, int64_t pair, int64_t end, int32_t first_bin, PlanShared& shared) {
  const int64_t token = static_cast<uint32_t>(pair) / static_cast<uint32_t>(p.k);  // pairs fit into int32
  const int32_t bin = pair < end ? bin_of<T>(p, token, pair) - first_bin : -1;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  int32_t rank = 0, warp_count = 0;  // of this pair among its bin's in the warp; lane b holds the count of bin b
#pragma unroll
  for (int b = 0; b < kPlanBins; ++b) {
    const unsigned same = __ballot_sync(kAllLanes, bin == b);
    if (bin == b) rank = __popc(same & ((1u << lane) - 1u));
    if (lane == b) warp_count = __popc(same);
  }
  if (lane < kPlanBins) shared.counts.store(warp * kPlanBins + lane, warp_count);
  __syncthreads();
  counts_to_rows(shared);
  __syncthreads();
  if (bin >= 0 && bin < kPlanBins) {
    const int32_t row = shared.counts.load(warp * kPlanBins + bin) + rank;
    store(p.tokens + row, static_cast<int32_t>(token));
    store(p.experts + row, load(p.ids + pair));
    store(p.inverse + pair, row);
  }
  __syncthreads();
}

template <class T>
__global__ void __launch_bounds__(kPlanThreads, 1) plan_kernel(PlanLaunch launch) {
  const PlanParams& p = launch.plan;
  auto& shared = shared_memory<PlanShared>();
  const auto chunk_begin = [&launch, &p](int64_t chunk) {
    const int64_t token = chunk * launch.chunk_tokens;
    return token < p.token_count ? token : p.token_count;
  };
  const int64_t begin = chunk_begin(blockIdx.x), end = chunk_begin(int64_t{blockIdx.x} + 1);
  int32_t row = 0;
  for (int32_t first_bin = 0; first_bin <= p.expert_count; first_bin += kPlanBins) {
    sum_bins<T>(p, begin, first_bin, shared);
    start_rows(p, first_bin, row, shared);
    for (int64_t pair = begin * p.k; pair < end * p.k; pair += kPlanThreads)
      place_pairs<T>(p, pair + threadIdx.x, end * p.k, first_bin, shared);
  }
  // Last, because an assertion is a call, and would push what is alive out of the registers.
  for (int64_t pair = begin * p.k + threadIdx.x; pair < end * p.k; pair += kPlanThreads)
    require(load(p.ids + pair) >= 0 && load(p.ids + pair) < p.expert_count);
}

}  // namespace micro_kernels::cuda
