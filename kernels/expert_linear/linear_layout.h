#pragma once
// Tiles of CUDA's grouped product: their sizes, which rows each of them takes, and where their elements lie in shared
// memory. Plain functions, so that the launchers and the tests can evaluate them on the host.
//
// A block computes a tile of rows x columns outputs; along the reduction it walks in steps of 64 bytes (32 elements of
// 16 bits). Copies, fragments of ldmatrix and stores all move chunks of 16 bytes; the swizzles below put the chunks
// that eight lanes touch together into different banks.

#include <cstdint>

#include "micro_kernels/dtype.h"

namespace micro_kernels::cuda {

inline constexpr int kLinearThreads = 128;
inline constexpr int kInterleave = 8;  // columns of gate and up that alternate in a block's tile

template <class T>
inline constexpr int kChunk = 16 / static_cast<int>(sizeof(T));  // elements
template <class T>
inline constexpr int kTileSteps = 64 / static_cast<int>(sizeof(T));

// Rows of a tile. Elements of 16 bits go through the tensor cores in tiles of kManyRows or kFewRows rows; wider ones
// through FMA units, float64 in smaller tiles because its sums take more registers.
template <class T>
inline constexpr int kManyRows = sizeof(T) == 2   ? 128
                                 : sizeof(T) == 4 ? 64
                                                  : 32;
inline constexpr int kFewRows = 32;
// Where factors do not lie in chunks of 16 bytes: copies by elements take registers too.
template <class T>
inline constexpr int kSlowRows = sizeof(T) == 2 ? 64 : kManyRows<T>;

// Columns: fewer where few rows wait for a matrix to stream by, so that more blocks fetch it.
template <class T, int kRows>
inline constexpr int kTileColumns = sizeof(T) == 2 && kRows == kFewRows ? 64 : 128;

// First element of a chunk of a tile [rows, kTileSteps], whose rows run along the reduction: four chunks to a row.
template <class T>
MICRO_HOST_DEVICE constexpr int reduction_major(int row, int chunk) {
  return (row * 4 + (chunk ^ ((row >> 1) & 3))) * kChunk<T>;
}

// First element of a chunk of a tile [steps, kWidth], whose rows run along the outputs; also of finished tiles. Eight
// lanes read one chunk of eight steps (ldmatrix) or, of elements of 32 bits, the columns of two chunks in four steps.
template <class T, int kWidth>
MICRO_HOST_DEVICE constexpr int width_major(int step, int chunk) {
  static_assert(kWidth / kChunk<T> >= 8);
  const int turn = sizeof(T) == 4 ? (step & 3) << 1 : step & 7;
  return (step * (kWidth / kChunk<T>)+(chunk ^ turn)) * kChunk<T>;
}

// ---- which rows a tile takes ---------------------------------------------------------------------------------------

MICRO_HOST_DEVICE constexpr int64_t pieces(int64_t size, int64_t piece) { return (size + piece - 1) / piece; }

// Remainders of numbers below 2^31 by one divisor, without a division.
class Remainder {
 public:
  Remainder() = default;
  constexpr explicit Remainder(uint32_t divisor) : divisor_(divisor) {
    while (uint64_t{1} << (shift_ - 31) < divisor) ++shift_;
    factor_ = ((uint64_t{1} << shift_) + divisor - 1) / divisor;  // at most 2^32
  }
  MICRO_HOST_DEVICE constexpr uint32_t of(uint32_t number) const {
    return number - static_cast<uint32_t>(number * factor_ >> shift_) * divisor_;
  }

 private:
  uint64_t factor_ = 0;
  uint32_t divisor_ = 1;
  int shift_ = 31;
};

// Tiles of tile_rows rows that cut `rows` rows into `ranges` ranges, at worst.
constexpr int64_t worst_row_tiles(int64_t rows, int64_t ranges, int64_t tile_rows) {
  const int64_t filled = rows < ranges ? rows : ranges;
  return filled + (rows - filled) / tile_rows;
}

// Row tiles of a group: with offsets those of the experts and of the idle rows, else those of every expert.
constexpr int64_t row_tiles(int64_t rows, int64_t experts, bool offsets, int64_t tile_rows) {
  return offsets ? worst_row_tiles(rows, experts + 1, tile_rows) : experts * pieces(rows, tile_rows);
}

// Tiles of few rows read a matrix more often; tiles of many compute rows that are not there.
constexpr bool takes_few_rows(int64_t rows, int64_t experts, bool offsets) {
  return rows <= 2 * int64_t{kFewRows} * (offsets ? experts : 1);
}

// Rows of outputs that the tensor cores compute for a range of `rows` rows: a warp leaves out the fragments (16 rows)
// that lie behind the range.
inline constexpr int64_t kFragmentRows = 16;
constexpr int64_t issued_rows(int64_t rows) { return (rows + kFragmentRows - 1) / kFragmentRows * kFragmentRows; }

}  // namespace micro_kernels::cuda
