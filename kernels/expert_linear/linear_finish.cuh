#pragma once
// What happens to finished sums: rounded to the element type they go into shared memory, and from there row by row,
// in chunks of 16 bytes, through what was asked for to where they belong.

#include "common/cuda/math.cuh"
#include "expert_linear/linear_products.cuh"

namespace micro_kernels::cuda {

template <class T, int kRows>
__device__ __forceinline__ int finished_place(int row, int column) {
  return width_major<T, kTileColumns<T, kRows>>(row, column / kChunk<T>) + column % kChunk<T>;
}

// Ends with a barrier. Begins where a walk has ended.
template <class T, int kRows, class Product>
__device__ __forceinline__ void keep_sums(LinearShared<T, kRows>& shared, const Product& product) {
  if constexpr (sizeof(T) == 2) {
    product.each_pair([&](int row, int column, float a, float b) {
      Vec<T, 2> pair;
      pair[0] = T(a);
      pair[1] = T(b);
      shared.cells.template store_vec<2>(finished_place<T, kRows>(row, column), pair);
    });
  } else {
    product.each([&](int row, int column, T sum) { shared.cells.store(finished_place<T, kRows>(row, column), sum); });
  }
  __syncthreads();
}

// A chunk's values in the accumulator type.
template <class T>
struct Wide {
  accumulator_t<T> v[kChunk<T>];
};

template <class T>
__device__ __forceinline__ Wide<T> widen(const Vec<T, kChunk<T>>& chunk) {
  Wide<T> wide;
#pragma unroll
  for (int i = 0; i < kChunk<T>; ++i) wide.v[i] = static_cast<accumulator_t<T>>(chunk[i]);
  return wide;
}
template <class T, int kRows>
__device__ __forceinline__ Wide<T> finished_chunk(const LinearShared<T, kRows>& shared, int row, int chunk) {
  return widen<T>(shared.cells.template load_vec<kChunk<T>>(width_major<T, kTileColumns<T, kRows>>(row, chunk)));
}
// To the element type and back. Two of 16 bits are converted by one instruction if they come as a pair.
template <class T>
__device__ __forceinline__ void round(Wide<T>& wide) {
  using Acc = accumulator_t<T>;
  if constexpr (std::is_same_v<T, BFloat16>) {
#pragma unroll
    for (int i = 0; i < kChunk<T>; i += 2) {
      Vec<T, 2> pair{T(wide.v[i]), T(wide.v[i + 1])};  // not const: nvcc 13.0 would evaluate the cast, and fails
      auto word = __builtin_bit_cast(uint32_t, pair);
      wide.v[i] = __builtin_bit_cast(float, word << 16);
      wide.v[i + 1] = __builtin_bit_cast(float, word & 0xffff0000u);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kChunk<T>; ++i) wide.v[i] = static_cast<Acc>(T(wide.v[i]));
  }
}

// Elements [0, left) of a chunk; the others are 0.
template <class T>
__device__ __forceinline__ Wide<T> load_chunk(const T* from, int64_t left, bool fast) {
  if (fast) return widen<T>(load_vec<kChunk<T>>(from));
  Wide<T> wide;
#pragma unroll
  for (int i = 0; i < kChunk<T>; ++i) wide.v[i] = i < left ? static_cast<accumulator_t<T>>(load(from + i)) : 0;
  return wide;
}
template <class T>
__device__ __forceinline__ void store_chunk(T* to, const Wide<T>& wide, int64_t left, bool fast) {
  if (fast) {
    Vec<T, kChunk<T>> chunk;
#pragma unroll
    for (int i = 0; i < kChunk<T>; ++i) chunk[i] = T(wide.v[i]);
    store_vec<kChunk<T>>(to, chunk);
    return;
  }
#pragma unroll
  for (int i = 0; i < kChunk<T>; ++i)
    if (i < left) store(to + i, T(wide.v[i]));
}

__device__ __forceinline__ int64_t place_of(const int32_t* index, int64_t row) {
  return index ? load(index + row) : row;
}

template <class T>
__device__ __forceinline__ const T* row_of(const ConstRows& rows, int64_t row) {
  return static_cast<const T*>(rows.data) + place_of(rows.index, row) * rows.stride;
}

// ---- forward -------------------------------------------------------------------------------------------------------

// Which chunks of the finished tile a thread has: always the same columns, of every kStep-th row.
template <class T, int kRows, bool kGated>
struct FinishedChunks {
  static constexpr int kChunks = kTileColumns<T, kRows> / kChunk<T> / (kGated ? 2 : 1);
  static constexpr int kStep = kLinearThreads / kChunks;

