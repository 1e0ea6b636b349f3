#pragma once
// Backward for float32 and float64: both kernels own 16 rows (queries, or keys) and walk their partners.

#include "expert_attention/attention_backward.cuh"
#include "expert_attention/attention_fma.cuh"

namespace micro_kernels::cuda {

// A query and a key. score: their product; grad: that of the output's gradient and the value.
template <class T>
struct WeightGrad {
  T weight, grad_score;

  template <int kRows>
  __device__ __forceinline__ WeightGrad(T score, T grad, T scale, const Sight& sees, int key,
                                        const BackwardRows<T, kRows>& rows, int row) {
    const T seen =
        sees(score * scale * static_cast<T>(kLog2E), key, rows.rows.limit.load(row), rows.rows.mask_row.load(row));
    weight = power_of_2(seen - rows.logsumexp.load(row));
    grad_score = weight * (grad - rows.delta.load(row)) * scale;
  }
};

// ---- grad_q --------------------------------------------------------------------------------------------------------

template <class T, int kHead>
struct GradQueryFmaMemory {
  Tile<T, kHead, kFmaRows> q, grad_out;
  Tile<T, kHead, kPartners<T, kHead>> k, v;
  WeightsMemory<T, kHead> grad_scores;
  BackwardRows<T, kFmaRows> rows;
};

template <class T, int kHead, bool kAligned>
__global__ __launch_bounds__(kThreads, 2) void attention_grad_q_fma(BackwardArgs args) {
  using Memory = GradQueryFmaMemory<T, kHead>;
  constexpr int kKeys = kPartners<T, kHead>;
  const ExpertAttentionShape& s = args.p.shape;
  auto& memory = shared_memory<Memory>();
  const int head_dim = static_cast<int>(s.head_dim);
  const Place place(blockIdx.x, args.tiles, 1);
  const Run run = find_run(s, args.heads, place.head);
  const int first = place.tile * kFmaRows;
  if (first >= run.rows()) return;
  memory.rows.fill(args, run, first);
  const int end = keys_end(s, run, first, first + kFmaRows);
  const Sight sees{s, run.b};
  const HeadRows<const T> keys(static_cast<const T*>(args.p.k), args.p.k_strides, run);
  const HeadRows<const T> values(static_cast<const T*>(args.p.v), args.p.v_strides, run);
  __syncthreads();
  load_tile<kAligned>(memory.q, head_dim, [&](int r) { return memory.rows.template at<T>(args.p.q, r, head_dim); });
  load_tile<kAligned>(memory.grad_out, head_dim,
                      [&](int r) { return memory.rows.template at<T>(args.p.grad_out, r, head_dim); });

  RowSums<T, kHead> sums;
  for (int j0 = 0; j0 < end; j0 += kKeys) {
    __syncthreads();
    load_tile<kAligned>(memory.k, head_dim, [&](int j) { return keys.at(j0 + j, end, sees); });
    load_and_wait<kAligned>(memory.v, head_dim, [&](int j) { return values.at(j0 + j, end, sees); });
    T scores[kKeys / kRowLanes], grads[kKeys / kRowLanes];
    multiply_row(scores, memory.q, memory.k, head_dim);
    multiply_row(grads, memory.grad_out, memory.v, head_dim);
#pragma unroll
    for (int i = 0; i < kKeys / kRowLanes; ++i) {
      const int j = fma_lane() + kRowLanes * i;
      const WeightGrad<T> w(scores[i], grads[i], static_cast<T>(s.scale), sees, j0 + j, memory.rows, fma_row());
      memory.grad_scores.store(fma_row(), j, w.grad_score);
    }
    __syncwarp();
    sums.add(memory.grad_scores, memory.k);
  }
  const int64_t row = memory.rows.rows.row.load(fma_row());
  if (row >= 0) sums.store_to(static_cast<T*>(args.p.grad_q) + row * head_dim, head_dim, kAligned);
}

// ---- grad_k and grad_v ---------------------------------------------------------------------------------------------

template <class T, int kHead>
struct GradKeyFmaMemory {
  static constexpr int kRows = kPartners<T, kHead>;
  Tile<T, kHead, kFmaRows> k, v;
  Tile<T, kHead, kRows> q, grad_out;
  WeightsMemory<T, kHead> weights, grad_scores;
  BackwardRows<T, kRows> rows;
};

template <class T, int kHead, bool kAligned>
__global__ __launch_bounds__(kThreads, 2) void attention_grad_kv_fma(BackwardArgs args) {
  using Memory = GradKeyFmaMemory<T, kHead>;
  constexpr int kRows = Memory::kRows;
  const ExpertAttentionShape& s = args.p.shape;
  auto& memory = shared_memory<Memory>();
  const int head_dim = static_cast<int>(s.head_dim), keys_count = static_cast<int>(s.keys);
  const Place place(blockIdx.x, args.tiles, 1);
  const int j0 = (static_cast<int>(args.tiles) - 1 - place.tile) * kFmaRows;  // the first see most queries
  Run run = find_run(s, args.heads, place.head);
  skip_blind(s, j0, run);
  const Sight sees{s, run.b};
  const HeadRows<const T> keys(static_cast<const T*>(args.p.k), args.p.k_strides, run);
  const HeadRows<const T> values(static_cast<const T*>(args.p.v), args.p.v_strides, run);
  const int end = keys_end(s, run, 0, run.rows());
  load_tile<kAligned>(memory.k, head_dim, [&](int j) { return keys.at(j0 + j, end, sees); });
  load_tile<kAligned>(memory.v, head_dim, [&](int j) { return values.at(j0 + j, end, sees); });

  RowSums<T, kHead> grad_k, grad_v;
  for (int first = 0; first < run.rows(); first += kRows) {
    __syncthreads();
    memory.rows.fill(args, run, first);
    __syncthreads();
    load_tile<kAligned>(memory.q, head_dim, [&](int r) { return memory.rows.template at<T>(args.p.q, r, head_dim); });
    load_and_wait<kAligned>(memory.grad_out, head_dim,
                            [&](int r) { return memory.rows.template at<T>(args.p.grad_out, r, head_dim); });
    T scores[kRows / kRowLanes], grads[kRows / kRowLanes];
    multiply_row(scores, memory.k, memory.q, head_dim);
    multiply_row(grads, memory.v, memory.grad_out, head_dim);
#pragma unroll
    for (int i = 0; i < kRows / kRowLanes; ++i) {
      const int r = fma_lane() + kRowLanes * i;
      const WeightGrad<T> w(scores[i], grads[i], static_cast<T>(s.scale), sees, j0 + fma_row(), memory.rows, r);
      memory.weights.store(fma_row(), r, w.weight);
      memory.grad_scores.store(fma_row(), r, w.grad_score);
    }
    __syncwarp();
    grad_v.add(memory.weights, memory.grad_out);
    grad_k.add(memory.grad_scores, memory.q);
  }
  copy_wait<0>();
  const auto store_key = [&](const RowSums<T, kHead>& sums, void* grad, const HeadStrides& strides) {
    if (grad == nullptr || j0 + fma_row() >= keys_count) return;
    const HeadRows<T> rows(static_cast<T*>(grad), strides, run);
    sums.store_to(rows.data + (j0 + fma_row()) * rows.step, head_dim, kAligned);
  };
  store_key(grad_k, args.p.grad_k, args.p.grad_k_strides);
  store_key(grad_v, args.p.grad_v, args.p.grad_v_strides);
}

}  // namespace micro_kernels::cuda
