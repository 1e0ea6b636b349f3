#pragma once
// The three kernels of the grouped product. A block computes one tile: it finds its group, rows and columns, walks
// along the reduction and finishes the sums. What a block copies is said by its feed.

#include "expert_linear/linear_finish.cuh"

namespace micro_kernels::cuda {

// ---- forward: left are rows of x, right rows of the matrix, both along `in` ----------------------------------------

template <class T, int kRows, bool kFast>
class LinearFeed {
  using Acc = accumulator_t<T>;
  using Tile = LinearTile<T, kRows>;
  using Left = GatheredRows<T, kRows>;
  using Right = EvenRows<T, kTileColumns<T, kRows>>;

 public:
  __device__ __forceinline__ LinearFeed(const LinearGroup& group, const RowRange& range, int64_t column)
      : in_(group.in), gain_(nullptr) {
    point_at_rows(group, range);
    point_at_outputs(group, range, column);
    if (group.gain) gain_ = static_cast<const T*>(group.gain) + range.expert * group.gain_expert_stride;
  }

  template <class Cells>
  __device__ __forceinline__ void issue(Cells& cells, int stage) {
    left_.template copy<kFast>(cells, stage * Tile::kStage, next_, in_);
    right_.template copy<kFast>(cells, stage * Tile::kStage + Tile::kLeft, next_, in_);
    next_ += kTileSteps<T>;
  }

  // The norm of the rows that this thread copied.
  template <class Cells>
  __device__ __forceinline__ void finish(Cells& cells, int stage) {
    if (!gain_) return;
    const int64_t first = arrived_ + Left::chunk() * kChunk<T>;
    arrived_ += kTileSteps<T>;
    if (first >= in_) return;
    const Wide<T> gain = load_chunk(gain_ + first, in_ - first, kFast);
#pragma unroll
    for (int i = 0; i < Left::Places::kCount; ++i) {
      const int place = stage * Tile::kStage + Left::template place<T>(i);
      Wide<T> values = widen<T>(cells.template load_vec<kChunk<T>>(place));
#pragma unroll
      for (int v = 0; v < kChunk<T>; ++v) values.v[v] *= inverse_rms_[i];
      round<T>(values);
      Vec<T, kChunk<T>> normed;
#pragma unroll
      for (int v = 0; v < kChunk<T>; ++v) normed[v] = T(values.v[v] * gain.v[v]);
      cells.template store_vec<kChunk<T>>(place, normed);
    }
  }

 private:
  __device__ __forceinline__ void point_at_rows(const LinearGroup& group, const RowRange& range) {
    const T* x = static_cast<const T*>(group.x.data) + range.expert * group.x_expert_stride;
#pragma unroll
    for (int i = 0; i < Left::Places::kCount; ++i) {
      const int row = Left::number(i);
      const int64_t source = row < range.count ? place_of(group.x.index, range.first + row) : -1;
      left_.point(i, x, group.x.stride, source);
      inverse_rms_[i] = group.gain && source >= 0 ? load(static_cast<const Acc*>(group.inverse_rms) + source) : Acc(0);
    }
  }

  __device__ __forceinline__ void point_at_outputs(const LinearGroup& group, const RowRange& range, int64_t column) {
    const int number = Right::number(0), block = number / kInterleave;
    const bool up = group.up && block % 2 == 1;
    const int64_t output = column + (group.up ? block / 2 * kInterleave + number % kInterleave : number);
    const int apart = group.up ? kLinearThreads / 8 : kLinearThreads / 4;
    right_.first_row = static_cast<const T*>(up ? group.up : group.weight) + range.expert * group.weight_expert_stride +
                       output * group.in;
    right_.distance = apart * group.in;
    right_.count = static_cast<int>(output < group.out ? pieces(group.out - output, apart) : 0);
  }

  Left left_;
  Right right_;
  int64_t next_ = 0, arrived_ = 0, in_;  // steps
  const T* gain_;
  Acc inverse_rms_[Left::Places::kCount];
};

template <class T, int kRows, Path kPath>
__global__ void __launch_bounds__(kLinearThreads, 2) linear_kernel(LinearLaunch<LinearGroup> p) {
  auto& shared = shared_memory<LinearShared<T, kRows>>();
  const BlockPlace place = find_block(p);
  const LinearGroup& group = p.groups[place.group];
  const RowRange range = find_rows(group, static_cast<int>(group.experts), place.row_tile, kRows);
  const int64_t column = int64_t{place.column_tile} * (group.up ? kTileColumns<T, kRows> / 2 : kTileColumns<T, kRows>);
  const bool fast_result = p.fast_result[place.group];
  if (range.count == 0) return;
  LinearFeed<T, kRows, kPath != Path::kAnywhere> feed(group, range, column);
  const int64_t columns = (group.out - column) * (group.up ? 2 : 1);
  LinearProduct<T, kRows, Along::kReduction, Along::kReduction, kPath> product(
      range.count, rows_in_tile(columns, kTileColumns<T, kRows>));
  walk<T, kRows>(shared, range.idle ? 0 : pieces(group.in, kTileSteps<T>), feed, product);
  keep_sums<T, kRows>(shared, product);
  const Remainder& positions = p.positions[place.group];
  if (group.up)
    LinearFinish<T, kRows, true>(group, range, shared, column, fast_result, positions).run();
  else
    LinearFinish<T, kRows, false>(group, range, shared, column, fast_result, positions).run();
}

// ---- gradient of x: left are rows of grad_y along `out`, right rows of the matrix along `in` -----------------------

template <class T, int kRows, bool kFast>
class LinearGradXFeed {
  using Tile = LinearTile<T, kRows>;
  using Left = GatheredRows<T, kRows>;
  using Right = WidthRows<T, kTileColumns<T, kRows>>;