  // Gated, eight lanes take half as many chunks of two rows: chunks of gate alone meet in half of the banks.
  __device__ static int row() {
    const int thread = static_cast<int>(threadIdx.x);
    return kGated ? thread / (2 * kChunks) * 2 + thread / 4 % 2 : thread / kChunks;
  }
  __device__ static int chunk() {
    const int thread = static_cast<int>(threadIdx.x);
    return kGated ? thread % (2 * kChunks) / 8 * 4 + thread % 4 : thread % kChunks;
  }
};

// A gated unit's tile holds columns of gate and up in turn (kInterleave), so half as many outputs.
template <class T, int kRows, bool kGated>
class LinearFinish {
  using Acc = accumulator_t<T>;
  using Chunks = FinishedChunks<T, kRows, kGated>;

 public:
  __device__ __forceinline__ LinearFinish(const LinearGroup& group, const RowRange& range,
                                          const LinearShared<T, kRows>& shared, int64_t first_column, bool fast,
                                          const Remainder& positions)
      : group_(group),
        range_(range),
        shared_(shared),
        positions_(positions),
        column_(first_column + Chunks::chunk() * kChunk<T>),
        left_(group.out - column_),
        fast_(fast) {
    y_ = static_cast<T*>(group.y.data) + range.expert * group.y_expert_stride;
    if (group.y_head_stride) {
      const auto width = static_cast<unsigned>(group.head_dim), at = static_cast<unsigned>(column_);
      inside_ = static_cast<int>(at % width);
      y_ += int64_t{at / width} * group.y_head_stride + inside_;
    } else {
      y_ += column_;
    }
  }

  __device__ __forceinline__ void run() const {
    if (left_ <= 0) return;
#pragma unroll 1
    for (int row = Chunks::row(); row < range_.count; row += Chunks::kStep) one(row);
  }

 private:
  __device__ __forceinline__ void one(int row) const {
    const int64_t n = range_.first + row;
    Wide<T> values{};
    if (!range_.idle) {
      values = kGated ? gated(row) : finished_chunk(shared_, row, Chunks::chunk());
      if (group_.cos) rotate(values, n, row);
      if (group_.residual.data) {
        const Wide<T> residual = load_chunk(row_of<T>(group_.residual, n) + column_, left_, fast_);
        each(values, [&](int i) { return residual.v[i] + values.v[i]; });
      }
      if (group_.scale.data) {
        const Acc scale = static_cast<Acc>(load(row_of<T>(group_.scale, n)));
        each(values, [&](int i) { return values.v[i] * scale + Acc(0); });  // + 0: so a sum over experts begins
      }
    }
    put(values, y_ + place_of(group_.y.index, n) * group_.y.stride);
  }

  template <class Body>
  __device__ __forceinline__ static void each(Wide<T>& values, const Body& body) {
#pragma unroll
    for (int i = 0; i < kChunk<T>; ++i) values.v[i] = body(i);
    round<T>(values);
  }

  __device__ __forceinline__ Wide<T> gated(int row) const {
    constexpr int kGroup = kInterleave / kChunk<T>;
    const int chunk = Chunks::chunk(), first = chunk / kGroup * 2 * kGroup + chunk % kGroup;
    Wide<T> values = finished_chunk(shared_, row, first);
    const Wide<T> up = finished_chunk(shared_, row, first + kGroup);
    each(values, [&](int i) { return values.v[i] * sigmoid(values.v[i]) * up.v[i]; });
    return values;
  }

  // A head's other half lies in the same tile.
  __device__ __forceinline__ void rotate(Wide<T>& values, int64_t n, int row) const {
    const int half = static_cast<int>(group_.head_dim) / 2, chunk = Chunks::chunk();
    const int inside = chunk * kChunk<T> & (2 * half - 1);
    const bool low = inside < half;
    const Wide<T> other = finished_chunk(shared_, row, low ? chunk + half / kChunk<T> : chunk - half / kChunk<T>);
    const int64_t position = position_of(n);
    assert(position >= 0 && position < group_.positions);
    const int64_t angle = position * half + (low ? inside : inside - half);
    const Acc* cos = static_cast<const Acc*>(group_.cos) + angle;
    const Acc* sin = static_cast<const Acc*>(group_.sin) + angle;
    each(values, [&](int i) {
      const Acc turned = other.v[i] * load(sin + i);
      return low ? values.v[i] * load(cos + i) - turned : values.v[i] * load(cos + i) + turned;
    });
  }

