#pragma once
// The sums of a block's tile, and the product of two tiles in shared memory that is added to them. Each sum is one
// chain over the reduction, ascending, whatever the size of the tile.

#include <cmath>
#include <type_traits>

#include "common/cuda/arch/mma.cuh"
#include "common/cuda/warp.cuh"
#include "expert_linear/linear_tiles.cuh"

namespace micro_kernels::cuda {

// Which way the rows of a tile in shared memory run.
enum class Along : int8_t { kReduction, kWidth };

// ---- 16 bits: tensor cores -----------------------------------------------------------------------------------------

// Warps side by side: each has a part of the tile, fragments of 16 rows and pairs of 8 columns.
template <class T, int kRows, Along kLeftAlong, Along kRightAlong>
class TensorProduct {
  static constexpr int kWarpsDown = kRows == 128 ? 2 : 1;
  static constexpr int kWarpsAcross = kLinearThreads / kWarp / kWarpsDown;
  using Tile = LinearTile<T, kRows>;
  static constexpr int kWarpRows = kRows / kWarpsDown, kWarpColumns = Tile::kColumns / kWarpsAcross;
  static constexpr int kDown = kWarpRows / 16, kAcross = kWarpColumns / 8;

 public:
  // Rows and columns of the tile that exist: the rest is left out where that is a whole fragment or warp.
  __device__ __forceinline__ TensorProduct(int rows, int columns) {
    const int warp = static_cast<int>(threadIdx.x) / kWarp;
    row_ = warp / kWarpsAcross * kWarpRows;
    column_ = warp % kWarpsAcross * kWarpColumns;
    const int fragments = (rows - row_ + 15) / 16;
    active_ = column_ >= columns || fragments < 0 ? 0 : fragments < kDown ? fragments : kDown;
#pragma unroll
    for (int i = 0; i < kDown; ++i)
#pragma unroll
      for (int j = 0; j < kAcross; ++j)
#pragma unroll
        for (int k = 0; k < 4; ++k) sums_[i][j][k] = 0;
  }

  template <class Cells>
  __device__ __forceinline__ void multiply(Cells& cells, int stage) {
    if (active_ == kDown)
      add<true>(cells, stage * Tile::kStage);
    else if (active_ > 0)
      add<false>(cells, stage * Tile::kStage);
  }

  // body(row, column, sum, sum of the next column)
  template <class Body>
  __device__ __forceinline__ void each_pair(const Body& body) const {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
    for (int i = 0; i < kDown; ++i)
#pragma unroll
      for (int j = 0; j < kAcross; ++j)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          body(row_ + i * 16 + half * 8 + lane / 4, column_ + j * 8 + lane % 4 * 2, sums_[i][j][2 * half],
               sums_[i][j][2 * half + 1]);
  }

  // body(row, column, sum)
  template <class Body>
  __device__ __forceinline__ void each(const Body& body) const {
    each_pair([&](int row, int column, float a, float b) {
      body(row, column, a);
      body(row, column + 1, b);
    });
  }

 private:
  template <bool kAll, class Cells>
  __device__ __forceinline__ void add(Cells& cells, int base) {
#pragma unroll
    for (int k = 0; k < kTileSteps<T>; k += 16) {
      uint32_t left[kDown][4], right[kAcross / 2][4];
#pragma unroll
      for (int i = 0; i < kDown; ++i)
        if (kAll || i < active_) load_left(left[i], cells, base, row_ + i * 16, k);
#pragma unroll
      for (int j = 0; j < kAcross / 2; ++j) load_right(right[j], cells, base + Tile::kLeft, column_ + j * 16, k);
#pragma unroll
      for (int i = 0; i < kDown; ++i) {
        if (!kAll && i >= active_) continue;
#pragma unroll
        for (int j = 0; j < kAcross; ++j)
          mma_16816<T>(sums_[i][j], left[i], {right[j / 2][j % 2 * 2], right[j / 2][j % 2 * 2 + 1]});
      }
    }
  }

  // The four 8x8 matrices of a fragment: rows, rows + 8, then the same of the next 8 steps.
  template <class Cells>
  static __device__ __forceinline__ void load_left(uint32_t (&r)[4], Cells& cells, int base, int row, int step) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp, matrix = lane / 8;
    if constexpr (kLeftAlong == Along::kReduction) {
      const int from = reduction_major<T>(row + lane % 8 + matrix % 2 * 8, step / 8 + matrix / 2);
      load_matrix_x4(r, cells.at(base + from, 8));
    } else {
      const int from = width_major<T, kRows>(step + lane % 8 + matrix / 2 * 8, row / 8 + matrix % 2);
      load_matrix_x4_transposed(r, cells.at(base + from, 8));
    }
  }

