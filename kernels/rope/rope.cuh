#pragma once
// Device code of the rotation. One warp per row, or per part of its heads: a lane keeps the angles of its columns and
// walks over heads, so that the table is read once.

#include "common/cuda/arch/trap.cuh"
#include "common/cuda/memory.cuh"
#include "common/cuda/rows.cuh"
#include "micro_kernels/rope.h"

namespace micro_kernels::cuda {

inline constexpr int kRopeHeads = 2;  // of one lane, between two stores

// How a warp lies over heads of `half` pairs, N of them in a lane.
struct RopeLanes {
  int columns;  // lanes side by side in one head
  int heads;    // heads side by side
};
template <int N>
__host__ __device__ RopeLanes rope_lanes(int64_t half) {
  const int columns = half / N < kWarp ? static_cast<int>(half / N) : kWarp;
  return {columns, kWarp / columns};
}

template <class Acc, int N>
struct RopeAngles {
  Acc cos[N], sin[N];
};

template <class Acc, int N>
__device__ __forceinline__ RopeAngles<Acc, N> rope_angles(const RopeParams& p, int64_t at) {
  constexpr int kM = N < kVector<Acc> ? N : kVector<Acc>;
  const Acc sign = p.direction == RopeDirection::kForward ? Acc(1) : Acc(-1);
  RopeAngles<Acc, N> angles;
#pragma unroll
  for (int i = 0; i < N; i += kM) {
    const Vec<Acc, kM> cos = load_vec<kM>(static_cast<const Acc*>(p.cos) + at + i);
    const Vec<Acc, kM> sin = load_vec<kM>(static_cast<const Acc*>(p.sin) + at + i);
#pragma unroll
    for (int j = 0; j < kM; ++j) {
      angles.cos[i + j] = cos[j];
      angles.sin[i + j] = sign * sin[j];
    }
  }
  return angles;
}

template <class T, int N>
__device__ __forceinline__ void turn(Vec<T, N>& a, Vec<T, N>& b, const RopeAngles<accumulator_t<T>, N>& angles) {
  using Acc = accumulator_t<T>;
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const Acc x = static_cast<Acc>(a[j]), y = static_cast<Acc>(b[j]);
    a[j] = T(x * angles.cos[j] - y * angles.sin[j]);
    b[j] = T(y * angles.cos[j] + x * angles.sin[j]);
  }
}

// y may be x: a lane has read both halves of a head before it writes one.
template <class T, int N>
__global__ void __launch_bounds__(kRowThreads, 2) rope_kernel(RopeParams p) {
  using Acc = accumulator_t<T>;
  const int64_t row = int64_t{blockIdx.x} * kRowWarps + threadIdx.x / kWarp, half = p.head_dim / 2;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const RopeLanes lanes = rope_lanes<N>(half);
  if (row >= p.rows || lane >= lanes.columns * lanes.heads) return;
  // Rows number less than 2^32: a division of 64 bits is a call.
  const int64_t position =
      p.tokens ? load(p.tokens + row) : static_cast<uint32_t>(row) % static_cast<uint32_t>(p.positions);
  require(position >= 0 && position < p.positions);

  const int64_t row_at = row * p.heads * p.head_dim;
  const int64_t first_head = int64_t{blockIdx.y} * kRopeHeads * lanes.heads + lane / lanes.columns;
  for (int64_t column = int64_t{lane % lanes.columns} * N; column < half; column += int64_t{lanes.columns} * N) {
    const RopeAngles<Acc, N> angles = rope_angles<Acc, N>(p, position * half + column);
    for (int64_t head = first_head; head < p.heads; head += int64_t{gridDim.y} * kRopeHeads * lanes.heads) {
      Vec<T, N> a[kRopeHeads]{}, b[kRopeHeads]{};
      const int64_t at = row_at + head * p.head_dim + column, step = lanes.heads * p.head_dim;
#pragma unroll
      for (int i = 0; i < kRopeHeads; ++i) {
        if (head + i * lanes.heads >= p.heads) continue;
        a[i] = load_vec<N>(static_cast<const T*>(p.x) + at + i * step);
        b[i] = load_vec<N>(static_cast<const T*>(p.x) + at + i * step + half);
      }
#pragma unroll
      for (int i = 0; i < kRopeHeads; ++i) {
        if (head + i * lanes.heads >= p.heads) continue;
        turn(a[i], b[i], angles);
        store_vec<N>(static_cast<T*>(p.y) + at + i * step, a[i]);
        store_vec<N>(static_cast<T*>(p.y) + at + i * step + half, b[i]);
      }
    }
  }
}

}  // namespace micro_kernels::cuda
