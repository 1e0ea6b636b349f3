#pragma once
// Streaming count, mean and sum of squared deviations of rows, per expert and column, in float64 (Welford 1962; parts
// are joined as in Chan, Golub, LeVeque 1979). On the CPU rows are taken in one after the other, so that it makes no
// difference how they are cut into calls.

#include <cstdint>

#include "micro_kernels/dtype.h"
#include "micro_kernels/parallel.h"
#include "micro_kernels/status.h"

namespace micro_kernels {

struct MomentsParams {
  const void* x;          // [rows, width]
  const bool* touched;    // [rows]: which to take in; nullptr: all
  const int32_t* expert;  // [rows], read where the row is taken in; nullptr: 0
  double* count;          // [experts], added to, as what follows
  double* mean;           // [experts, width]
  double* m2;             // [experts, width]
  int64_t rows, width, experts;
  DType dtype;
};

// An expert outside its range is kIndexOutOfRange on the CPU and a device assertion on CUDA.
namespace cpu {
Status moments(const MomentsParams& params, const ParallelFor& parallel_for);
}  // namespace cpu

namespace cuda {
Status moments(const MomentsParams& params, void* stream);
}  // namespace cuda

}  // namespace micro_kernels
