#pragma once
// Which queries a block works on, and what each of them may see.
//
// The queries of expert e in batch row b are neighbours in the plan, ascending by slot. With the heads of one group
// they make the rows of a run: row r is head r % H of the run's position r / H. A tile is a number of neighbouring
// rows, so that it spans few positions whatever H is, and reads the keys up to the slot of its last row.

#include <cassert>

#include "common/cuda/memory.cuh"
#include "common/cuda/warp.cuh"
#include "expert_attention/attention_launch.h"
#include "micro_kernels/expert_attention.h"

namespace micro_kernels::cuda {

inline constexpr double kLog2E = 1.4426950408889634;
inline constexpr double kLn2 = 0.6931471805599453;

template <class Acc>
__device__ constexpr Acc hidden() {
  return -static_cast<Acc>(__builtin_inf());
}

__device__ __forceinline__ float power_of_2(float x) { return exp2f(x); }
__device__ __forceinline__ double power_of_2(double x) { return exp2(x); }

// First of the plan rows [begin, end) whose token is at least `least`; end if there is none. Called by whole warps:
// each round reads 32 tokens at once and leaves a 32nd of the rows.
__device__ __forceinline__ int first_token(const int32_t* tokens, int begin, int end, int64_t least) {
  while (begin < end) {
    const int step = (end - begin + kWarp - 1) / kWarp;
    const int64_t probe = begin + int64_t{threadIdx.x % kWarp} * step;
    const bool below = probe < end && load(tokens + probe) < least;
    const int count = __popc(__ballot_sync(kAllLanes, below));
    if (count == 0) return begin;
    if (count < kWarp) end = begin + count * step < end ? begin + count * step : end;
    begin += (count - 1) * step + 1;
  }
  return begin;
}

// The queries of expert e in batch row b, plan rows [begin, end), and their heads of group g.
struct Run {
  const HeadCount& heads;  // of the group; in the kernel's parameters
  int b, e, g;
  int begin, end;
  int start;  // slot of the batch row's first token

  __device__ int rows() const { return (end - begin) * heads.count; }
};

// head: (b * experts + e) * groups + g.
__device__ __forceinline__ Run find_run(const ExpertAttentionShape& s, const HeadCount& heads, unsigned head) {
  const auto groups = static_cast<unsigned>(s.groups), experts = static_cast<unsigned>(s.experts);
  Run run{heads,
          static_cast<int>(head / groups / experts),
          static_cast<int>(head / groups % experts),
          static_cast<int>(head % groups),
          0,
          0,
          0};
  run.start = s.starts ? load(s.starts + run.b) : static_cast<int>(s.start);
  run.begin = load(s.offsets + run.e);
  run.end = load(s.offsets + run.e + 1);
  assert(run.begin >= 0 && run.begin <= run.end && run.end <= s.rows);
  if (run.b > 0) run.begin = first_token(s.tokens, run.begin, run.end, run.b * s.slots);
  if (run.b + 1 < s.batch) {
    const int last = run.end - run.begin > s.slots ? run.begin + static_cast<int>(s.slots) : run.end;
    run.end = first_token(s.tokens, run.begin, last, (run.b + 1) * s.slots);
  }
  return run;
}

__device__ __forceinline__ bool pairwise(const ExpertAttentionShape& s) {
  return s.mask_kind == AttentionMask::kPairs || s.mask_kind == AttentionMask::kBias;
}

__device__ __forceinline__ int own_slot(const ExpertAttentionShape& s, const Run& run, int n) {
  return run.start + load(s.tokens + n) - run.b * static_cast<int>(s.slots);
}

// No query of the run's rows [first, end) sees a slot at or behind this. 0 where there are no rows.
__device__ __forceinline__ int keys_end(const ExpertAttentionShape& s, const Run& run, int first, int end) {
  const int last = end < run.rows() ? end : run.rows();
  if (first >= last) return 0;
  if (pairwise(s)) return static_cast<int>(s.keys);
  return own_slot(s, run, run.begin + run.heads.position(last - 1)) + 1;
}

// What the queries of batch row b may see. It refers to the kernel's parameters, which take no registers.
struct Sight {
  const ExpertAttentionShape& s;
  int b;

  // Can any query see slot j?
  __device__ bool real(int j) const {
    return s.mask_kind != AttentionMask::kKeys || load(static_cast<const uint8_t*>(s.mask) + b * s.keys + j) != 0;
  }
  // The score of slot j, in powers of 2, under a pairwise mask.
  template <class Acc>
  __device__ Acc pair(Acc score, int j, int mask_row) const {
    const int64_t at = mask_row * s.keys + j;
    if (s.mask_kind == AttentionMask::kPairs)
      return load(static_cast<const uint8_t*>(s.mask) + at) ? score : hidden<Acc>();
    const Acc bias = load(static_cast<const Acc*>(s.mask) + at);
    return bias == hidden<Acc>() ? bias : score + bias * static_cast<Acc>(kLog2E);
  }
  // The score of slot j as a query with this limit and row of the mask sees it.
  template <class Acc>
  __device__ Acc operator()(Acc score, int j, int limit, int mask_row) const {
    if (j >= limit || !real(j)) return hidden<Acc>();
    return pairwise(s) ? pair(score, j, mask_row) : score;
  }
};

// What the rows of a tile are.
template <int kRows>
struct RowsMemory {
  SharedArray<int64_t, kRows> row;       // n * heads + head: where q, out and logsumexp have it; -1: no such row
  SharedArray<int32_t, kRows> limit;     // the slots that it may see lie below
  SharedArray<int32_t, kRows> mask_row;  // its row of a pairwise mask

  // Rows [first, first + kRows) of the run, by the first threads of a block. Ends without a barrier.
  __device__ void fill(const ExpertAttentionShape& s, const Run& run, int first) {
    const int r = static_cast<int>(threadIdx.x);
    if (r >= kRows) return;
    const int at = first + r;
    if (at >= run.rows()) {
      row.store(r, -1);
      limit.store(r, 0);
      mask_row.store(r, 0);
      return;
    }
    const int position = run.heads.position(at), head = at - position * run.heads.count, n = run.begin + position;
    const int own = own_slot(s, run, n), slot = own - run.start;
    assert(slot >= 0 && slot < s.slots && own >= 0 && own < s.keys);
    assert(n == run.begin || load(s.tokens + n - 1) < load(s.tokens + n));
    row.store(r, n * s.heads + run.g * run.heads.count + head);
    mask_row.store(r, (s.masks > 1 ? run.b * static_cast<int>(s.slots) : 0) + slot);
    limit.store(r, pairwise(s) ? static_cast<int>(s.keys) : Sight{s, run.b}.real(own) ? own + 1 : 0);
  }
};

// Keys or values of one (b, e, g). A slot that no query may see is not read: it gives zeros.
template <class T>
struct HeadRows {
  T* data;
  int64_t step;

  __device__ HeadRows(T* base, const HeadStrides& strides, const Run& run)
      : data(base + run.b * strides.batch + run.e * strides.expert + run.g * strides.group), step(strides.key) {}

  // nullptr: not to be read.
  __device__ const T* at(int j, int end, const Sight& sees) const {
    return j < end && sees.real(j) ? data + j * step : nullptr;
  }
};

}  // namespace micro_kernels::cuda
