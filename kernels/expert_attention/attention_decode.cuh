#pragma once
// Forward for a few tokens on tensor cores: the keys of a run are split at multiples of kSplitKeys, one block each, so
// that one token keeps a whole device busy. A block has 16 rows; of every 64 keys each of its warps takes 16, and the
// four results are merged in the order of the warps. merge_splits then merges the blocks, in the order of the splits.
// Neither order knows how many tokens or batch rows there are.

#include "expert_attention/attention_forward.cuh"

namespace micro_kernels::cuda {

inline constexpr int kSplitKeys = 256;
inline constexpr int kDecodeKeys = kWarps * kMmaRows;  // at a time

template <class T, int kHead>
struct DecodeMemory {
  static constexpr int kRows = kMmaRows;
  static constexpr int kStages = kHead <= 128 ? 2 : 1;
  static constexpr int kOutStep = kHead + 8;  // the rows of a warp's fragments begin in different banks
  Tile<T, kHead, kRows> q;
  Tile<T, kHead, kDecodeKeys> k[kStages], v[kStages];
  SharedArray<float, kRows * kOutStep> out;
  SharedArray<float, kWarps * kRows> most, sum;
  RowsMemory<kRows> rows;
};

// Maximum and divisor of a row over the warps of a block.
template <class Memory>
__device__ __forceinline__ void merged_row(const Memory& memory, int row, float& most, float& sum) {
  most = memory.most.load(row);
#pragma unroll
  for (int w = 1; w < kWarps; ++w) most = fmaxf(most, memory.most.load(w * kMmaRows + row));
  const float shift = most == hidden<float>() ? 0 : most;
  sum = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w)
    sum += memory.sum.load(w * kMmaRows + row) * power_of_2(memory.most.load(w * kMmaRows + row) - shift);
}

// The warps' results to one, in memory.out.
template <int kHead, class Memory>
__device__ __forceinline__ void merge_warps(Memory& memory, float (&sums)[kHead / kMmaColumns][4],
                                            const RunningSoftmax& softmax) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int at = warp() * kMmaRows + fragment_row() + 8 * half;
    const float sum = quad_sum(softmax.sum[half]);
    if (lane() % 4 == 0) {
      memory.most.store(at, softmax.most[half]);
      memory.sum.store(at, sum);
    }
  }
  __syncthreads();
  float factor[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float most, sum;
    merged_row(memory, fragment_row() + 8 * half, most, sum);
    factor[half] = power_of_2(softmax.most[half] - (most == hidden<float>() ? 0 : most));
  }
  rescale(sums, factor);
  for (int w = 0; w < kWarps; ++w) {
    if (w == warp()) {
#pragma unroll
      for (int n = 0; n < kHead / kMmaColumns; ++n) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int at = (fragment_row() + 8 * half) * Memory::kOutStep + n * kMmaColumns + fragment_column();
          Vec<float, 2> pair;
          pair[0] = sums[n][2 * half];
          pair[1] = sums[n][2 * half + 1];
          if (w > 0) {
            const Vec<float, 2> before = memory.out.template load_vec<2>(at);
            pair[0] = before[0] + pair[0];
            pair[1] = before[1] + pair[1];
          }
          memory.out.template store_vec<2>(at, pair);
        }
      }
    }
    __syncthreads();
  }
}

// memory.out to the output, or to the partial results of the block's split.
template <class T, int kHead, bool kAligned, class Memory>
__device__ __forceinline__ void store_merged(const ForwardArgs& args, const Memory& memory, int64_t split) {
  constexpr int kWidth = 4;
  const int head_dim = static_cast<int>(args.p.shape.head_dim);
  const Partial<float> partial(args);
  for (int i = static_cast<int>(threadIdx.x); i < kMmaRows * kHead / kWidth; i += kThreads) {
    const int r = i / (kHead / kWidth), d = i % (kHead / kWidth) * kWidth;
    const int64_t row = memory.rows.row.load(r);
    if (row < 0 || d >= head_dim) continue;
    float most, sum;
    merged_row(memory, r, most, sum);
    const Vec<float, kWidth> total = memory.out.template load_vec<kWidth>(r * Memory::kOutStep + d);
    if (args.splits > 1) {
      store_vec<kWidth>(partial.out_at(split, row) + d, total);
      if (d > 0) continue;
      store(partial.most + split * partial.rows + row, most);
      store(partial.sum + split * partial.rows + row, sum);
      continue;
    }
    const float divisor = sum == 0 ? 0 : 1 / sum;
    Vec<T, kWidth> value;
#pragma unroll
    for (int e = 0; e < kWidth; ++e) value[e] = T(total[e] * divisor);
    write_chunk(static_cast<T*>(args.p.out) + row * head_dim + d, kAligned, value);
    if (d == 0)
      store(static_cast<float*>(args.p.logsumexp) + row,
            sum == 0 ? hidden<float>() : most * static_cast<float>(kLn2) + logf(sum));
  }
}

