#pragma once
// Operations of one whole warp, on shuffles.

#include <cuda_runtime.h>

namespace micro_kernels::cuda {

inline constexpr int kWarp = 32;
inline constexpr unsigned kAllLanes = 0xffffffffu;

// The same sum in every lane, in the same order of additions whatever the launch.
template <class T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int width = kWarp / 2; width > 0; width /= 2) value += __shfl_xor_sync(kAllLanes, value, width);
  return value;
}

template <class T>
__device__ __forceinline__ T warp_max(T value) {
#pragma unroll
  for (int width = kWarp / 2; width > 0; width /= 2) {
    const T other = __shfl_xor_sync(kAllLanes, value, width);
    value = other > value ? other : value;
  }
  return value;
}

}  // namespace micro_kernels::cuda
