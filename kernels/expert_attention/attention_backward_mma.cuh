#pragma once
// Backward on tensor cores. Both kernels keep weights in registers from one product to the next: that of grad_q has
// queries as rows and keys as columns, that of grad_k and grad_v the reverse.

#include "expert_attention/attention_backward.cuh"

namespace micro_kernels::cuda {

// ---- grad_q --------------------------------------------------------------------------------------------------------

template <class T, int kHead>
struct GradQueryMemory {
  static constexpr int kRows = kWarps * kMmaRows;
  Tile<T, kHead, kRows> q, grad_out;
  Tile<T, kHead, kKeyBlock<kHead>> k, v;
  BackwardRows<float, kRows> rows;
};

// Scores to weights and grad_weights to gradients of the scores, of two rows of fragments.
template <int kTiles, int kRows>
__device__ __forceinline__ void differentiate(const float (&scores)[kTiles][4], float (&grads)[kTiles][4], float scale,
                                              const BackwardRows<float, kRows>& rows, int first_row) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first_row + fragment_row() + 8 * half;
    const float logsumexp = rows.logsumexp.load(row), delta = rows.delta.load(row);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 2 * half; i < 2 * half + 2; ++i)
        grads[n][i] = power_of_2(scores[n][i] - logsumexp) * (grads[n][i] - delta) * scale;
    }
  }
}

template <class T, int kHead, bool kAligned>
__global__ __launch_bounds__(kThreads, 2) void attention_grad_q(BackwardArgs args) {
  using Memory = GradQueryMemory<T, kHead>;
  constexpr int kKeys = kKeyBlock<kHead>;
  const ExpertAttentionShape& s = args.p.shape;
  auto& memory = shared_memory<Memory>();
  const int head_dim = static_cast<int>(s.head_dim);
  const Place place(blockIdx.x, args.tiles, 1);
  const Run run = find_run(s, args.heads, place.head);
  const int first = place.tile * Memory::kRows;
  if (first >= run.rows()) return;
  memory.rows.fill(args, run, first);
  const int own_row = warp() * kMmaRows;
  const int end = keys_end(s, run, first, first + Memory::kRows);
  const int own_end = keys_end(s, run, first + own_row, first + own_row + kMmaRows);
  const Sight sees{s, run.b};
  const HeadRows<const T> keys(static_cast<const T*>(args.p.k), args.p.k_strides, run);
  const HeadRows<const T> values(static_cast<const T*>(args.p.v), args.p.v_strides, run);
  __syncthreads();

  const auto fetch_keys = [&](int j0) {
    if (j0 < end) load_tile<kAligned>(memory.k, head_dim, [&](int j) { return keys.at(j0 + j, end, sees); });
  };
  const auto fetch_values = [&](int j0) {
    if (j0 < end) load_tile<kAligned>(memory.v, head_dim, [&](int j) { return values.at(j0 + j, end, sees); });
  };
  load_tile<kAligned>(memory.q, head_dim, [&](int r) { return memory.rows.template at<T>(args.p.q, r, head_dim); });
  load_tile<kAligned>(memory.grad_out, head_dim,
                      [&](int r) { return memory.rows.template at<T>(args.p.grad_out, r, head_dim); });
  fetch_keys(0);
  fetch_values(0);
  copy_commit();

  const int shown = s.mask_kind == AttentionMask::kNone ? memory.rows.rows.limit.load(own_row) : 0;
  const float scale = static_cast<float>(s.scale);
  float sums[kHead / kMmaColumns][4] = {};
  for (int j0 = 0; j0 < end; j0 += kKeys) {
    copy_wait<0>();
    __syncthreads();
    uint32_t factor[kKeys / 16][4] = {};
    if (j0 < own_end) {
      float scores[kKeys / kMmaColumns][4] = {}, grads[kKeys / kMmaColumns][4] = {};
      multiply_rows(scores, memory.q, own_row, memory.k, 0);
      show_scores(scores, static_cast<float>(s.scale * kLog2E), j0 + kKeys > shown, j0, sees, memory.rows.rows,
                  own_row);
      multiply_rows(grads, memory.grad_out, own_row, memory.v, 0);
      differentiate(scores, grads, scale, memory.rows, own_row);
      to_factor<T>(factor, grads);
    }
    __syncthreads();  // everyone has left the values: the next ones arrive beside the last product
    fetch_values(j0 + kKeys);
    if (j0 < own_end) multiply_columns(sums, factor, memory.k, 0);
    __syncthreads();
    fetch_keys(j0 + kKeys);
    copy_commit();
  }
  const float one[2] = {1, 1};
  store_result<kAligned>(sums, one, memory.q, own_row, head_dim, [&](int r) {
    const int64_t row = memory.rows.rows.row.load(r);
    return row < 0 ? nullptr : static_cast<T*>(args.p.grad_q) + row * head_dim;
  });
}

