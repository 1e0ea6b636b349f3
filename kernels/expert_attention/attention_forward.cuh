#pragma once
// Forward on tensor cores: 64 rows against blocks of 64 keys (32 of large heads) that start at multiples of their size,
// softmax with running maximum and sum (Milakov and Gimelshein 2018; Dao et al. 2022). While keys are multiplied the
// values arrive, and the reverse. Also what every forward kernel shares: its parameters, the softmax, and the rows that
// no expert has.

#include "expert_attention/attention_rows.cuh"
#include "expert_attention/attention_tiles.cuh"

namespace micro_kernels::cuda {

inline constexpr int kIdleRows = 64;  // of the plan, that one block looks after

struct ForwardArgs {
  ExpertAttentionParams p;
  HeadCount heads;
  int64_t tiles;   // of the longest possible run
  int64_t splits;  // of the keys: 1, or the blocks of one tile leave partial results
  void* partial;   // splits > 1: see Partial
  bool aligned;    // every row of q, k, v and out begins at a multiple of 16 bytes
};

// What a block leaves that saw only some of the keys: sums not yet divided, their maximum (of scores in powers of 2)
// and their divisor.
template <class Acc>
struct Partial {
  Acc *out, *most, *sum;  // [splits, rows * heads, head_dim], [splits, rows * heads] twice
  int64_t rows, head_dim;

  __device__ explicit Partial(const ForwardArgs& args)
      : rows(args.p.shape.rows * args.p.shape.heads), head_dim(args.p.shape.head_dim) {
    out = static_cast<Acc*>(args.partial);
    most = out + args.splits * rows * head_dim;
    sum = most + args.splits * rows;
  }
  __device__ Acc* out_at(int64_t split, int64_t row) const { return out + (split * rows + row) * head_dim; }
};

// The blocks of a grid: the tiles of all runs, longest first within a run, then those for idle rows.
__device__ __forceinline__ int64_t run_blocks(const ExpertAttentionShape& s, int64_t tiles, int64_t splits) {
  return tiles * splits * s.batch * s.experts * s.groups;
}

struct Place {
  unsigned head;  // see find_run
  int tile, split;

  __device__ Place(int64_t block, int64_t tiles, int64_t splits) {
    const auto index = static_cast<unsigned>(block), per_head = static_cast<unsigned>(tiles * splits);
    head = index / per_head;
    const unsigned within = index % per_head;
    split = static_cast<int>(within % static_cast<unsigned>(splits));
    tile = static_cast<int>(tiles) - 1 - static_cast<int>(within / static_cast<unsigned>(splits));
  }
};

// Rows of the plan behind its last expert: their output is 0, and they see nothing.
template <class T>
__device__ void clear_idle(const ExpertAttentionShape& s, int64_t block, T* out, accumulator_t<T>* logsumexp,
                           bool aligned) {
  constexpr int kChunk = 16 / sizeof(T);
  const int64_t used = load(s.offsets + s.experts), first = block * kIdleRows;
  const int64_t begin = first > used ? first : used, end = first + kIdleRows < s.rows ? first + kIdleRows : s.rows;
  const int64_t width = s.heads * s.head_dim;
  Vec<T, kChunk> zeros{};
  for (int64_t i = begin * width + static_cast<int>(threadIdx.x) * kChunk; i < end * width; i += kThreads * kChunk)
    write_chunk(out + i, aligned, zeros);
  if (logsumexp == nullptr) return;
  for (int64_t i = begin * s.heads + static_cast<int>(threadIdx.x); i < end * s.heads; i += kThreads)
    store(logsumexp + i, hidden<accumulator_t<T>>());
}

// ---- softmax of two rows of fragments ------------------------------------------------------------------------------

// Which of up to 64 slots are real, as bits: lane l looks at the slots 2 l and 2 l + 1. Called by whole warps.
struct RealKeys {
  unsigned even = kAllLanes, odd = kAllLanes;

  __device__ RealKeys(const Sight& sees, int first_key, int count) {
    if (sees.s.mask_kind != AttentionMask::kKeys) return;
    const int j = first_key + 2 * lane();
    const bool inside = 2 * lane() < count;
    even = __ballot_sync(kAllLanes, inside && j < sees.s.keys && sees.real(j));
    odd = __ballot_sync(kAllLanes, inside && j + 1 < sees.s.keys && sees.real(j + 1));
  }
  // This lane's column i of tile n of the fragments.
  __device__ bool at(int n, int i) const { return ((i == 0 ? even : odd) >> (n * 4 + lane() % 4)) & 1u; }
};

// Scores to powers of 2 as the rows see them. first_key: of the fragments; hide: something of it may be hidden.
template <int kTiles, int kRows>
__device__ __forceinline__ void show_scores(float (&s)[kTiles][4], float scale, bool hide, int first_key,
                                            const Sight& sees, const RowsMemory<kRows>& rows, int first_row) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) s[n][i] *= scale;
  }
  if (!hide) return;
  const RealKeys real(sees, first_key, kTiles * kMmaColumns);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first_row + fragment_row() + 8 * half, column = first_key + fragment_column();
    const int limit = rows.limit.load(row);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float& x = s[n][2 * half + i];
        if (column + n * kMmaColumns + i >= limit || !real.at(n, i)) x = hidden<float>();
      }
    }
    if (!pairwise(sees.s)) continue;
    const int mask_row = rows.mask_row.load(row);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float& x = s[n][2 * half + i];
        if (column + n * kMmaColumns + i < limit) x = sees.pair(x, column + n * kMmaColumns + i, mask_row);
      }
    }
  }
}

