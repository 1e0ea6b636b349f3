#pragma once
// The sum of a token's rows, one function per instruction set. bfloat16 travels as its bits.

#include <cstdint>

namespace micro_kernels::cpu {

// out = sum of the rows in their order, in the accumulator type, rounded once; 0 without rows.
template <class T>
using RowSum = void (*)(const T* const* rows, int64_t count, T* out, int64_t hidden);

struct PermuteLoops {
  RowSum<float> float32;
  RowSum<double> float64;
  RowSum<uint16_t> bfloat16;
};

extern const PermuteLoops kPermutePlain;
extern const PermuteLoops kPermuteAvx2;
extern const PermuteLoops kPermuteAvx512;

}  // namespace micro_kernels::cpu
