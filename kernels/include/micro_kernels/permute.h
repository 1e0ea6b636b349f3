#pragma once
// Token rows to plan order, and the gradient back:
//   y[n] = x[tokens[n]] for n < offsets[E], 0 for idle rows
//   grad_x[t] = sum_i grad_y[inverse[t, i]] over active pairs, i ascending

#include <cstdint>

#include "micro_kernels/dtype.h"
#include "micro_kernels/parallel.h"
#include "micro_kernels/status.h"

namespace micro_kernels {

struct PermuteParams {
  const void* x;           // [token_count, hidden]
  const int32_t* tokens;   // [rows], values in [0, token_count)
  const int32_t* offsets;  // [experts + 1]; the last is the number of active rows
  void* y;                 // [rows, hidden]
  int64_t token_count;
  int64_t rows;
  int64_t hidden;
  int64_t experts;
  DType dtype;
};

struct PermuteBackwardParams {
  const void* grad_y;      // [token_count * k, hidden]
  const int32_t* offsets;  // [experts + 1]
  const int32_t* inverse;  // [token_count, k], values in [0, token_count * k)
  void* grad_x;            // [token_count, hidden]
  int64_t token_count;
  int64_t k;
  int64_t hidden;
  int64_t experts;
  DType dtype;
};

// An index outside its range is kIndexOutOfRange on the CPU and a device assertion on CUDA.
namespace cpu {
Status permute(const PermuteParams& params, const ParallelFor& parallel_for);
Status permute_backward(const PermuteBackwardParams& params, const ParallelFor& parallel_for);
}  // namespace cpu

namespace cuda {
Status permute(const PermuteParams& params, void* stream);
Status permute_backward(const PermuteBackwardParams& params, void* stream);
}  // namespace cuda

}  // namespace micro_kernels
