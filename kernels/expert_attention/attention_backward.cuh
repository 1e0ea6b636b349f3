#pragma once
// What the backward kernels share, and the first of them. Scores are computed again, p = exp(score - logsumexp), and
//   dv = p^T do,  ds = p * (do v^T - delta) * scale,  dk = ds^T q,  dq = ds k,  delta = sum_d do * out.
// dq and dk, dv come from kernels of their own: each sum has one owner, and one order of additions.

#include "expert_attention/attention_forward.cuh"

namespace micro_kernels::cuda {

struct BackwardArgs {
  ExpertAttentionBackwardParams p;
  HeadCount heads;
  void* delta;    // [rows, heads]
  int64_t tiles;  // of the longest possible run, or of the keys
  bool aligned;   // every row of q, k, v, out and the gradients begins at a multiple of 16 bytes
};

// ---- delta, and zeros for the idle rows of grad_q ------------------------------------------------------------------

inline constexpr int kDeltaLanes = 8;  // per row
inline constexpr int kDeltaRows = kThreads / kDeltaLanes;

template <class T>
__global__ __launch_bounds__(kThreads, 2) void attention_delta(BackwardArgs args) {
  using Acc = accumulator_t<T>;
  constexpr int kChunk = 16 / sizeof(T);
  const ExpertAttentionShape& s = args.p.shape;
  const int64_t row_blocks = (s.rows * s.heads + kDeltaRows - 1) / kDeltaRows;
  if (blockIdx.x >= row_blocks)
    return clear_idle<T>(s, blockIdx.x - row_blocks, static_cast<T*>(args.p.grad_q), nullptr, args.aligned);

  const int64_t row = int64_t{blockIdx.x} * kDeltaRows + threadIdx.x / kDeltaLanes;
  const bool used = row < load(s.offsets + s.experts) * s.heads;
  const int lane = static_cast<int>(threadIdx.x % kDeltaLanes);
  const T* out = static_cast<const T*>(args.p.out) + row * s.head_dim;
  const T* grad_out = static_cast<const T*>(args.p.grad_out) + row * s.head_dim;
  Acc sum = 0;
  for (int64_t d = lane * kChunk; used && d < s.head_dim; d += kDeltaLanes * kChunk) {
    const Vec<T, kChunk> a = read_chunk(out + d, args.aligned), b = read_chunk(grad_out + d, args.aligned);
#pragma unroll
    for (int e = 0; e < kChunk; ++e) sum = fma(static_cast<Acc>(a[e]), static_cast<Acc>(b[e]), sum);
  }
#pragma unroll
  for (int width = 1; width < kDeltaLanes; width *= 2) sum += __shfl_xor_sync(kAllLanes, sum, width);
  if (used && lane == 0) store(static_cast<Acc*>(args.delta) + row, sum);
}

// ---- rows of a tile, with what the forward kept of them ------------------------------------------------------------

template <class Acc, int kRows>
struct BackwardRows {
  RowsMemory<kRows> rows;
  SharedArray<Acc, kRows> logsumexp;  // in powers of 2; infinity where nothing is seen: all weights become 0
  SharedArray<Acc, kRows> delta;
  SharedArray<int32_t, 1> end;  // see keys_end

  // Rows [first, first + kRows) of the run, by the first threads of a block. Ends without a barrier.
  __device__ void fill(const BackwardArgs& args, const Run& run, int first) {
    rows.fill(args.p.shape, run, first);
    const int r = static_cast<int>(threadIdx.x);
    if (r >= kRows) return;
    if (r == 0) end.store(0, keys_end(args.p.shape, run, first, first + kRows));
    const int64_t row = rows.row.load(r);
    const Acc kept = row < 0 ? hidden<Acc>() : load(static_cast<const Acc*>(args.p.logsumexp) + row);
    logsumexp.store(r, kept == hidden<Acc>() ? -kept : kept * static_cast<Acc>(kLog2E));
    delta.store(r, row < 0 ? Acc(0) : load(static_cast<const Acc*>(args.delta) + row));
  }

  template <class T>
  __device__ const T* at(const void* tensor, int r, int head_dim) const {
    const int64_t row = rows.row.load(r);
    return row < 0 ? nullptr : static_cast<const T*>(tensor) + row * head_dim;
  }
};

// The plan rows of a run whose queries may see a slot at or behind `first`.
__device__ __forceinline__ void skip_blind(const ExpertAttentionShape& s, int first, Run& run) {
  const int slot = first - run.start;
  if (!pairwise(s) && slot > 0) run.begin = first_token(s.tokens, run.begin, run.end, run.b * s.slots + slot);
}

}  // namespace micro_kernels::cuda
