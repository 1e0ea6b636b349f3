#pragma once
// A row's elements in vectors of 16 bytes, for kernels in which one thread takes whole vectors. Where a row does not
// lie on vectors (in_vectors of rows.cuh) the same thread moves the same elements one by one, so that no result depends
// on where the row lies.

#include <cstdint>

#include "common/cuda/memory.cuh"
#include "common/cuda/rows.cuh"

namespace micro_kernels::cuda {

template <class T>
using Neighbours = Vec<T, kVector<T>>;

// The elements from `first` on; `rest` behind the row's end.
template <class T>
__device__ __forceinline__ Neighbours<T> load_neighbours(const T* row, int64_t first, int64_t count, bool in_vectors,
                                                         T rest) {
  if (in_vectors) return load_vec<kVector<T>>(row + first);
  Neighbours<T> values;
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i) values[i] = first + i < count ? load(row + first + i) : rest;
  return values;
}

// Those behind the row's end are dropped.
template <class T>
__device__ __forceinline__ void store_neighbours(T* row, int64_t first, int64_t count, bool in_vectors,
                                                 const Neighbours<T>& values) {
  if (in_vectors) {
    store_vec(row + first, values);
    return;
  }
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i)
    if (first + i < count) store(row + first + i, values[i]);
}

}  // namespace micro_kernels::cuda