 public:
  __device__ __forceinline__ LinearGradXFeed(const LinearGradXGroup& group, const RowRange& range, int64_t column)
      : group_(group), range_(range), column_(column + Right::chunk() * kChunk<T>), expert_(range.expert) {
    if (group.sum_experts) expert_ = next_used(0);
  }

  // Tiles of the whole chain.
  __device__ __forceinline__ int64_t tiles() const {
    int64_t of_one = 0, experts = 1;
    for (int s = 0; s < group_.source_count; ++s) of_one += pieces(group_.sources[s].out, kTileSteps<T>);
    if (group_.sum_experts) {
      experts = 0;
      for (int e = 0; e < group_.experts; ++e) experts += has_rows(group_.used, e);
    }
    return of_one * experts;
  }

  template <class Cells>
  __device__ __forceinline__ void issue(Cells& cells, int stage) {
    while (next_ >= out_) enter_next_source();
    left_.template copy<kFast>(cells, stage * Tile::kStage, next_, out_);
#pragma unroll
    for (int i = 0; i < Right::kCount; ++i) {
      const int64_t output = next_ + Right::number(i);
      const bool there = output < out_ && column_ < group_.in;
      copy_chunk<kFast>(cells, stage * Tile::kStage + Tile::kLeft + Right::place(i),
                        weight_ + (there ? output * group_.in + column_ : 0), there ? group_.in - column_ : 0);
    }
    next_ += kTileSteps<T>;
  }

  template <class Cells>
  __device__ __forceinline__ void finish(Cells&, int) {}

 private:
  __device__ __forceinline__ int next_used(int expert) const {
    while (expert < group_.experts && !has_rows(group_.used, expert)) ++expert;
    return expert;
  }

  __device__ __forceinline__ void enter_next_source() {
    if (++source_ == group_.source_count) {
      source_ = 0;
      expert_ = next_used(expert_ + 1);
    }
    const LinearGradXSource& source = group_.sources[source_];
    out_ = source.out;
    next_ = 0;
    weight_ = static_cast<const T*>(source.weight) + expert_ * source.weight_expert_stride;
    const T* grad_y = static_cast<const T*>(source.grad_y.data) + expert_ * source.grad_y_expert_stride;
    const int32_t* index = source.grad_y.index;
    if (index) index += expert_ * source.index_expert_stride;
#pragma unroll
    for (int i = 0; i < Left::Places::kCount; ++i) {
      const int row = Left::number(i);
      const int64_t from = row < range_.count ? place_of(index, range_.first + row) : -1;
      left_.point(i, grad_y, source.grad_y.stride, from);
    }
  }

  const LinearGradXGroup& group_;
  const RowRange& range_;
  Left left_;
  const T* weight_ = nullptr;
  int64_t column_;  // of this thread's chunk
  int expert_, source_ = -1;
  int64_t next_ = 0, out_ = 0;  // steps of the source
};

template <class T, int kRows, Path kPath>
__global__ void __launch_bounds__(kLinearThreads, 2) linear_grad_x_kernel(LinearLaunch<LinearGradXGroup> p) {
  auto& shared = shared_memory<LinearShared<T, kRows>>();
  const BlockPlace place = find_block(p);
  const LinearGradXGroup& group = p.groups[place.group];
  // All experts in one chain: the rows are those of one.
  const RowRange range = group.sum_experts
                             ? RowRange{int64_t{place.row_tile} * kRows,
                                        rows_in_tile(group.rows - int64_t{place.row_tile} * kRows, kRows), 0, false}
                             : find_rows(group, static_cast<int>(group.experts), place.row_tile, kRows);
  if (range.count == 0) return;
  const int64_t column = int64_t{place.column_tile} * kTileColumns<T, kRows>;
  LinearGradXFeed<T, kRows, kPath != Path::kAnywhere> feed(group, range, column);
  LinearProduct<T, kRows, Along::kReduction, Along::kWidth, kPath> product(
      range.count, rows_in_tile(group.in - column, kTileColumns<T, kRows>));
  walk<T, kRows>(shared, range.idle ? 0 : feed.tiles(), feed, product);
  keep_sums<T, kRows>(shared, product);
  LinearGradXFinish<T, kRows>{group, range, shared, column, p.fast_result[place.group]}.run();
}

// ---- gradient of the matrices: left are rows of grad_y, right rows of x; the reduction runs over the rows ----------

// One factor: the chunks that a thread copies of the tile's rows. Which rows these are is read one tile ahead.
template <class T, int kWidth, bool kFast>
class GatheredSteps {
  using Steps = WidthRows<T, kWidth>;

