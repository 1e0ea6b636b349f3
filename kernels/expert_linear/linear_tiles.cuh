#pragma once
// How tiles come from global into shared memory, and the walk along the reduction: several tiles are under way while
// the tensor cores work on one.

#include <cassert>

#include "common/cuda/arch/copy.cuh"
#include "common/cuda/memory.cuh"
#include "expert_linear/linear_layout.h"
#include "micro_kernels/expert_linear.h"

namespace micro_kernels::cuda {

// ---- shapes --------------------------------------------------------------------------------------------------------

template <class T, int kRows>
struct LinearTile {
  static constexpr int kColumns = kTileColumns<T, kRows>;
  static constexpr int kStages = kRows == 128 ? 3 : kColumns == 128 ? 4 : 6;  // tiles on their way, and the one in use
  static constexpr int kLeft = kRows * kTileSteps<T>;  // elements of the left factor, which brings the rows
  static constexpr int kStage = kLeft + kColumns * kTileSteps<T>;
  static constexpr int kFinished = kRows * kColumns;
  static constexpr int kElements = kStages * kStage > kFinished ? kStages* kStage : kFinished;
};

// Tiles on their way; then, in the same place, the finished tile.
template <class T, int kRows>
struct LinearShared {
  SharedArray<T, LinearTile<T, kRows>::kElements> cells;
};

// ---- copies --------------------------------------------------------------------------------------------------------

// One chunk, of which `left` elements exist; the rest are 0. kFast: all or nothing of it exists, and it is aligned.
template <bool kFast, class T, class Cells>
__device__ __forceinline__ void copy_chunk(Cells& cells, int to, const T* from, int64_t left) {
  if constexpr (kFast) {
    copy_async16(cells.at(to, kChunk<T>), from, left > 0);
  } else {
    Vec<T, kChunk<T>> values;
#pragma unroll
    for (int i = 0; i < kChunk<T>; ++i) values[i] = i < left ? load(from + i) : T(accumulator_t<T>(0));
    cells.template store_vec<kChunk<T>>(to, values);
  }
}

// What a thread copies of tiles whose rows run along the reduction: the same chunk of some rows.
template <int kWidth>
struct ReductionRows {
  static constexpr int kCount = kWidth * 4 / kLinearThreads;

  __device__ static int number(int i) { return static_cast<int>(threadIdx.x) / 4 + i * (kLinearThreads / 4); }
  __device__ static int chunk() { return static_cast<int>(threadIdx.x) % 4; }
  template <class T>
  __device__ static int place(int i) {
    return reduction_major<T>(number(i), chunk());
  }
};

// Rows that lie anywhere.
template <class T, int kWidth>
struct GatheredRows : ReductionRows<kWidth> {
  using Places = ReductionRows<kWidth>;
  const T* row[Places::kCount];
  unsigned there = 0;  // bit i: row i exists; otherwise zeros

  // place: number of the row in `rows`, or -1.
  __device__ __forceinline__ void point(int i, const T* data, int64_t stride, int64_t place) {
    there = (there & ~(1u << i)) | (place >= 0 ? 1u << i : 0u);
    row[i] = data + (place >= 0 ? place * stride : 0);
  }

  // Steps from `step` on, of `steps`.
  template <bool kFast, class Cells>
  __device__ __forceinline__ void copy(Cells& cells, int base, int64_t step, int64_t steps) const {
    const int64_t first = step + Places::chunk() * kChunk<T>;
#pragma unroll
    for (int i = 0; i < Places::kCount; ++i)
      copy_chunk<kFast>(cells, base + Places::template place<T>(i), row[i] + first, there >> i & 1 ? steps - first : 0);
  }
};

// Rows at even distances.
template <class T, int kWidth>
struct EvenRows : ReductionRows<kWidth> {
  using Places = ReductionRows<kWidth>;
  const T* first_row;  // row i begins i * distance behind it
  int64_t distance;
  int count;  // rows that exist; otherwise zeros

  template <bool kFast, class Cells>
  __device__ __forceinline__ void copy(Cells& cells, int base, int64_t step, int64_t steps) const {
    const int64_t first = step + Places::chunk() * kChunk<T>;
    const T* from = first_row + first;
#pragma unroll
    for (int i = 0; i < Places::kCount; ++i) {
      copy_chunk<kFast>(cells, base + Places::template place<T>(i), from, i < count ? steps - first : 0);
      from += distance;
    }
  }
};

// What a thread copies of tiles whose rows run along the outputs: the same chunk of some steps.
template <class T, int kWidth>
struct WidthRows {
  static constexpr int kChunks = kWidth / kChunk<T>;
  static constexpr int kCount = kTileSteps<T> * kChunks / kLinearThreads;

