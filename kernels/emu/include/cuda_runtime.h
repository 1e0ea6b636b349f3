#pragma once
// What the CUDA sources find as <cuda_runtime.h> when they are compiled for the emulator: the words of the language as
// plain C++, and the few functions of the runtime that launchers use.

#include <math.h>

#include <cstddef>
#include <cstdint>

#include "emu/machine.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

// Set by the machine whenever another thread goes on.
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

// ---- barriers and warp operations ----------------------------------------------------------------------------------

#define MICRO_EMU_SITE int line = __builtin_LINE(), const char *file = __builtin_FILE()
#define MICRO_EMU_HERE \
  micro_kernels::emu::Site { file, line }

inline void __syncthreads(MICRO_EMU_SITE) { micro_kernels::emu::block_barrier(MICRO_EMU_HERE); }
inline void __syncwarp(unsigned mask = 0xffffffffu, MICRO_EMU_SITE) {
  micro_kernels::emu::warp_barrier(mask, MICRO_EMU_HERE);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, MICRO_EMU_SITE) {
  return micro_kernels::emu::shuffle(mask, value, MICRO_EMU_HERE,
                                     [=](int lane) { return (lane & ~(width - 1)) | (source & (width - 1)); });
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int other, int width = 32, MICRO_EMU_SITE) {
  return micro_kernels::emu::shuffle(mask, value, MICRO_EMU_HERE, [=](int lane) {
    const int source = lane ^ other;
    return source < (lane & ~(width - 1)) + width ? source : lane;
  });
}
inline unsigned __ballot_sync(unsigned mask, int predicate, MICRO_EMU_SITE) {
  return micro_kernels::emu::ballot(mask, predicate != 0, MICRO_EMU_HERE);
}
inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline double __dmul_rn(double a, double b) { return a * b; }

// ---- launches ------------------------------------------------------------------------------------------------------

enum cudaError_t {
  cudaSuccess,
  cudaErrorInvalidValue,
  cudaErrorInsufficientDriver,
  cudaErrorNoDevice,
  cudaErrorNoKernelImageForDevice
};
namespace emu {
inline int driver_version = 0;  // what the driver would say; 0: there is none
}
inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = emu::driver_version;
  return cudaSuccess;
}
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
using cudaStream_t = struct CUstream_st*;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int bytes) {
  return bytes <= micro_kernels::emu::kMostSharedBytes ? cudaSuccess : cudaErrorInvalidValue;
}

template <class Params>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params), Params params) {
  const auto size = [](dim3 d) { return micro_kernels::emu::Size{d.x, d.y, d.z}; };
  const auto enter_block = [](micro_kernels::emu::Size block) { blockIdx = {block.x, block.y, block.z}; };
  const auto enter_thread = [](micro_kernels::emu::Size thread) { threadIdx = {thread.x, thread.y, thread.z}; };
  blockDim = config->blockDim;
  gridDim = config->gridDim;
  micro_kernels::emu::run({reinterpret_cast<const void*>(kernel), size(config->gridDim), size(config->blockDim),
                           config->dynamicSmemBytes, config->stream, enter_block, enter_thread,
                           [&] { kernel(params); }});
  return cudaSuccess;
}
