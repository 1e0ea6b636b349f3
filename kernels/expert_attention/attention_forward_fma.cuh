#pragma once
// Forward for float32 and float64, also for a few tokens: then each block sees one split of the keys.

#include "expert_attention/attention_decode.cuh"
#include "expert_attention/attention_fma.cuh"

namespace micro_kernels::cuda {

template <class T, int kHead>
struct ForwardFmaMemory {
  Tile<T, kHead, kFmaRows> q;
  Tile<T, kHead, kPartners<T, kHead>> keys;  // and then the values
  WeightsMemory<T, kHead> weights;
  RowsMemory<kFmaRows> rows;
};

// Running softmax of one row, in eight lanes.
template <class T, int kHead>
struct RowSoftmax {
  T most = hidden<T>();
  T sum = 0;  // of this lane's keys only
  RowSums<T, kHead> out;

  // scores[i]: of slot first_key + 8 i. Leaves the weights in shared memory, for the lanes of the row.
  template <int kScores>
  __device__ __forceinline__ void weigh(T (&scores)[kScores], WeightsMemory<T, kHead>& weights) {
    T top = most;
#pragma unroll
    for (T score : scores) top = score > top ? score : top;
    top = row_max(top);
    const T shift = top == hidden<T>() ? 0 : top;  // nothing seen yet: every weight becomes 0
    const T factor = power_of_2(most - shift);
    most = top;
    sum *= factor;
    out.scale(factor);
#pragma unroll
    for (int i = 0; i < kScores; ++i) {
      const T weight = power_of_2(scores[i] - shift);
      sum += weight;
      weights.store(fma_row(), fma_lane() + kRowLanes * i, weight);
    }
  }

  template <bool kAligned>
  __device__ __forceinline__ void store_row(const ForwardArgs& args, int64_t row, int64_t split) {
    const int head_dim = static_cast<int>(args.p.shape.head_dim);
    const T all = row_sum(sum);
    if (row < 0) return;
    if (args.splits > 1) {
      const Partial<T> partial(args);
      out.store_to(partial.out_at(split, row), head_dim, true);
      if (fma_lane() != 0) return;
      store(partial.most + split * partial.rows + row, most);
      store(partial.sum + split * partial.rows + row, all);
      return;
    }
    out.scale(all == 0 ? 0 : 1 / all);  // nothing seen: 0
    out.store_to(static_cast<T*>(args.p.out) + row * head_dim, head_dim, kAligned);
    if (fma_lane() == 0)
      store(static_cast<T*>(args.p.logsumexp) + row, all == 0 ? hidden<T>() : most * static_cast<T>(kLn2) + log(all));
  }
};

template <class T, int kHead, bool kAligned>
__global__ __launch_bounds__(kThreads, 2) void attention_forward_fma(ForwardArgs args) {
  using Memory = ForwardFmaMemory<T, kHead>;
  constexpr int kKeys = kPartners<T, kHead>;
  const ExpertAttentionShape& s = args.p.shape;
  auto& memory = shared_memory<Memory>();
  const int head_dim = static_cast<int>(s.head_dim);
  const int64_t busy_blocks = run_blocks(s, args.tiles, args.splits);
  if (blockIdx.x >= busy_blocks)
    return clear_idle<T>(s, blockIdx.x - busy_blocks, static_cast<T*>(args.p.out), static_cast<T*>(args.p.logsumexp),
                         kAligned);

  const Place place(blockIdx.x, args.tiles, args.splits);
  const Run run = find_run(s, args.heads, place.head);
  const int first = place.tile * kFmaRows;
  const int all = keys_end(s, run, first, first + kFmaRows);
  const int begin = args.splits > 1 ? place.split * kSplitKeys : 0;
  if (begin >= all) return;
  const int end = args.splits > 1 && begin + kSplitKeys < all ? begin + kSplitKeys : all;
  memory.rows.fill(s, run, first);
  const Sight sees{s, run.b};
  const HeadRows<const T> keys(static_cast<const T*>(args.p.k), args.p.k_strides, run);
  const HeadRows<const T> values(static_cast<const T*>(args.p.v), args.p.v_strides, run);
  load_and_wait<kAligned>(memory.q, head_dim, [&](int r) {
    const int64_t row = memory.rows.row.load(r);
    return row < 0 ? nullptr : static_cast<const T*>(args.p.q) + row * head_dim;
  });

  const T scale = static_cast<T>(s.scale * kLog2E);
  const int limit = memory.rows.limit.load(fma_row()), mask_row = memory.rows.mask_row.load(fma_row());
  RowSoftmax<T, kHead> softmax;
  for (int j0 = begin; j0 < end; j0 += kKeys) {
    load_and_wait<kAligned>(memory.keys, head_dim, [&](int j) { return keys.at(j0 + j, end, sees); });
    T scores[kKeys / kRowLanes];
    multiply_row(scores, memory.q, memory.keys, head_dim);
#pragma unroll
    for (int i = 0; i < kKeys / kRowLanes; ++i)
      scores[i] = sees(scores[i] * scale, j0 + fma_lane() + kRowLanes * i, limit, mask_row);
    softmax.weigh(scores, memory.weights);
    load_and_wait<kAligned>(memory.keys, head_dim, [&](int j) { return values.at(j0 + j, end, sees); });
    softmax.out.add(memory.weights, memory.keys);
  }
  softmax.template store_row<kAligned>(args, memory.rows.row.load(fma_row()), place.split);
}

}  // namespace micro_kernels::cuda
