#pragma once
// One step of AdamW with decoupled weight decay (Loshchilov and Hutter 2019, algorithm 2), in place, over many tensors:
//   g = gradient_scale * gradient;   m = beta1 m + (1 - beta1) g;   v = beta2 v + (1 - beta2) g^2
//   value = value (1 - learning_rate weight_decay) - learning_rate (m / c1) / (sqrt(v / c2) + eps),   c = 1 - beta^step

#include <cstdint>

#include "micro_kernels/dtype.h"
#include "micro_kernels/parallel.h"
#include "micro_kernels/status.h"

namespace micro_kernels {

struct AdamWTensor {
  void* parameter;       // [size]
  const void* gradient;  // [size], type of the parameter
  void* first_moment;    // [size], accumulator type
  void* second_moment;   // [size], accumulator type
  void* master;          // [size] float32: carries the value of a parameter of 16 bits; nullptr otherwise
  int64_t size;
  DType dtype;  // of the parameter
};

struct AdamWStepParams {
  const AdamWTensor* tensors;  // [count], on the host
  int64_t count;
  int64_t step;  // 1 for the first
  double learning_rate;
  double beta1;
  double beta2;
  double eps;
  double weight_decay;
  double gradient_scale;
};

namespace cpu {
Status adamw_step(const AdamWStepParams& params, const ParallelFor& parallel_for);
}  // namespace cpu

namespace cuda {
Status adamw_step(const AdamWStepParams& params, void* stream);
}  // namespace cuda

}  // namespace micro_kernels
