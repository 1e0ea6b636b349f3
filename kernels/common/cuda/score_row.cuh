#pragma once
// The few numbers that one thread works on: the scores of one token, one per expert. Four of them live in registers
// and move by one instruction; any other number (width 0), and float64, is read from memory at each use and written to
// it at once.

#include <cstdint>

#include "common/cuda/memory.cuh"
#include "micro_kernels/dtype.h"

namespace micro_kernels::cuda {

inline constexpr int kFour = 4;

// Calls body.operator()<kFour>() where the rows of these arrays, in kernels of element type T, can move by one
// instruction, else body.operator()<0>(). An absent array (nullptr) is never moved.
template <class T, class Body, class... U>
auto dispatch_width(int64_t experts, Body&& body, const U*... arrays) {
  if constexpr (sizeof(accumulator_t<T>) <= sizeof(float)) {
    const auto aligned = []<class V>(const V* array) {
      return reinterpret_cast<uintptr_t>(array) % (sizeof(V) * kFour) == 0;
    };
    if (experts == kFour && (aligned(arrays) && ...)) return body.template operator()<kFour>();
  }
  return body.template operator()<0>();
}

// values[index] for an index that the compiler does not know: registers have no addresses.
template <class Acc, int kWidth>
__device__ Acc pick(const Acc (&values)[kWidth], int index) {
  Acc value = values[0];
#pragma unroll
  for (int e = 1; e < kWidth; ++e)
    if (e == index) value = values[e];
  return value;
}

// A row to read, in the type that sums are carried in.
template <class T, int kWidth>
class ScoreRow {
 public:
  __device__ ScoreRow(const T* from, int64_t) {
    const Vec<T, kWidth> row = load_vec<kWidth>(from);
#pragma unroll
    for (int e = 0; e < kWidth; ++e) values_[e] = static_cast<accumulator_t<T>>(row[e]);
  }
  __device__ int size() const { return kWidth; }
  __device__ accumulator_t<T> operator[](int e) const { return values_[e]; }
  __device__ accumulator_t<T> at(int index) const { return pick(values_, index); }

 private:
  accumulator_t<T> values_[kWidth];
};

template <class T>
class ScoreRow<T, 0> {
 public:
  __device__ ScoreRow(const T* from, int64_t count) : from_(from), count_(static_cast<int>(count)) {}
  __device__ int size() const { return count_; }
  __device__ accumulator_t<T> operator[](int e) const { return at(e); }
  __device__ accumulator_t<T> at(int index) const { return static_cast<accumulator_t<T>>(load(from_ + index)); }

 private:
  const T* from_;
  int count_;
};

// A row to write, and to read back while it is being made: every element is set once at least, then finish() is
// called. What is read back is not yet rounded to T where it still is in a register.
template <class T, int kWidth>
class NewScoreRow {
 public:
  using Acc = accumulator_t<T>;
  __device__ NewScoreRow(T* to, int64_t) : to_(to) {}
  __device__ int size() const { return kWidth; }
  __device__ Acc operator[](int e) const { return values_[e]; }
  __device__ void set(int e, Acc value) { values_[e] = value; }
  __device__ Acc at(int index) const { return pick(values_, index); }
  __device__ void add(int index, Acc value) {
#pragma unroll
    for (int e = 0; e < kWidth; ++e)
      if (e == index) values_[e] += value;
  }
  __device__ void finish() const {
    Vec<T, kWidth> row;
#pragma unroll
    for (int e = 0; e < kWidth; ++e) row[e] = T(values_[e]);
    store_vec<kWidth>(to_, row);
  }

 private:
  T* to_;
  Acc values_[kWidth];
};

template <class T>
class NewScoreRow<T, 0> {
 public:
  using Acc = accumulator_t<T>;
  __device__ NewScoreRow(T* to, int64_t count) : to_(to), count_(static_cast<int>(count)) {}
  __device__ int size() const { return count_; }
  __device__ Acc operator[](int e) const { return at(e); }
  __device__ void set(int e, Acc value) { store(to_ + e, T(value)); }
  __device__ Acc at(int index) const { return static_cast<Acc>(load(to_ + index)); }
  __device__ void add(int index, Acc value) { set(index, at(index) + value); }
  __device__ void finish() const {}

 private:
  T* to_;
  int count_;
};

template <class T, int kWidth>
__device__ void fill_zero(NewScoreRow<T, kWidth>& row) {
#pragma unroll
  for (int e = 0; e < row.size(); ++e) row.set(e, 0);
}

}  // namespace micro_kernels::cuda
