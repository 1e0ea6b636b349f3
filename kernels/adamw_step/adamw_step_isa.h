#pragma once
// The inner loops of AdamW, one set per instruction set.

#include <cstdint>

#include "adamw_step/adamw_factors.h"

namespace micro_kernels::cpu {

// All update `size` elements in one pass. bfloat16: `value` is the float32 master, `parameter` its rounding.
struct AdamWLoops {
  void (*float32)(const float* gradient, float* first, float* second, float* value, int64_t size,
                  const AdamWFactors<float>& factors);
  void (*float64)(const double* gradient, double* first, double* second, double* value, int64_t size,
                  const AdamWFactors<double>& factors);
  void (*bfloat16)(const uint16_t* gradient, float* first, float* second, float* value, uint16_t* parameter,
                   int64_t size, const AdamWFactors<float>& factors);
};

extern const AdamWLoops kAdamWPlain;
extern const AdamWLoops kAdamWAvx2;
extern const AdamWLoops kAdamWAvx512;

}  // namespace micro_kernels::cpu
