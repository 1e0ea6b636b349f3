#pragma once
// Tiles of rows in shared memory, and their products: with tensor cores for 16-bit elements, with plain multiplications
// for the others (attention_*_fma.cuh).

#include "common/cuda/arch/copy.cuh"
#include "common/cuda/arch/mma.cuh"
#include "common/cuda/memory.cuh"
#include "common/cuda/warp.cuh"
#include "expert_attention/attention_launch.h"

namespace micro_kernels::cuda {

// kRows rows of kHead elements, in chunks of 16 bytes. Chunk c of row r lies where chunk c ^ (r % 8) would: eight
// neighbouring rows keep one column in eight different places of the 128 bytes that shared memory serves at once.
template <class T, int kHead, int kRows>
struct Tile {
  static constexpr int kChunk = 16 / sizeof(T);
  static constexpr int kChunks = kHead / kChunk;
  SharedArray<T, kRows * kHead> cells;

  MICRO_HOST_DEVICE static constexpr int index(int row, int chunk) {
    return row * kHead + (chunk ^ (row % 8)) * kChunk;
  }
  __device__ Vec<T, kChunk> load_chunk(int row, int chunk) const {
    return cells.template load_vec<kChunk>(index(row, chunk));
  }
  __device__ void store_chunk(int row, int chunk, const Vec<T, kChunk>& value) {
    cells.template store_vec<kChunk>(index(row, chunk), value);
  }
  __device__ T* address(int row, int chunk) { return cells.at(index(row, chunk), kChunk); }
  __device__ const T* address(int row, int chunk) const { return cells.at(index(row, chunk), kChunk); }
};

// 16 bytes from and to global memory.
template <class T>
__device__ __forceinline__ Vec<T, 16 / sizeof(T)> read_chunk(const T* from, bool aligned) {
  constexpr int kChunk = 16 / sizeof(T);
  if (aligned) return load_vec<kChunk>(from);
  Vec<T, kChunk> value;
#pragma unroll
  for (int e = 0; e < kChunk; ++e) value[e] = load(from + e);
  return value;
}
template <class T, int kChunk>
__device__ __forceinline__ void write_chunk(T* to, bool aligned, const Vec<T, kChunk>& value) {
  if (aligned) {
    store_vec<kChunk>(to, value);
    return;
  }
#pragma unroll
  for (int e = 0; e < kChunk; ++e) store(to + e, value[e]);
}

// Row r of the tile becomes the head_dim elements at from(r), or zeros where that is null; columns behind head_dim
// become zeros. kAligned: every row begins at a multiple of 16 bytes; then the copies are asynchronous. By the whole
// block, without a barrier.
template <bool kAligned, class T, int kHead, int kRows, class From>
__device__ __forceinline__ void load_tile(Tile<T, kHead, kRows>& tile, int head_dim, const From& from) {
  using Rows = Tile<T, kHead, kRows>;
  constexpr int kCells = kRows * Rows::kChunks;
#pragma unroll(!kAligned ? 1 : kHead <= 128 ? 8 : 2)
  for (int first = 0; first < kCells; first += kThreads) {
    const int i = first + static_cast<int>(threadIdx.x);
    if (kCells % kThreads != 0 && i >= kCells) break;
    const int row = i / Rows::kChunks, chunk = i % Rows::kChunks, d = chunk * Rows::kChunk;
    const T* source = from(row);
    const bool there = source != nullptr && d < head_dim;
    if constexpr (kAligned)
      copy_async16(tile.address(row, chunk), there ? source + d : source, there);
    else
      tile.store_chunk(row, chunk, there ? read_chunk(source + d, false) : Vec<T, Rows::kChunk>{});
  }
}

// ---- tensor cores --------------------------------------------------------------------------------------------------
//
// What a warp computes is 16 rows by some columns, in tiles of 8 columns: lane l holds d[n], the elements
// (l / 4, 8 n + 2 (l % 4)), the one beside it, and the same two 8 rows below.

inline constexpr int kMmaColumns = 8;

__device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x % kWarp); }
__device__ __forceinline__ int warp() { return static_cast<int>(threadIdx.x / kWarp); }
__device__ __forceinline__ int fragment_row() { return lane() / 4; }
__device__ __forceinline__ int fragment_column() { return lane() % 4 * 2; }

