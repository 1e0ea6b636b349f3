#pragma once
// Every access of a kernel to global and shared memory. On a device these are plain loads and stores; the emulator
// checks each one: bounds, alignment, whether the memory was ever written, and whether a barrier stands between two
// threads that touch the same word.

#include <cstdint>

#include "micro_kernels/dtype.h"

#ifdef MICRO_EMULATED
#include "emu/memory.h"
#else

#include "common/cuda/arch/store.cuh"

namespace micro_kernels::cuda {

// N neighbours, moved by one instruction: sizeof(T) * N is 2, 4, 8 or 16 bytes, and so is the address's alignment.
template <class T, int N>
struct alignas(sizeof(T) * N) Vec {
  static_assert(sizeof(T) * N <= 16);
  T v[N];
  __device__ T& operator[](int i) { return v[i]; }
  __device__ const T& operator[](int i) const { return v[i]; }
};

template <class T, int N>
using VecWord = typename Word<static_cast<int>(sizeof(T)) * N>::type;

template <class T>
__device__ __forceinline__ T load(const T* address) {
  return *address;
}
template <class T>
__device__ __forceinline__ void store(T* address, T value) {
  *address = value;
}
template <int N, class T>
__device__ __forceinline__ Vec<T, N> load_vec(const T* address) {
  return __builtin_bit_cast(Vec<T, N>, *reinterpret_cast<const VecWord<T, N>*>(address));
}
template <int N, class T>
__device__ __forceinline__ void store_vec(T* address, const Vec<T, N>& value) {
  store_global(address, __builtin_bit_cast(VecWord<T, N>, value));
}

// An array in shared memory: a member of the struct that shared_memory<>() returns.
template <class T, int N>
struct alignas(16) SharedArray {
  T data[N];

  __device__ __forceinline__ T load(int i) const { return data[i]; }
  __device__ __forceinline__ void store(int i, T value) { data[i] = value; }
  template <int M>
  __device__ __forceinline__ Vec<T, M> load_vec(int i) const {
    return __builtin_bit_cast(Vec<T, M>, *reinterpret_cast<const VecWord<T, M>*>(data + i));
  }
  template <int M>
  __device__ __forceinline__ void store_vec(int i, const Vec<T, M>& value) {
    store_shared(data + i, __builtin_bit_cast(VecWord<T, M>, value));
  }
  // For copy_async and load_matrix (arch/): the address of `count` neighbours.
  __device__ __forceinline__ T* at(int i, int) { return data + i; }
  __device__ __forceinline__ const T* at(int i, int) const { return data + i; }
};

// The block's shared memory, laid out as S; the launch brings sizeof(S) bytes. All kernels get it here.
template <class S>
__device__ __forceinline__ S& shared_memory() {
  extern __shared__ __align__(16) unsigned char micro_shared_bytes[];
  asm volatile("// micro_shared_bytes %0" ::"n"(sizeof(S)));  // a comment in the PTX, for `make gates`
  return *reinterpret_cast<S*>(micro_shared_bytes);
}

}  // namespace micro_kernels::cuda

#endif