template <class T, int kHead, bool kAligned>
__global__ __launch_bounds__(kThreads, 2) void attention_decode(ForwardArgs args) {
  using Memory = DecodeMemory<T, kHead>;
  constexpr int kStages = Memory::kStages;
  const ExpertAttentionShape& s = args.p.shape;
  auto& memory = shared_memory<Memory>();
  const int head_dim = static_cast<int>(s.head_dim);
  const int64_t busy_blocks = run_blocks(s, args.tiles, args.splits);
  if (blockIdx.x >= busy_blocks)
    return clear_idle<T>(s, blockIdx.x - busy_blocks, static_cast<T*>(args.p.out),
                         static_cast<float*>(args.p.logsumexp), kAligned);

  const Place place(blockIdx.x, args.tiles, args.splits);
  const Run run = find_run(s, args.heads, place.head);
  const int first = place.tile * Memory::kRows;
  const int begin = place.split * kSplitKeys;
  const int all = keys_end(s, run, first, first + Memory::kRows);
  if (begin >= all) return;
  const int end = all < begin + kSplitKeys ? all : begin + kSplitKeys;
  memory.rows.fill(s, run, first);
  const Sight sees{s, run.b};
  const HeadRows<const T> keys(static_cast<const T*>(args.p.k), args.p.k_strides, run);
  const HeadRows<const T> values(static_cast<const T*>(args.p.v), args.p.v_strides, run);
  __syncthreads();

  const auto fetch = [&](int j0, int stage) {
    if (j0 < end) {
      load_tile<kAligned>(memory.k[stage], head_dim, [&](int j) { return keys.at(j0 + j, end, sees); });
      load_tile<kAligned>(memory.v[stage], head_dim, [&](int j) { return values.at(j0 + j, end, sees); });
    }
    copy_commit();
  };
  load_tile<kAligned>(memory.q, head_dim, [&](int r) {
    const int64_t row = memory.rows.row.load(r);
    return row < 0 ? nullptr : static_cast<const T*>(args.p.q) + row * head_dim;
  });
  fetch(begin, 0);

  const float scale = static_cast<float>(s.scale * kLog2E);
  const int own_key = warp() * kMmaRows;
  float sums[kHead / kMmaColumns][4] = {};
  RunningSoftmax softmax;
  for (int j0 = begin; j0 < end; j0 += kDecodeKeys) {
    const int stage = (j0 - begin) / kDecodeKeys % kStages;
    if constexpr (kStages == 2) fetch(j0 + kDecodeKeys, 1 - stage);
    copy_wait<kStages - 1>();
    __syncthreads();
    if (j0 + own_key < end) {
      float scores[2][4] = {}, factor[2];
      uint32_t weights[1][4];
      multiply_rows(scores, memory.q, 0, memory.k[stage], own_key);
      show_scores(scores, scale, true, j0 + own_key, sees, memory.rows, 0);
      softmax.add(scores, factor);
      rescale(sums, factor);
      to_factor<T>(weights, scores);
      multiply_columns(sums, weights, memory.v[stage], own_key);
    }
    __syncthreads();
    if constexpr (kStages == 1) fetch(j0 + kDecodeKeys, 0);
  }
  merge_warps<kHead>(memory, sums, softmax);
  store_merged<T, kHead, kAligned>(args, memory, place.split);
}

// ---- the blocks' results to one ------------------------------------------------------------------------------------

inline constexpr int kMergeLanes = 8;  // per row; each holds every eighth group of kMergeWidth elements
inline constexpr int kMergeRows = kThreads / kMergeLanes;

template <class Acc>
inline constexpr int kMergeWidth = 16 / sizeof(Acc);

template <class T>
__global__ __launch_bounds__(kThreads, 2) void attention_merge(ForwardArgs args) {
  using Acc = accumulator_t<T>;
  constexpr int kWidth = kMergeWidth<Acc>;
  const ExpertAttentionShape& s = args.p.shape;
  const Partial<Acc> partial(args);
  const int64_t row = int64_t{blockIdx.x} * kMergeRows + threadIdx.x / kMergeLanes;
  if (row >= partial.rows) return;
  const int64_t n = row / s.heads;
  if (n >= load(s.offsets + s.experts)) return;
  const int64_t token = load(s.tokens + n), b = token / s.slots;
  const int64_t own = (s.starts ? load(s.starts + b) : s.start) + token % s.slots;
  const int64_t seen = pairwise(s) ? s.keys : own + 1;
  const int64_t splits = (seen + kSplitKeys - 1) / kSplitKeys;

  Acc most = hidden<Acc>();
  for (int64_t i = 0; i < splits; ++i) {
    const Acc other = load(partial.most + i * partial.rows + row);
    most = other > most ? other : most;
  }
  const Acc shift = most == hidden<Acc>() ? 0 : most;
  Acc sum = 0;
  for (int64_t i = 0; i < splits; ++i)
    sum += load(partial.sum + i * partial.rows + row) * power_of_2(load(partial.most + i * partial.rows + row) - shift);
  const Acc divisor = sum == 0 ? 0 : 1 / sum;
  const int lane = static_cast<int>(threadIdx.x % kMergeLanes);
  for (int64_t d = lane * kWidth; d < s.head_dim; d += kMergeLanes * kWidth) {
    Vec<Acc, kWidth> total{};
    for (int64_t i = 0; i < splits; ++i) {
      const Acc factor = power_of_2(load(partial.most + i * partial.rows + row) - shift);
      const Vec<Acc, kWidth> part = load_vec<kWidth>(partial.out_at(i, row) + d);
#pragma unroll
      for (int e = 0; e < kWidth; ++e) total[e] += part[e] * factor;
    }
    Vec<T, kWidth> value;
#pragma unroll
    for (int e = 0; e < kWidth; ++e) value[e] = T(total[e] * divisor);
    write_chunk(static_cast<T*>(args.p.out) + row * s.head_dim + d, args.aligned, value);
  }
  if (lane == 0)
    store(static_cast<Acc*>(args.p.logsumexp) + row,
          sum == 0 ? hidden<Acc>() : most * static_cast<Acc>(kLn2) + log(sum));
}

}  // namespace micro_kernels::cuda
