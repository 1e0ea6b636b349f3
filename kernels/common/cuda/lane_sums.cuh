#pragma once
// Sums of several values at once.

#include <cuda_runtime.h>

#include "common/cuda/warp.cuh"

namespace micro_kernels::cuda {

// Sums of kValues (a power of two) values over the lanes of a warp; lane l is left with that of value
// l / (kWarp / kValues). Each exchange halves the values that a lane still adds: 16 sums take 16 shuffles, not 80.
template <int kValues, int kHalf = kValues / 2, class T>
__device__ T sum_of_lane(T (&values)[kValues]) {
  if constexpr (kHalf > 0) {
    constexpr int width = kHalf * (kWarp / kValues);
    const bool upper = (threadIdx.x & width) != 0;
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const T kept = upper ? values[kHalf + i] : values[i], given = upper ? values[i] : values[kHalf + i];
      values[i] = kept + __shfl_xor_sync(kAllLanes, given, width);
    }
    return sum_of_lane<kValues, kHalf / 2>(values);
  } else {
    T value = values[0];
#pragma unroll
    for (int width = kWarp / kValues / 2; width > 0; width /= 2) value += __shfl_xor_sync(kAllLanes, value, width);
    return value;
  }
}

}  // namespace micro_kernels::cuda
