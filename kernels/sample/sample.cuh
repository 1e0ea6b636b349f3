#pragma once
// Device code of the choice of a token: one block per row.
//
// Numbers are compared as unsigned integers of the same order. Weights are fixed-point integers, so that every sum is
// exact and no result depends on the order of additions: a weight is exp(s - largest s) in steps of about 2^-43 of the
// largest weight (for a vocabulary of 2^18; sums of all weights stay below 2^63). Thresholds are found by search,
// without sorting: each pass over what is left of the row divides the interval in eight.

#include "common/cuda/block.cuh"
#include "common/cuda/neighbours.cuh"
#include "micro_kernels/sample.h"
#include "sample/philox.h"

namespace micro_kernels::cuda {

inline constexpr int kSampleThreads = 512;
inline constexpr int kSampleWarps = kSampleThreads / kWarp;
inline constexpr int kSearchBits = 3;
inline constexpr int kBounds = (1 << kSearchBits) - 1;  // between the parts of an interval

struct SampleLaunch {
  SampleParams params;
  bool in_vectors;       // of the logits, for greedy_kernel
  int64_t slots;         // of a row in the two arrays below, a multiple of kSampleThreads
  uint64_t* numbers;     // [rows, slots]; by greedy_kernel not used
  uint64_t* candidates;  // [rows, slots], where something is searched for
  double scale;          // the largest weight
};

struct LargestMemory {
  BlockSumMemory<uint64_t, kSampleThreads> order;
  BlockSumMemory<int64_t, kSampleThreads> id;
};

struct SampleMemory {
  LargestMemory largest;
  BlockSumMemory<uint64_t, kSampleThreads> sum;
  SharedArray<uint64_t, kSampleThreads * kBounds> thread_sums;
  SharedArray<uint64_t, kBounds> sums;
  SharedArray<uint64_t, kSampleWarps> pieces;
};

// Calls body(i, from[i]) for i = first, first + kStride ... below `end`, with several loads under way at once: few
// warps work on a row, and each would else wait for one number after the other.
template <int kStride, class T, class Body>
__device__ __forceinline__ void for_each(const T* from, int64_t first, int64_t end, const Body& body) {
  constexpr int kAtOnce = 8;
  for (; first < end; first += kAtOnce * kStride) {
    T loaded[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      if (first + i * kStride < end) loaded[i] = load(from + first + i * kStride);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      if (first + i * kStride < end) body(first + i * kStride, loaded[i]);
  }
}

// ---- numbers as integers of the same order ------------------------------------------------------------------------

// NaN is 0, minus infinity comes next; the two zeros are the same.
__device__ inline uint64_t order_of(float x) {
  const auto bits = __builtin_bit_cast(uint32_t, x + 0.0f);
  if (x != x) return 0;
  return bits >> 31 ? ~bits : bits | 0x8000'0000u;
}
__device__ inline uint64_t order_of(double x) {
  const auto bits = __builtin_bit_cast(uint64_t, x + 0.0);
  if (x != x) return 0;
  return bits >> 63 ? ~bits : bits | 0x8000'0000'0000'0000u;
}

__device__ inline float number_of(uint64_t order, float) {
  const auto bits = static_cast<uint32_t>(order);
  return __builtin_bit_cast(float, bits >> 31 ? bits ^ 0x8000'0000u : ~bits);
}
__device__ inline double number_of(uint64_t order, double) {
  return __builtin_bit_cast(double, order >> 63 ? order ^ 0x8000'0000'0000'0000u : ~order);
}

template <class Acc>
__device__ inline uint64_t order_of_infinity(int sign) {
  return order_of(static_cast<Acc>(sign) * static_cast<Acc>(INFINITY));
}

// ---- the largest --------------------------------------------------------------------------------------------------

struct Largest {
  uint64_t order = 0;
  int64_t id = INT64_MAX;

  __device__ __forceinline__ void take(uint64_t other, int64_t other_id) {  // ids ascend
    if (other <= order) return;
    order = other;
    id = other_id;
  }
};

// Of the whole block, the lowest id of equal ones; id 0 where there is nothing but NaN.
__device__ inline Largest largest_of_block(const Largest& own, LargestMemory& memory) {
  Largest all;
  all.order = block_max<kSampleThreads>(own.order, memory.order);
  all.id = -block_max<kSampleThreads>(own.order == all.order ? -own.id : -INT64_MAX, memory.id);
  if (all.order == 0) all.id = 0;
  return all;
}

template <class T>
__device__ Largest largest_logit(const SampleLaunch& launch, int64_t row, LargestMemory& memory) {
  using Acc = accumulator_t<T>;
  constexpr int n = kVector<T>;
  const int64_t vocab = launch.params.vocab;
  const T* logits = static_cast<const T*>(launch.params.logits) + row * vocab;
  Largest own;
  for (int64_t first = int64_t{threadIdx.x} * n; first < vocab; first += kSampleThreads * n) {
    const auto values = load_neighbours(logits, first, vocab, launch.in_vectors, T(static_cast<Acc>(NAN)));
#pragma unroll
    for (int i = 0; i < n; ++i) own.take(order_of(static_cast<Acc>(values[i])), first + i);
  }
  return largest_of_block(own, memory);
}

__device__ inline Largest largest_number(const uint64_t* numbers, int64_t count, LargestMemory& memory) {
  Largest own;
  for_each<kSampleThreads>(numbers, threadIdx.x, count, [&](int64_t v, uint64_t order) { own.take(order, v); });
  return largest_of_block(own, memory);
}

// ---- scores -------------------------------------------------------------------------------------------------------

template <class T>
class Scores {
 public:
  using Acc = accumulator_t<T>;

  __device__ Scores(const SampleParams& params, int64_t row, uint64_t* numbers)
      : p_(params),
        row_(row),
        logits_(static_cast<const T*>(p_.logits) + row * p_.vocab),
        numbers_(numbers),
        divisor_(static_cast<Acc>(p_.temperature > 0 ? p_.temperature : 1)) {}

  // The order of z' / temperature. An id is changed by the thread that wrote it, so nobody waits in between.
  __device__ void write() const {
    for_each<kSampleThreads>(logits_, threadIdx.x, p_.vocab, [&](int64_t v, T logit) {
      store(numbers_ + v, order_of(static_cast<Acc>(logit) / divisor_));
    });
    if (p_.repetition_penalty != 1) penalise();
    if (p_.min_new_tokens > 0 && load(p_.steps + row_) < p_.min_new_tokens) bar();
  }

 private:
  __device__ bool is_own(int64_t id) const { return id >= 0 && id < p_.vocab && id % kSampleThreads == threadIdx.x; }

  __device__ void penalise() const {
    const auto penalty = static_cast<Acc>(p_.repetition_penalty);
    for (int64_t i = 0; i < p_.previous_count; ++i) {
      const int64_t id = load(p_.previous + row_ * p_.previous_count + i);
      if (!is_own(id)) continue;
      const Acc logit = static_cast<Acc>(load(logits_ + id));  // an id that comes twice is changed once
      store(numbers_ + id, order_of((logit < 0 ? logit * penalty : logit / penalty) / divisor_));
    }
  }

  __device__ void bar() const {
    for (int64_t i = 0; i < p_.stop_count; ++i) {
      const int64_t id = load(p_.stop_ids + i);
      if (is_own(id)) store(numbers_ + id, order_of_infinity<Acc>(-1));
    }
  }

  const SampleParams& p_;
  int64_t row_;
  const T* logits_;
  uint64_t* numbers_;
  Acc divisor_;
};

// ---- thresholds ---------------------------------------------------------------------------------------------------

// What search() found: the largest t for which the measure of all numbers from t on reaches what is wanted.
struct Threshold {
  uint64_t at;     // t
  uint64_t above;  // the measure of all numbers beyond t
  uint64_t from;   // and from t on
};

// Each sum is added up by a warp of its own.
__device__ inline void sum_over_block(uint64_t (&sums)[kBounds], SampleMemory& memory) {
  static_assert(kBounds <= kSampleWarps);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
#pragma unroll
  for (int i = 0; i < kBounds; ++i) memory.thread_sums.store(i * kSampleThreads + thread, sums[i]);
  __syncthreads();
  if (warp < kBounds) {
    uint64_t sum = 0;
#pragma unroll
    for (int i = 0; i < kSampleWarps; ++i) sum += memory.thread_sums.load(warp * kSampleThreads + i * kWarp + lane);
    sum = warp_sum(sum);
    if (lane == 0) memory.sums.store(warp, sum);
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kBounds; ++i) sums[i] = memory.sums.load(i);
}

// What is measured, and when the search may end early: the interval [t, high) that is left then decides nothing more.
struct Count {
  __device__ static uint64_t of(uint64_t) { return 1; }
  // The numbers from t on are as many as wanted: which of them is the least does not matter.
  __device__ static bool settles(const Threshold& found, uint64_t wanted) { return found.from == wanted; }
};
struct Sum {
  __device__ static uint64_t of(uint64_t number) { return number; }
  // There is one number between the bounds, and it is the sum of those that are there.
  __device__ static bool settles(Threshold& found, uint64_t) {
    const uint64_t between = found.from - found.above;
    if (between / 2 >= found.at) return false;
    found.at = between;
    return true;
  }
};

// The numbers lie in [0, high); all of them from `low` on measure `total`, and wanted is in [1, total]. A thread keeps
// those of its numbers that are still between the bounds in slots of its own; not yet in the first pass, which leaves
// out next to nothing.
template <class Measure>
__device__ Threshold search(const uint64_t* numbers, uint64_t* candidates, int64_t count, uint64_t low, uint64_t high,
                            uint64_t total, uint64_t wanted, SampleMemory& memory) {
  Threshold found{low, 0, total};
  const uint64_t* from = numbers;
  int64_t end = count;
  for (int pass = 0; high - found.at > 1 && !Measure::settles(found, wanted); ++pass) {
    const uint64_t part = ((high - found.at - 1) >> kSearchBits) + 1;
    uint64_t sums[kBounds] = {};
    int64_t kept = threadIdx.x;
    for_each<kSampleThreads>(from, threadIdx.x, end, [&](int64_t, uint64_t number) {
      if (number < found.at || number >= high) return;
#pragma unroll
      for (int i = 0; i < kBounds; ++i) sums[i] += number - found.at >= (i + 1) * part ? Measure::of(number) : 0;
      if (pass == 0) return;
      store(candidates + kept, number);
      kept += kSampleThreads;
    });
    if (pass > 0) {
      from = candidates;
      end = kept;
    }
    sum_over_block(sums, memory);
    // Sums descend: of the bounds that reach what is wanted the last is the new low one, the next one the new high one.
    const Threshold old = found;
#pragma unroll
    for (int i = 0; i < kBounds; ++i)
      if (old.above + sums[i] >= wanted) found = {old.at + (i + 1) * part, old.above, old.above + sums[i]};
#pragma unroll
    for (int i = kBounds - 1; i >= 0; --i) {
      const uint64_t bound = old.at + (i + 1) * part;
      if (old.above + sums[i] >= wanted || bound >= high) continue;
      high = bound;
      found.above = old.above + sums[i];
    }
  }
  return found;
}

// ---- draws --------------------------------------------------------------------------------------------------------

// The first id at which the sum of share(id, numbers[id]), in the order of ids, goes beyond `left`; over all ids it
// does.
template <class Share>
__device__ int64_t first_beyond(const uint64_t* numbers, int64_t count, uint64_t left, const Share& share,
                                SampleMemory& memory) {
  const int64_t warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  int64_t begin = 0, end = count;
  while (end - begin > 1) {  // a piece per warp, then the pieces of the right piece
    const int64_t piece = (end - begin + kSampleWarps - 1) / kSampleWarps;
    const int64_t own_end = begin + (warp + 1) * piece < end ? begin + (warp + 1) * piece : end;
    uint64_t sum = 0;
    for_each<kWarp>(numbers, begin + warp * piece + lane, own_end,
                    [&](int64_t v, uint64_t number) { sum += share(v, number); });
    sum = warp_sum(sum);
    if (lane == 0) memory.pieces.store(static_cast<int>(warp), sum);
    __syncthreads();
    for (int w = 0; w < kSampleWarps; ++w) {
      const uint64_t of_piece = memory.pieces.load(w);
      if (left < of_piece) break;
      left -= of_piece;
      begin += piece;
    }
    end = begin + piece < end ? begin + piece : end;
    __syncthreads();
  }
  return begin;
}

template <class Acc>
class Draw {
 public:
  __device__ Draw(const SampleLaunch& launch, int64_t row, const Largest& largest, SampleMemory& memory)
      : p_(launch.params),
        row_(row),
        numbers_(launch.numbers + row * launch.slots),
        candidates_(launch.candidates ? launch.candidates + row * launch.slots : nullptr),
        largest_(largest),
        scale_(launch.scale),
        memory_(memory) {}

  __device__ int64_t id() {
    uint64_t total = weigh(least_of_top_k());
    uint64_t cut = 0;
    int64_t end_of_equals = p_.vocab;
    if (p_.top_p < 1) {
      const Threshold nucleus = nucleus_of(total);
      const uint64_t equals = (nucleus.from - nucleus.above) / nucleus.at;
      const uint64_t taken = (enough(total) - nucleus.above + nucleus.at - 1) / nucleus.at;
      cut = nucleus.at;
      total = nucleus.above + (taken < equals ? taken : equals) * cut;
      if (taken < equals) end_of_equals = 1 + nth_equal(cut, taken - 1);
    }
    const auto share = [&](int64_t v, uint64_t weight) {
      return weight > cut || (weight == cut && v < end_of_equals) ? weight : 0;
    };
    const double u = philox_uniform(load(p_.seeds + row_), load(p_.steps + row_));
    const auto left = static_cast<uint64_t>(u * static_cast<double>(total));
    return first_beyond(numbers_, p_.vocab, left < total ? left : total - 1, share, memory_);
  }

 private:
  // The order of the k-th largest score; that of minus infinity where all are kept.
  __device__ uint64_t least_of_top_k() {
    const uint64_t nothing = order_of_infinity<Acc>(-1);
    if (p_.top_k == 0 || p_.top_k >= p_.vocab) return nothing;
    const auto all = static_cast<uint64_t>(p_.vocab), k = static_cast<uint64_t>(p_.top_k);
    const uint64_t least = search<Count>(numbers_, candidates_, p_.vocab, 0, largest_.order + 1, all, k, memory_).at;
    return least > nothing ? least : nothing;
  }

  // Replaces the scores by their weights; returns the sum.
  __device__ uint64_t weigh(uint64_t least) {
    const Acc largest = number_of(largest_.order, Acc{});
    const bool infinite = largest_.order == order_of_infinity<Acc>(1);  // then those are as likely as each other
    uint64_t sum = 0;
    for_each<kSampleThreads>(numbers_, threadIdx.x, p_.vocab, [&](int64_t v, uint64_t order) {
      Acc weight = 0;
      if (infinite)
        weight = static_cast<Acc>(order == largest_.order);
      else if (order >= least)
        weight = exp(number_of(order, Acc{}) - largest);
      const auto fixed = static_cast<uint64_t>(weight * static_cast<Acc>(scale_));
      store(numbers_ + v, fixed);
      sum += fixed;
    });
    return block_sum<kSampleThreads>(sum, memory_.sum);
  }

  // What the weights of the nucleus reach together.
  __device__ uint64_t enough(uint64_t total) const {
    const auto share = static_cast<uint64_t>(ceil(p_.top_p * static_cast<double>(total)));
    return share < 1 ? 1 : share < total ? share : total;
  }

  // The weight at which they reach it, the larger ones first.
  __device__ Threshold nucleus_of(uint64_t total) {
    return search<Sum>(numbers_, candidates_, p_.vocab, 1, static_cast<uint64_t>(scale_) + 1, total, enough(total),
                       memory_);
  }

  // The id of the n-th weight that equals `weight`, n from 0 on.
  __device__ int64_t nth_equal(uint64_t weight, uint64_t n) {
    return first_beyond(
        numbers_, p_.vocab, n, [&](int64_t, uint64_t other) { return static_cast<uint64_t>(other == weight); },
        memory_);
  }

  const SampleParams& p_;
  int64_t row_;
  uint64_t *numbers_, *candidates_;
  Largest largest_;
  double scale_;
  SampleMemory& memory_;
};

// ---- kernels ------------------------------------------------------------------------------------------------------

// The largest logit as it is: one pass, no working memory.
template <class T>
__global__ void __launch_bounds__(kSampleThreads) greedy_kernel(SampleLaunch launch) {
  auto& memory = shared_memory<LargestMemory>();
  const int64_t row = blockIdx.x;
  const Largest largest = largest_logit<T>(launch, row, memory);
  if (threadIdx.x == 0) store(launch.params.ids + row, largest.id);
}

// Everything else.
template <class T>
__global__ void __launch_bounds__(kSampleThreads) sample_kernel(SampleLaunch launch) {
  using Acc = accumulator_t<T>;
  auto& memory = shared_memory<SampleMemory>();
  const SampleParams& p = launch.params;
  const int64_t row = blockIdx.x;
  uint64_t* const numbers = launch.numbers + row * launch.slots;
  Scores<T>(p, row, numbers).write();
  const Largest largest = largest_number(numbers, p.vocab, memory.largest);
  int64_t id = largest.id;
  if (p.temperature > 0 && largest.order > order_of_infinity<Acc>(-1))
    id = Draw<Acc>(launch, row, largest, memory).id();
  if (threadIdx.x == 0) store(p.ids + row, id);
}

}  // namespace micro_kernels::cuda
