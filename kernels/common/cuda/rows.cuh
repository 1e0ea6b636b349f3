#pragma once
// How kernels cut rows: a warp takes a row, or a piece of one, in vectors of 16 bytes where memory allows.

#include <initializer_list>

#include "common/cuda/launch.cuh"
#include "common/cuda/warp.cuh"

namespace micro_kernels::cuda {

template <class T>
inline constexpr int kVector = static_cast<int>(16 / sizeof(T));

// Whether rows of `columns` elements of T, one after the other from each of `bases`, all begin on a vector and end with
// one. Decided at launch: kernels are compiled for vectors and for single elements.
template <class T>
bool in_vectors(int64_t columns, std::initializer_list<const void*> bases) {
  for (const void* base : bases)
    if (reinterpret_cast<uintptr_t>(base) % 16 != 0) return false;
  return columns % kVector<T> == 0;
}

inline constexpr int kRowWarps = 8;
inline constexpr int kRowThreads = kRowWarps * kWarp;
inline constexpr int kPieceVectors = 4;  // of one lane: enough loads in flight, few enough registers

// The piece of a row that a warp takes: its lanes beside each other, kPieceVectors times.
template <int N>
struct Piece {
  int64_t row, first;  // first: the lane's first column

  __device__ Piece()
      : row(int64_t{blockIdx.x} * kRowWarps + threadIdx.x / kWarp),
        first((int64_t{blockIdx.y} * kPieceVectors * kWarp + threadIdx.x % kWarp) * N) {}
  __device__ int64_t column(int i) const { return first + int64_t{i} * kWarp * N; }
};

// The grid in which every row of `columns` elements is cut in pieces of vectors of N.
inline dim3 piece_grid(int64_t rows, int64_t columns, int N) {
  return dim3(static_cast<unsigned>(ceil_div(rows, kRowWarps)),
              static_cast<unsigned>(ceil_div(columns, int64_t{kPieceVectors} * kWarp * N)));
}

}  // namespace micro_kernels::cuda