struct RunningSoftmax {
  float most[2] = {hidden<float>(), hidden<float>()};
  float sum[2] = {0, 0};  // of this lane's columns only

  // Scores to weights; what came before must be multiplied by `factor`.
  template <int kTiles>
  __device__ __forceinline__ void add(float (&s)[kTiles][4], float (&factor)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float top = most[half];
#pragma unroll
      for (int n = 0; n < kTiles; ++n) top = fmaxf(top, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
      top = quad_max(top);
      const float shift = top == hidden<float>() ? 0 : top;  // nothing seen yet: every weight becomes 0
      factor[half] = power_of_2(most[half] - shift);
      most[half] = top;
      float total = sum[half] * factor[half];
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          s[n][i] = power_of_2(s[n][i] - shift);
          total += s[n][i];
        }
      }
      sum[half] = total;
    }
  }
};

template <int kTiles>
__device__ __forceinline__ void rescale(float (&out)[kTiles][4], const float (&factor)[2]) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) out[n][i] *= factor[i / 2];
  }
}

// ---- the kernel ----------------------------------------------------------------------------------------------------

template <class T, int kHead>
struct ForwardMemory {
  static constexpr int kRows = kWarps * kMmaRows;
  Tile<T, kHead, kRows> q;
  Tile<T, kHead, kKeyBlock<kHead>> k, v;
  RowsMemory<kRows> rows;
};

template <class T, int kHead, bool kAligned>
__global__ __launch_bounds__(kThreads, 2) void attention_forward(ForwardArgs args) {
  using Memory = ForwardMemory<T, kHead>;
  constexpr int kKeys = kKeyBlock<kHead>;
  const ExpertAttentionShape& s = args.p.shape;
  auto& memory = shared_memory<Memory>();
  auto* out = static_cast<T*>(args.p.out);
  auto* logsumexp = static_cast<float*>(args.p.logsumexp);
  const int head_dim = static_cast<int>(s.head_dim);
  const int64_t busy_blocks = run_blocks(s, args.tiles, 1);
  if (blockIdx.x >= busy_blocks) return clear_idle<T>(s, blockIdx.x - busy_blocks, out, logsumexp, kAligned);

  const Place place(blockIdx.x, args.tiles, 1);
  const Run run = find_run(s, args.heads, place.head);
  const int first = place.tile * Memory::kRows;
  if (first >= run.rows()) return;
  memory.rows.fill(s, run, first);
  const int own_row = warp() * kMmaRows;
  const int end = keys_end(s, run, first, first + Memory::kRows);
  const int own_end = keys_end(s, run, first + own_row, first + own_row + kMmaRows);
  const Sight sees{s, run.b};
  const HeadRows<const T> keys(static_cast<const T*>(args.p.k), args.p.k_strides, run);
  const HeadRows<const T> values(static_cast<const T*>(args.p.v), args.p.v_strides, run);
  __syncthreads();

  load_tile<kAligned>(memory.q, head_dim, [&](int r) {
    const int64_t row = memory.rows.row.load(r);
    return row < 0 ? nullptr : static_cast<const T*>(args.p.q) + row * head_dim;
  });
  load_tile<kAligned>(memory.k, head_dim, [&](int j) { return keys.at(j, end, sees); });
  copy_commit();

  // The first rows of a warp have its lowest limit; below it nothing is hidden unless there is a mask.
  const int shown = s.mask_kind == AttentionMask::kNone ? memory.rows.limit.load(own_row) : 0;
  const float scale = static_cast<float>(s.scale * kLog2E);
  float sums[kHead / kMmaColumns][4] = {};
  RunningSoftmax softmax;
  for (int j0 = 0; j0 < end; j0 += kKeys) {
    copy_wait<0>();
    __syncthreads();  // the keys are there, and everyone has left the values
    load_tile<kAligned>(memory.v, head_dim, [&](int j) { return values.at(j0 + j, end, sees); });
    copy_commit();
    uint32_t weights[kKeys / 16][4] = {};
    if (j0 < own_end) {
      float scores[kKeys / kMmaColumns][4] = {};
      float factor[2];
      multiply_rows(scores, memory.q, own_row, memory.k, 0);
      show_scores(scores, scale, j0 + kKeys > shown, j0, sees, memory.rows, own_row);
      softmax.add(scores, factor);
      rescale(sums, factor);
      to_factor<T>(weights, scores);
    }
    copy_wait<0>();
    __syncthreads();  // the values are there, and everyone has left the keys
    if (j0 + kKeys < end)
      load_tile<kAligned>(memory.k, head_dim, [&](int j) { return keys.at(j0 + kKeys + j, end, sees); });
    copy_commit();
    if (j0 < own_end) multiply_columns(sums, weights, memory.v, 0);
  }

  float divisor[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float sum = quad_sum(softmax.sum[half]);
    const int64_t row = memory.rows.row.load(own_row + fragment_row() + 8 * half);
    divisor[half] = sum == 0 ? 0 : 1 / sum;  // nothing seen: 0
    if (row >= 0 && lane() % 4 == 0)
      store(logsumexp + row, sum == 0 ? hidden<float>() : softmax.most[half] * static_cast<float>(kLn2) + logf(sum));
  }
  store_result<kAligned>(sums, divisor, memory.q, own_row, head_dim, [&](int r) {
    const int64_t row = memory.rows.row.load(r);
    return row < 0 ? nullptr : out + row * head_dim;
  });
}

}  // namespace micro_kernels::cuda