// The same in the four lanes that share two rows.
template <class T>
__device__ __forceinline__ T quad_sum(T value) {
  value += __shfl_xor_sync(kAllLanes, value, 1);
  return value + __shfl_xor_sync(kAllLanes, value, 2);
}
template <class T>
__device__ __forceinline__ T quad_max(T value) {
#pragma unroll
  for (int width = 1; width <= 2; width *= 2) {
    const T other = __shfl_xor_sync(kAllLanes, value, width);
    value = other > value ? other : value;
  }
  return value;
}

// d += a b^T over the head: 16 rows of a from a_row on, 8 kTiles rows of b from b_row on.
template <class T, int kHead, int kA, int kB, int kTiles>
__device__ __forceinline__ void multiply_rows(float (&d)[kTiles][4], const Tile<T, kHead, kA>& a, int a_row,
                                              const Tile<T, kHead, kB>& b, int b_row) {
  const int a_at = a_row + lane() % 16, a_chunk = lane() / 16;
  const int b_at = b_row + lane() / 16 * 8 + lane() % 8, b_chunk = lane() / 8 % 2;
#pragma unroll(kHead <= 128 ? kHead / 16 : 4)
  for (int chunk = 0; chunk < kHead / 8; chunk += 2) {
    uint32_t left[4];
    load_matrix_x4(left, a.address(a_at, chunk + a_chunk));
#pragma unroll
    for (int n = 0; n < kTiles; n += 2) {
      uint32_t right[4];
      load_matrix_x4(right, b.address(b_at + n * kMmaColumns, chunk + b_chunk));
      const uint32_t even[2] = {right[0], right[1]}, odd[2] = {right[2], right[3]};
      mma_16816<T>(d[n], left, even);
      mma_16816<T>(d[n + 1], left, odd);
    }
  }
}

// d += weights b: the weights of 16 kSteps rows of b from b_row on.
template <class T, int kHead, int kB, int kSteps>
__device__ __forceinline__ void multiply_columns(float (&d)[kHead / 8][4], const uint32_t (&weights)[kSteps][4],
                                                 const Tile<T, kHead, kB>& b, int b_row) {
  const int at = b_row + lane() % 16, chunk = lane() / 16;
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
#pragma unroll
    for (int n = 0; n < kHead / 8; n += 2) {
      uint32_t right[4];
      load_matrix_x4_transposed(right, b.address(at + 16 * k, n + chunk));
      const uint32_t even[2] = {right[0], right[1]}, odd[2] = {right[2], right[3]};
      mma_16816<T>(d[n], weights[k], even);
      mma_16816<T>(d[n + 1], weights[k], odd);
    }
  }
}

template <class T>
__device__ __forceinline__ uint32_t packed(float low, float high) {
  return T(low).bits | static_cast<uint32_t>(T(high).bits) << 16;
}

// A result, rounded to elements, as the left factor of the next product.
template <class T, int kTiles>
__device__ __forceinline__ void to_factor(uint32_t (&weights)[kTiles / 2][4], const float (&d)[kTiles][4]) {
#pragma unroll
  for (int k = 0; k < kTiles / 2; ++k) {
    weights[k][0] = packed<T>(d[2 * k][0], d[2 * k][1]);
    weights[k][1] = packed<T>(d[2 * k][2], d[2 * k][3]);
    weights[k][2] = packed<T>(d[2 * k + 1][0], d[2 * k + 1][1]);
    weights[k][3] = packed<T>(d[2 * k + 1][2], d[2 * k + 1][3]);
  }
}

// A warp's result times `factor` of its two rows, through 16 rows of a tile that only this warp uses, to
// to(row of the tile); null: nowhere.
template <bool kAligned, class T, int kHead, int kRows, class To>
__device__ __forceinline__ void store_result(const float (&d)[kHead / 8][4], const float (&factor)[2],
                                             Tile<T, kHead, kRows>& tile, int first_row, int head_dim, const To& to) {
  __syncwarp();
#pragma unroll
  for (int n = 0; n < kHead / 8; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Vec<T, 2> pair;
      pair[0] = T(d[n][2 * half] * factor[half]);
      pair[1] = T(d[n][2 * half + 1] * factor[half]);
      const int row = first_row + fragment_row() + 8 * half;
      tile.cells.template store_vec<2>(tile.index(row, n) + fragment_column(), pair);
    }
  }
  __syncwarp();
#pragma unroll
  for (int i = lane(); i < kMmaRows * kHead / 8; i += kWarp) {
    const int row = first_row + i / (kHead / 8), chunk = i % (kHead / 8);
    T* target = to(row);
    if (target != nullptr && chunk * 8 < head_dim)
      write_chunk(target + chunk * 8, kAligned, tile.load_chunk(row, chunk));
  }
}

}  // namespace micro_kernels::cuda