// ---- grad_k and grad_v ---------------------------------------------------------------------------------------------

template <class T, int kHead>
struct GradKeyMemory {
  static constexpr int kKeys = kWarps * kMmaRows;
  static constexpr int kRows = kGradQueries;
  static constexpr int kStep = kHead <= 64 ? kRows : kMmaRows;  // of them in registers at once
  static constexpr int kStages = kHead <= 128 ? 2 : 1;
  Tile<T, kHead, kKeys> k, v;
  Tile<T, kHead, kRows> q[kStages], grad_out[kStages];
  BackwardRows<float, kRows> rows[kStages];
};

// Scores of a warp's keys with the queries of a tile from first_row on, to weights. key: of the lane's first row;
// real: whether that slot and the one 8 behind it are.
template <int kTiles, int kRows>
__device__ __forceinline__ void weigh_queries(float (&scores)[kTiles][4], float scale, bool hide, int key,
                                              const bool (&real)[2], const Sight& sees,
                                              const BackwardRows<float, kRows>& rows, int first_row) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = first_row + n * kMmaColumns + fragment_column() + i % 2, j = key + 8 * (i / 2);
      float& x = scores[n][i];
      x *= scale;
      if (hide) {
        const int limit = rows.rows.limit.load(row);
        if (pairwise(sees.s) && j < limit) x = sees.pair(x, j, rows.rows.mask_row.load(row));
        if (j >= limit || !real[i / 2]) x = hidden<float>();
      }
      x = power_of_2(x - rows.logsumexp.load(row));
    }
  }
}

template <int kTiles, int kRows>
__device__ __forceinline__ void differentiate_queries(const float (&weights)[kTiles][4], float (&grads)[kTiles][4],
                                                      float scale, const BackwardRows<float, kRows>& rows,
                                                      int first_row) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int column = 0; column < 2; ++column) {
      const float delta = rows.delta.load(first_row + n * kMmaColumns + fragment_column() + column);
#pragma unroll
      for (int i = column; i < 4; i += 2) grads[n][i] = weights[n][i] * (grads[n][i] - delta) * scale;
    }
  }
}

