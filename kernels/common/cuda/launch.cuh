#pragma once
// The one place where kernels are started: a function call rather than <<<>>>, so that every C++ tool can read the
// callers, and so that the emulator and the launch record (performance.md C8) see each one.

#include <cuda_runtime.h>

#include <cstddef>

#include "micro_kernels/dtype.h"
#include "micro_kernels/status.h"

namespace micro_kernels::cuda {

// 0: there is no driver.
inline int driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

inline Status to_status(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return Status::kOk;
    case cudaErrorInsufficientDriver:
      return driver_version() == 0 ? Status::kNoDriver : Status::kOldDriver;
    case cudaErrorNoDevice:
      return Status::kNoDriver;
    case cudaErrorNoKernelImageForDevice:
      return Status::kNoImage;
    default:
      return Status::kLaunchFailed;
  }
}

// Shared memory above this needs the kernel's consent, given at each launch: it costs less than remembering it.
inline constexpr size_t kFreeSharedBytes = 48 * 1024;

// Starts `kernel` with `shared_bytes` of memory for shared_memory<>() (memory.cuh). A grid without blocks starts
// nothing: callers return before they ask.
template <class Params>
Status launch(void (*kernel)(Params), dim3 grid, dim3 block, size_t shared_bytes, void* stream, const Params& params) {
  if (shared_bytes > kFreeSharedBytes) {
    const cudaError_t error =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return to_status(error);
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  return to_status(cudaLaunchKernelEx(&config, kernel, params));
}

template <class Params>
Status launch(void (*kernel)(Params), dim3 grid, dim3 block, void* stream, const Params& params) {
  return launch(kernel, grid, block, 0, stream, params);
}

// Calls body.operator()<T>() with the element type of `dtype`: all that CUDA kernels compute in.
template <class Body>
auto dispatch_device(DType dtype, Body&& body) {
  if (dtype == DType::kFloat16) return body.template operator()<Float16>();
  return dispatch(dtype, body);
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace micro_kernels::cuda
