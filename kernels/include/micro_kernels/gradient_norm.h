#pragma once
// Global norm of many tensors: sqrt(sum_i g_i^2), squares and sums in double, added in a fixed order.

#include <cstdint>

#include "micro_kernels/dtype.h"
#include "micro_kernels/parallel.h"
#include "micro_kernels/status.h"

namespace micro_kernels {

struct GradientTensor {
  const void* gradient;  // [size]
  int64_t size;
  DType dtype;
};

struct GradientNormParams {
  const GradientTensor* tensors;  // [count], on the host
  int64_t count;
  double* norm;  // [1]
};

namespace cpu {
Status gradient_norm(const GradientNormParams& params, const ParallelFor& parallel_for);
}  // namespace cpu

namespace cuda {
int64_t gradient_norm_workspace(const GradientNormParams& params);  // bytes; depends on sizes only
Status gradient_norm(const GradientNormParams& params, void* workspace, void* stream);
}  // namespace cuda

}  // namespace micro_kernels