// One block of keys of one (b, e, g) and all queries that may see them, in the order of the plan. Which of the two
// gradients: large heads have registers for one at a time.
template <class T, int kHead, bool kAligned, bool kGradK, bool kGradV>
__global__ __launch_bounds__(kThreads, kHead > 128 ? 1 : 2) void attention_grad_kv(BackwardArgs args) {
  using Memory = GradKeyMemory<T, kHead>;
  constexpr int kRows = Memory::kRows, kStages = Memory::kStages, kStep = Memory::kStep;
  const ExpertAttentionShape& s = args.p.shape;
  auto& memory = shared_memory<Memory>();
  const int head_dim = static_cast<int>(s.head_dim);
  const Place place(blockIdx.x, args.tiles, 1);
  const int j0 = (static_cast<int>(args.tiles) - 1 - place.tile) * Memory::kKeys;  // the first see most queries
  Run run = find_run(s, args.heads, place.head);
  skip_blind(s, j0, run);
  const int own_key = warp() * kMmaRows, keys_count = static_cast<int>(s.keys);
  const Sight sees{s, run.b};
  const auto fetch = [&](int stage) {
    const auto& rows = memory.rows[stage];
    load_tile<kAligned>(memory.q[stage], head_dim, [&](int r) { return rows.template at<T>(args.p.q, r, head_dim); });
    load_tile<kAligned>(memory.grad_out[stage], head_dim,
                        [&](int r) { return rows.template at<T>(args.p.grad_out, r, head_dim); });
    copy_commit();
  };
  if (run.rows() > 0) {
    const HeadRows<const T> keys(static_cast<const T*>(args.p.k), args.p.k_strides, run);
    const HeadRows<const T> values(static_cast<const T*>(args.p.v), args.p.v_strides, run);
    const int end = keys_end(s, run, 0, run.rows());
    load_tile<kAligned>(memory.k, head_dim, [&](int j) { return keys.at(j0 + j, end, sees); });
    if constexpr (kGradK) load_tile<kAligned>(memory.v, head_dim, [&](int j) { return values.at(j0 + j, end, sees); });
    memory.rows[0].fill(args, run, 0);
    __syncthreads();
    fetch(0);
  }

  const int key = j0 + own_key + fragment_row();
  const bool real[2] = {key < keys_count && sees.real(key), key + 8 < keys_count && sees.real(key + 8)};
  float grad_k[kGradK ? kHead / kMmaColumns : 1][4] = {}, grad_v[kGradV ? kHead / kMmaColumns : 1][4] = {};
  for (int first = 0; first < run.rows(); first += kRows) {
    const int stage = first / kRows % kStages, next = (stage + 1) % kStages;
    const bool more = first + kRows < run.rows();
    if (kStages == 2 && more) memory.rows[next].fill(args, run, first + kRows);
    copy_wait<0>();
    __syncthreads();
    if (kStages == 2 && more) fetch(next);
    const auto& rows = memory.rows[stage];
    if (j0 + own_key < rows.end.load(0)) {
      const bool hide = s.mask_kind != AttentionMask::kNone || j0 + Memory::kKeys > rows.rows.limit.load(0);
#pragma unroll 1
      for (int row = 0; row < kRows; row += kStep) {
        float weights[kStep / kMmaColumns][4] = {};
        uint32_t factor[kStep / 16][4];
        multiply_rows(weights, memory.k, own_key, memory.q[stage], row);
        weigh_queries(weights, static_cast<float>(s.scale * kLog2E), hide, key, real, sees, rows, row);
        if constexpr (kGradV) {
          to_factor<T>(factor, weights);
          multiply_columns(grad_v, factor, memory.grad_out[stage], row);
        }
        if constexpr (kGradK) {
          float grads[kStep / kMmaColumns][4] = {};
          multiply_rows(grads, memory.v, own_key, memory.grad_out[stage], row);
          differentiate_queries(weights, grads, static_cast<float>(s.scale), rows, row);
          to_factor<T>(factor, grads);
          multiply_columns(grad_k, factor, memory.q[stage], row);
        }
      }
    }
    __syncthreads();
    if (kStages == 1 && more) {
      memory.rows[0].fill(args, run, first + kRows);
      __syncthreads();
      fetch(0);
    }
  }

  const float one[2] = {1, 1};
  const auto store_keys = [&](const auto& sums, auto& tile, void* grad, const HeadStrides& strides) {
    if (grad == nullptr) return;
    const HeadRows<T> rows(static_cast<T*>(grad), strides, run);
    store_result<kAligned>(sums, one, tile, own_key, head_dim,
                           [&](int r) { return j0 + r < keys_count ? rows.data + (j0 + r) * rows.step : nullptr; });
  };
  if constexpr (kGradK) store_keys(grad_k, memory.v, args.p.grad_k, args.p.grad_k_strides);
  if constexpr (kGradV) store_keys(grad_v, memory.k, args.p.grad_v, args.p.grad_v_strides);
}

}  // namespace micro_kernels::cuda
