#pragma once
// Sums of squares, one set of loops per instruction set.

#include <cstdint>

namespace micro_kernels::cpu {

struct SquareSums {
  double (*float32)(const float* values, int64_t size);
  double (*float64)(const double* values, int64_t size);
  double (*bfloat16)(const uint16_t* values, int64_t size);
};

extern const SquareSums kSquareSumsPlain;
extern const SquareSums kSquareSumsAvx2;
extern const SquareSums kSquareSumsAvx512;

}  // namespace micro_kernels::cpu