  // A row of zeros turns anywhere.
  __device__ __forceinline__ int64_t position_of(int64_t n) const {
    const int64_t source = place_of(group_.x.index, n);
    if (source < 0) return 0;
    return group_.position ? load(group_.position + source) : positions_.of(static_cast<uint32_t>(source));
  }

  __device__ __forceinline__ void put(const Wide<T>& values, T* to) const {
    if (!group_.y_head_stride || fast_) return store_chunk(to, values, left_, fast_);
    int inside = inside_;
#pragma unroll
    for (int i = 0; i < kChunk<T>; ++i) {
      if (i < left_) store(to, T(values.v[i]));
      ++to;
      if (++inside == group_.head_dim) {
        to += group_.y_head_stride - group_.head_dim;
        inside = 0;
      }
    }
  }

  const LinearGroup& group_;
  const RowRange& range_;
  const LinearShared<T, kRows>& shared_;
  const Remainder& positions_;
  int64_t column_, left_;  // of this thread's chunk
  bool fast_;
  T* y_;            // row 0 at this thread's column
  int inside_ = 0;  // that column in its head
};

// ---- gradient of x -------------------------------------------------------------------------------------------------

template <class T, int kRows>
struct LinearGradXFinish {
  using Acc = accumulator_t<T>;
  using Chunks = FinishedChunks<T, kRows, false>;
  const LinearGradXGroup& group;
  const RowRange& range;
  LinearShared<T, kRows>& shared;
  int64_t column;  // of the tile's first output
  bool fast;

  __device__ void run() const {
    const int64_t at = column + Chunks::chunk() * kChunk<T>;
    if (at >= group.in) return;
#pragma unroll 1
    for (int row = Chunks::row(); row < range.count; row += Chunks::kStep) one(row, at, group.in - at);
  }

  __device__ __forceinline__ void one(int row, int64_t at, int64_t left) const {
    const int64_t place = range.expert * group.grad_x_expert_stride +
                          place_of(group.grad_x.index, range.first + row) * group.grad_x.stride + at;
    const Wide<T> grad = range.idle ? Wide<T>{} : finished_chunk(shared, row, Chunks::chunk());
    if (!group.gate) return store_chunk(static_cast<T*>(group.grad_x.data) + place, grad, left, fast);
    const Wide<T> gate = range.idle ? Wide<T>{} : load_chunk(static_cast<const T*>(group.gate) + place, left, fast);
    const Wide<T> up = range.idle ? Wide<T>{} : load_chunk(static_cast<const T*>(group.up) + place, left, fast);
    Wide<T> grad_gate, grad_up, activation;
#pragma unroll
    for (int i = 0; i < kChunk<T>; ++i) {
      const Acc g = gate.v[i], s = sigmoid(g);
      grad_gate.v[i] = grad.v[i] * up.v[i] * s * (Acc(1) + g * (Acc(1) - s));
      grad_up.v[i] = grad.v[i] * (g * s);
      activation.v[i] = g * s * up.v[i];
    }
    store_chunk(static_cast<T*>(group.grad_gate) + place, grad_gate, left, fast);
    store_chunk(static_cast<T*>(group.grad_up) + place, grad_up, left, fast);
    if (group.activation) store_chunk(static_cast<T*>(group.activation) + place, activation, left, fast);
  }
};

// ---- gradient of the matrices --------------------------------------------------------------------------------------

// Rows of the tile are outputs, columns inputs: one piece of one expert's matrix.
struct MatrixPiece {
  int64_t first;  // element of grad_weight where the piece begins
  int64_t rows, columns, stride;
};

template <class T, int kRows>
__device__ inline void store_matrix(const LinearShared<T, kRows>& shared, const MatrixPiece& piece, T* to, bool fast) {
  using Chunks = FinishedChunks<T, kRows, false>;
  const int column = Chunks::chunk() * kChunk<T>;
  const int64_t left = piece.columns - column;
  if (left <= 0) return;
#pragma unroll 1
  for (int row = Chunks::row(); row < kRows && row < piece.rows; row += Chunks::kStep)
    store_chunk(to + piece.first + row * piece.stride + column, finished_chunk(shared, row, Chunks::chunk()), left,
                fast);
}

template <class Acc, class Product>
__device__ __forceinline__ void add_matrix(const Product& product, const MatrixPiece& piece, Acc* to) {
  product.each([&](int row, int column, Acc sum) {
    if (row >= piece.rows || column >= piece.columns) return;
    Acc* at = to + piece.first + row * piece.stride + column;
    store(at, load(at) + sum);
  });
}

}  // namespace micro_kernels::cuda
