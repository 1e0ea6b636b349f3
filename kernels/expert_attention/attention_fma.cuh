#pragma once
// What the kernels for float32 and float64 share: 16 rows per block, each owned by eight neighbouring lanes. Plain
// multiplications and additions, exact in the element type. Lane l of a row holds the results for the partners
// l, l + 8, .. of a block of partners (keys of a query, or queries of a key), and the chunks l, l + 8, .. of its sums.

#include "expert_attention/attention_rows.cuh"
#include "expert_attention/attention_tiles.cuh"

namespace micro_kernels::cuda {

inline constexpr int kRowLanes = 8;
inline constexpr int kFmaRows = kThreads / kRowLanes;

// Partners per block: a tile of them takes 16 KiB at most.
template <class T, int kHead>
inline constexpr int kPartners = 16384 / (kHead * sizeof(T)) < 32 ? 16384 / (kHead * sizeof(T)) : 32;

__device__ __forceinline__ int fma_row() { return static_cast<int>(threadIdx.x) / kRowLanes; }
__device__ __forceinline__ int fma_lane() { return static_cast<int>(threadIdx.x) % kRowLanes; }

// Weights of the block's rows and partners, between the lanes of a row. The rows begin in different banks.
template <class T, int kHead>
struct WeightsMemory {
  static constexpr int kStep = kPartners<T, kHead> + 16 / sizeof(T);
  SharedArray<T, kFmaRows * kStep> cells;
  __device__ void store(int row, int partner, T value) { cells.store(row * kStep + partner, value); }
  __device__ T load(int row, int partner) const { return cells.load(row * kStep + partner); }
};

// products[i] = row of a . partner l + 8 i of b.
template <class T, int kHead, int kA, int kB>
__device__ __forceinline__ void multiply_row(T (&products)[kB / kRowLanes], const Tile<T, kHead, kA>& a,
                                             const Tile<T, kHead, kB>& b, int head_dim) {
  constexpr int kChunk = Tile<T, kHead, kA>::kChunk;
#pragma unroll
  for (T& product : products) product = 0;
  for (int chunk = 0; chunk < head_dim / kChunk; ++chunk) {
    const Vec<T, kChunk> left = a.load_chunk(fma_row(), chunk);
#pragma unroll
    for (int i = 0; i < kB / kRowLanes; ++i) {
      const Vec<T, kChunk> right = b.load_chunk(fma_lane() + kRowLanes * i, chunk);
#pragma unroll
      for (int e = 0; e < kChunk; ++e) products[i] = fma(left[e], right[e], products[i]);
    }
  }
}

// A lane's share of a row of head_dim sums.
template <class T, int kHead>
struct RowSums {
  static constexpr int kChunk = 16 / sizeof(T);
  static constexpr int kOwn = kHead / kChunk / kRowLanes;
  T value[kOwn][kChunk] = {};

  __device__ __forceinline__ void scale(T factor) {
#pragma unroll
    for (auto& chunk : value) {
#pragma unroll
      for (T& x : chunk) x *= factor;
    }
  }
  // += weights of the row times the partners.
  template <int kB>
  __device__ __forceinline__ void add(const WeightsMemory<T, kHead>& weights, const Tile<T, kHead, kB>& partners) {
#pragma unroll(sizeof(T) == 8 ? 1 : 4)
    for (int j = 0; j < kB; ++j) {
      const T weight = weights.load(fma_row(), j);
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        const Vec<T, kChunk> chunk = partners.load_chunk(j, fma_lane() + kRowLanes * i);
#pragma unroll
        for (int e = 0; e < kChunk; ++e) value[i][e] = fma(weight, chunk[e], value[i][e]);
      }
    }
  }
  __device__ __forceinline__ void store_to(T* row, int head_dim, bool aligned) const {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int d = (fma_lane() + kRowLanes * i) * kChunk;
      Vec<T, kChunk> chunk;
#pragma unroll
      for (int e = 0; e < kChunk; ++e) chunk[e] = value[i][e];
      if (d < head_dim) write_chunk(row + d, aligned, chunk);
    }
  }
};

// Over the eight lanes of a row; the same in all of them.
template <class T>
__device__ __forceinline__ T row_sum(T value) {
#pragma unroll
  for (int width = 1; width < kRowLanes; width *= 2) value += __shfl_xor_sync(kAllLanes, value, width);
  return value;
}
template <class T>
__device__ __forceinline__ T row_max(T value) {
#pragma unroll
  for (int width = 1; width < kRowLanes; width *= 2) {
    const T other = __shfl_xor_sync(kAllLanes, value, width);
    value = other > value ? other : value;
  }
  return value;
}

// Loads a tile and waits for it. The barrier before: nobody reads the tile any more.
template <bool kAligned, class T, int kHead, int kRows, class From>
__device__ __forceinline__ void load_and_wait(Tile<T, kHead, kRows>& tile, int head_dim, const From& from) {
  __syncthreads();
  load_tile<kAligned>(tile, head_dim, from);
  copy_commit();
  copy_wait<0>();
  __syncthreads();
}

}  // namespace micro_kernels::cuda