  __device__ static int number(int i) {
    return static_cast<int>(threadIdx.x) / kChunks + i * (kLinearThreads / kChunks);
  }
  __device__ static int chunk() { return static_cast<int>(threadIdx.x) % kChunks; }
  __device__ static int place(int i) { return width_major<T, kWidth>(number(i), chunk()); }
};

// ---- the walk along the reduction ----------------------------------------------------------------------------------

// feed.issue(cells, stage): starts the copies of the next tile. feed.finish(cells, stage): what the thread does to the
// chunks that it copied itself. product.multiply(cells, stage): adds a tile's products to the sums.
template <class T, int kRows, class Feed, class Product>
__device__ __forceinline__ void walk(LinearShared<T, kRows>& shared, int64_t tiles, Feed& feed, Product& product) {
  constexpr int kStages = LinearTile<T, kRows>::kStages;
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) {
    if (i < tiles) feed.issue(shared.cells, i);
    copy_commit();
  }
  int stage = 0, free_stage = kStages - 1;
#pragma unroll 1
  for (int64_t tile = 0; tile < tiles; ++tile) {
    copy_wait<kStages - 2>();
    feed.finish(shared.cells, stage);
    __syncthreads();  // the tile is there for all, and all have left the one before it
    if (tile + kStages - 1 < tiles) feed.issue(shared.cells, free_stage);
    copy_commit();
    product.multiply(shared.cells, stage);
    stage = stage + 1 == kStages ? 0 : stage + 1;
    free_stage = free_stage + 1 == kStages ? 0 : free_stage + 1;
  }
  copy_wait<0>();
  __syncthreads();
}

// ---- which rows a block has ----------------------------------------------------------------------------------------

struct RowRange {
  int64_t first = 0;  // row of the tile's first row
  int count = 0;      // rows of the tile that exist
  int expert = 0;
  bool idle = false;  // zeros are wanted
};

__device__ inline bool has_rows(const int32_t* used, int expert) {
  return !used || load(used + expert) < load(used + expert + 1);
}

__device__ __forceinline__ int rows_in_tile(int64_t left, int tile_rows) {
  return left < tile_rows ? static_cast<int>(left) : tile_rows;
}

// The rows of row tile `slot` of a group; none behind the last one.
template <class Group>
__device__ inline RowRange find_rows(const Group& group, int experts, unsigned slot, int tile_rows) {
  if (!group.offsets) {
    const unsigned tiles = static_cast<unsigned>(pieces(group.rows, tile_rows));
    const int expert = static_cast<int>(slot / tiles);
    const int64_t first = int64_t{slot % tiles} * tile_rows;
    return {first, rows_in_tile(group.rows - first, tile_rows), expert, !has_rows(group.used, expert)};
  }
  int64_t left = slot, begin = 0;
  for (int expert = 0; expert <= experts; ++expert) {
    const bool idle = expert == experts;
    const int64_t end = idle ? group.rows : load(group.offsets + expert + 1);
    assert(begin <= end && end <= group.rows);
    const int64_t tiles = pieces(end - begin, tile_rows);
    if (left < tiles) {
      const int64_t first = begin + left * tile_rows;
      return {first, rows_in_tile(end - first, tile_rows), idle ? 0 : expert, idle};
    }
    left -= tiles;
    begin = end;
  }
  return {};
}

// ---- several groups in one launch ----------------------------------------------------------------------------------

// The blocks of a launch: those of the first group, then those of the next. Within a group row tiles come first, so
// that neighbours in time read the same piece of a matrix.
template <class Group>
struct LinearLaunch {
  Group groups[kMostGroups];
  unsigned first_block[kMostGroups];
  unsigned row_tiles[kMostGroups];
  Remainder positions[kMostGroups];  // of LinearGroup
  bool fast_result[kMostGroups];     // moved in chunks
  int count;
};

struct BlockPlace {
  int group;
  unsigned row_tile, column_tile;
};

template <class Group>
__device__ __forceinline__ BlockPlace find_block(const LinearLaunch<Group>& launch) {
  int group = 0;
  for (int i = 1; i < launch.count; ++i)
    if (blockIdx.x >= launch.first_block[i]) group = i;
  const unsigned block = blockIdx.x - launch.first_block[group];
  return {group, block % launch.row_tiles[group], block / launch.row_tiles[group]};
}

}  // namespace micro_kernels::cuda