  // Of 16 columns: steps, steps + 8, then the same of the next 8 columns.
  template <class Cells>
  static __device__ __forceinline__ void load_right(uint32_t (&r)[4], Cells& cells, int base, int column, int step) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp, matrix = lane / 8;
    if constexpr (kRightAlong == Along::kReduction) {
      const int from = reduction_major<T>(column + lane % 8 + matrix / 2 * 8, step / 8 + matrix % 2);
      load_matrix_x4(r, cells.at(base + from, 8));
    } else {
      const int from = width_major<T, Tile::kColumns>(step + lane % 8 + matrix % 2 * 8, column / 8 + matrix / 2);
      load_matrix_x4_transposed(r, cells.at(base + from, 8));
    }
  }

  float sums_[kDown][kAcross][4];
  int row_, column_;  // of the warp's part
  int active_;        // fragments of rows that exist
};

// ---- wider elements: FMA -------------------------------------------------------------------------------------------

// Threads in 8 rows of 16, each with kDown x 8 sums. Which rows and columns these are follows from how the tiles lie:
// along the reduction a thread reads chunks of steps, along the width chunks of neighbours.
template <class T, int kRows, Along kLeftAlong, Along kRightAlong>
class ThreadProduct {
  static constexpr int kThreadsDown = 8, kThreadsAcross = kLinearThreads / kThreadsDown;
  using Tile = LinearTile<T, kRows>;
  static constexpr int kDown = kRows / kThreadsDown, kAcross = Tile::kColumns / kThreadsAcross;
  static constexpr int kVector = kChunk<T>;

 public:
  __device__ __forceinline__ ThreadProduct(int, int) {
#pragma unroll
    for (int i = 0; i < kDown; ++i)
#pragma unroll
      for (int j = 0; j < kAcross; ++j) sums_[i][j] = 0;
  }

  template <class Cells>
  __device__ __forceinline__ void multiply(Cells& cells, int stage) {
    const int base = stage * Tile::kStage;
#pragma unroll 2
    for (int k = 0; k < kTileSteps<T>; k += kVector) {
      T left[kDown][kVector];  // [.][step]
      read<kRows, kLeftAlong, kThreadsDown>(left, cells, base, down(), 0, k);
#pragma unroll
      for (int first = 0; first < kAcross; first += kVector) {  // not all columns at once: registers
        T right[kVector][kVector];
        read<Tile::kColumns, kRightAlong, kThreadsAcross>(right, cells, base + Tile::kLeft, across(), first, k);
#pragma unroll
        for (int step = 0; step < kVector; ++step)
#pragma unroll
          for (int i = 0; i < kDown; ++i)
#pragma unroll
            for (int j = 0; j < kVector; ++j)
              sums_[i][first + j] = fma(left[i][step], right[j][step], sums_[i][first + j]);
      }
    }
  }

  // body(row, column, sum)
  template <class Body>
  __device__ __forceinline__ void each(const Body& body) const {
#pragma unroll
    for (int i = 0; i < kDown; ++i)
#pragma unroll
      for (int j = 0; j < kAcross; ++j)
        body(place<kLeftAlong, kThreadsDown>(down(), i), place<kRightAlong, kThreadsAcross>(across(), j), sums_[i][j]);
  }

 private:
  __device__ static int down() { return static_cast<int>(threadIdx.x) / kThreadsAcross; }
  __device__ static int across() { return static_cast<int>(threadIdx.x) % kThreadsAcross; }

  // Row or column number i of a thread.
  template <Along kAlong, int kThreads>
  static __device__ __forceinline__ int place(int thread, int i) {
    if (kAlong == Along::kReduction) return thread + i * kThreads;
    return (thread + i / kVector * kThreads) * kVector + i % kVector;
  }

  // Rows or columns [first, first + kCount) of a thread, kVector steps of them.
  template <int kWidth, Along kAlong, int kThreads, int kCount, class Cells>
  static __device__ __forceinline__ void read(T (&values)[kCount][kVector], Cells& cells, int base, int thread,
                                              int first, int step) {
    if constexpr (kAlong == Along::kReduction) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const int from = reduction_major<T>(thread + (first + i) * kThreads, step / kVector);
        const Vec<T, kVector> chunk = cells.template load_vec<kVector>(base + from);
#pragma unroll
        for (int s = 0; s < kVector; ++s) values[i][s] = chunk[s];
      }
    } else {
#pragma unroll
      for (int s = 0; s < kVector; ++s)
#pragma unroll
        for (int i = 0; i < kCount; i += kVector) {
          const int from = width_major<T, kWidth>(step + s, thread + (first + i) / kVector * kThreads);
          const Vec<T, kVector> chunk = cells.template load_vec<kVector>(base + from);
#pragma unroll
          for (int v = 0; v < kVector; ++v) values[i + v][s] = chunk[v];
        }
    }
  }

  T sums_[kDown][kAcross];
};