 public:
  __device__ __forceinline__ GatheredSteps(const ConstRows& rows, int64_t expert_offset, int64_t column, int64_t width)
      : index_(rows.index), stride_(rows.stride) {
    const int64_t at = column + Steps::chunk() * kChunk<T>;
    left_ = width - at;
    data_ = static_cast<const T*>(rows.data) + expert_offset + (left_ > 0 ? at : 0);
  }

  __device__ __forceinline__ void look(int64_t step, int64_t end) {
#pragma unroll
    for (int i = 0; i < Steps::kCount; ++i) {
      const int64_t n = step + Steps::number(i);
      row_[i] = n < end ? static_cast<int32_t>(place_of(index_, n)) : -1;
    }
  }

  template <class Cells>
  __device__ __forceinline__ void copy(Cells& cells, int base) const {
#pragma unroll
    for (int i = 0; i < Steps::kCount; ++i)
      copy_chunk<kFast>(cells, base + Steps::place(i), data_ + (row_[i] >= 0 ? row_[i] * stride_ : 0),
                        row_[i] >= 0 ? left_ : 0);
  }

 private:
  const int32_t* index_;
  const T* data_;  // this thread's chunk of row 0
  int64_t stride_, left_;
  int32_t row_[Steps::kCount];
};

template <class T, int kRows, bool kFast>
class LinearGradWeightFeed {
  using Tile = LinearTile<T, kRows>;

 public:
  GatheredSteps<T, kRows, kFast> left;
  GatheredSteps<T, kTileColumns<T, kRows>, kFast> right;
  int64_t next, end;  // rows

  __device__ __forceinline__ void look() {
    left.look(next, end);
    right.look(next, end);
  }
  template <class Cells>
  __device__ __forceinline__ void issue(Cells& cells, int stage) {
    left.copy(cells, stage * Tile::kStage);
    right.copy(cells, stage * Tile::kStage + Tile::kLeft);
    next += kTileSteps<T>;
    look();
  }
  template <class Cells>
  __device__ __forceinline__ void finish(Cells&, int) {}
};

template <class T, int kRows, Path kPath>
__global__ void __launch_bounds__(kLinearThreads, 2) linear_grad_weight_kernel(LinearLaunch<LinearGradWeightGroup> p) {
  auto& shared = shared_memory<LinearShared<T, kRows>>();
  const BlockPlace place = find_block(p);
  const LinearGradWeightGroup& group = p.groups[place.group];
  const auto row_tiles = static_cast<unsigned>(pieces(group.out, kRows));
  const int expert = static_cast<int>(place.row_tile / row_tiles);
  const int64_t output = int64_t{place.row_tile % row_tiles} * kRows;
  const int64_t column = int64_t{place.column_tile} * kTileColumns<T, kRows>;
  const int64_t begin = group.offsets ? load(group.offsets + expert) : 0;
  const int64_t end = group.offsets ? load(group.offsets + expert + 1) : has_rows(group.used, expert) ? group.rows : 0;
  assert(0 <= begin && begin <= end && end <= group.rows);
  const MatrixPiece piece{(expert * group.out + output) * group.in + column, group.out - output, group.in - column,
                          group.in};

  LinearGradWeightFeed<T, kRows, kPath != Path::kAnywhere> feed{
      {group.grad_y, expert * group.grad_y_expert_stride, output, group.out},
      {group.x, expert * group.x_expert_stride, column, group.in},
      begin,
      end};
  feed.look();
  LinearProduct<T, kRows, Along::kWidth, Along::kWidth, kPath> product(
      rows_in_tile(piece.rows, kRows), rows_in_tile(piece.columns, kTileColumns<T, kRows>));
  walk<T, kRows>(shared, pieces(end - begin, kTileSteps<T>), feed, product);
  if (group.accumulate) return add_matrix(product, piece, static_cast<accumulator_t<T>*>(group.grad_weight));
  keep_sums<T, kRows>(shared, product);
  store_matrix<T, kRows>(shared, piece, static_cast<T*>(group.grad_weight), p.fast_result[place.group]);
}

}  // namespace micro_kernels::cuda
