#pragma once
// Functions that several kernels must compute in the same way, to the last bit.

#include <cuda_runtime.h>

namespace micro_kernels::cuda {

// Without overflow on either side: exp is only ever asked for numbers <= 0.
template <class Acc>
__device__ __forceinline__ Acc sigmoid(Acc x) {
  const Acc e = exp(-fabs(x));
  return (x < Acc(0) ? e : Acc(1)) / (e + Acc(1));
}

}  // namespace micro_kernels::cuda