// ---- float32 that may be rounded to TF32: tensor cores -------------------------------------------------------------

// As TensorProduct, with fragments of 16 rows, 8 columns and 8 steps.
template <int kRows, Along kLeftAlong, Along kRightAlong>
class Tf32Product {
  static constexpr int kWarpsDown = 2, kWarpsAcross = 2;
  using Tile = LinearTile<float, kRows>;
  static constexpr int kWarpRows = kRows / kWarpsDown, kWarpColumns = Tile::kColumns / kWarpsAcross;
  static constexpr int kDown = kWarpRows / 16, kAcross = kWarpColumns / 8;

 public:
  __device__ __forceinline__ Tf32Product(int, int) {
    const int warp = static_cast<int>(threadIdx.x) / kWarp;
    row_ = warp / kWarpsAcross * kWarpRows;
    column_ = warp % kWarpsAcross * kWarpColumns;
#pragma unroll
    for (int i = 0; i < kDown; ++i)
#pragma unroll
      for (int j = 0; j < kAcross; ++j)
#pragma unroll
        for (int k = 0; k < 4; ++k) sums_[i][j][k] = 0;
  }

  template <class Cells>
  __device__ __forceinline__ void multiply(Cells& cells, int stage) {
    const int base = stage * Tile::kStage;
#pragma unroll
    for (int k = 0; k < kTileSteps<float>; k += 8) {
      float left[kDown][4], right[kAcross][2];
#pragma unroll
      for (int i = 0; i < kDown; ++i) {
        const int row = row_ + i * 16;
        left[i][0] = read<kRows, kLeftAlong>(cells, base, row, k);
        left[i][1] = read<kRows, kLeftAlong>(cells, base, row + 8, k);
        left[i][2] = read<kRows, kLeftAlong>(cells, base, row, k + 4);
        left[i][3] = read<kRows, kLeftAlong>(cells, base, row + 8, k + 4);
      }
#pragma unroll
      for (int j = 0; j < kAcross; ++j) {
        right[j][0] = read<Tile::kColumns, kRightAlong>(cells, base + Tile::kLeft, column_ + j * 8, k);
        right[j][1] = read<Tile::kColumns, kRightAlong>(cells, base + Tile::kLeft, column_ + j * 8, k + 4);
      }
#pragma unroll
      for (int i = 0; i < kDown; ++i)
#pragma unroll
        for (int j = 0; j < kAcross; ++j) mma_1688_tf32(sums_[i][j], left[i], right[j]);
    }
  }

  // body(row, column, sum)
  template <class Body>
  __device__ __forceinline__ void each(const Body& body) const {
#pragma unroll
    for (int i = 0; i < kDown; ++i)
#pragma unroll
      for (int j = 0; j < kAcross; ++j)
#pragma unroll
        for (int k = 0; k < 4; ++k)
          body(row_ + i * 16 + k / 2 * 8 + lane() / 4, column_ + j * 8 + lane() % 4 * 2 + k % 2, sums_[i][j][k]);
  }

 private:
  __device__ static int lane() { return static_cast<int>(threadIdx.x) % kWarp; }

  // A lane's element of a piece of 8 rows or columns and 4 steps: 32 lanes, 32 banks.
  template <int kWidth, Along kAlong, class Cells>
  static __device__ __forceinline__ float read(Cells& cells, int base, int first, int step) {
    const int outer = first + lane() / 4, inner = step + lane() % 4;
    if (kAlong == Along::kReduction) return cells.load(base + reduction_major<float>(outer, inner / 4) + inner % 4);
    return cells.load(base + width_major<float, kWidth>(inner, outer / 4) + outer % 4);
  }

  float sums_[kDown][kAcross][4];
  int row_, column_;  // of the warp's part
};

// How a launch goes: kAnywhere takes factors that do not lie in chunks of 16 bytes.
enum class Path : int8_t { kAnywhere, kChunks, kTf32 };

template <class T, int kRows, Along kLeftAlong, Along kRightAlong, Path kPath>
using LinearProduct =
    std::conditional_t<sizeof(T) == 2, TensorProduct<T, kRows, kLeftAlong, kRightAlong>,
                       std::conditional_t<kPath == Path::kTf32, Tf32Product<kRows, kLeftAlong, kRightAlong>,
                                          ThreadProduct<T, kRows, kLeftAlong, kRightAlong>>>;

}  // namespace micro_kernels::cuda
