#pragma once
// One weight matrix per expert, rows in plan order (model.md 2.6):
//   y[n, o] = sum_i weight[e(n), o, i] * x[n, i],   offsets[e] <= n < offsets[e + 1]

#include <cstdint>

#include "micro_kernels/dtype.h"
#include "micro_kernels/parallel.h"
#include "micro_kernels/status.h"

namespace micro_kernels {

struct ExpertLinearParams {
  const void* x;           // [N, in]
  const void* weight;      // [E, out, in]
  const int32_t* offsets;  // [E + 1]; on the device of the tensors
  void* y;                 // [N, out]; idle rows are 0
  int64_t rows, experts, in, out;
  DType dtype;
};

struct ExpertLinearBackwardParams {
  const void* grad_y;      // [N, out]
  const void* x;           // [N, in]
  const void* weight;      // [E, out, in]
  const int32_t* offsets;  // [E + 1]
  void* grad_x;            // [N, in], or nullptr: not wanted
  void* grad_weight;       // [E, out, in], or nullptr: not wanted
  int64_t rows, experts, in, out;
  DType dtype;
};

// Rows of one weight matrix: what the CPU's few-rows kernel works on.
struct LinearRows {
  const void* x;       // [rows, in]
  const void* weight;  // [out, in]
  void* y;             // [rows, out]
  int64_t rows;
};

// On the CPU, products of many rows are the business of LibTorch's BLAS, and few rows that of this kernel: it streams
// each weight once, whatever the number of rows, and adds in the same order for every number of rows and threads.
namespace cpu {
// More rows than this are faster as a matrix product (benchmarks/python/bench_expert_linear.py).
constexpr int64_t kFewRows = 8;

// `parts` is an array of `count`; their y do not overlap. Any number of rows is right.
Status few_rows_linear(const LinearRows* parts, int64_t count, int64_t in, int64_t out, DType dtype,
                       const ParallelFor& parallel_for);
}  // namespace cpu

namespace cuda {
Status expert_linear(const ExpertLinearParams& params, void* stream);
Status expert_linear_backward(const ExpertLinearBackwardParams& params, void* stream);
}  // namespace cuda

}  // namespace micro_kernels
