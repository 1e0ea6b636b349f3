#pragma once
// Plain loops that the compiler turns into vectors, compiled once per instruction set; unnamed and without the standard
// library for the reason that adamw_step_loop.h gives. Sixteen partial sums: the same result in every set.

#include "gradient_norm/gradient_norm_isa.h"

namespace micro_kernels::cpu {
namespace {

constexpr int kPartialSums = 16;

inline double wide(float value) { return value; }
inline double wide(double value) { return value; }
inline double wide(uint16_t bits) { return __builtin_bit_cast(float, static_cast<uint32_t>(bits) << 16); }

template <class T>
double square_sum(const T* values, int64_t size) {
  double sum[kPartialSums] = {};
  int64_t i = 0;
  for (; i + kPartialSums <= size; i += kPartialSums)
    for (int j = 0; j < kPartialSums; ++j) sum[j] += wide(values[i + j]) * wide(values[i + j]);
  for (; i < size; ++i) sum[0] += wide(values[i]) * wide(values[i]);
  double total = 0;
  for (int j = 0; j < kPartialSums; ++j) total += sum[j];
  return total;
}

constexpr SquareSums kSums = {square_sum<float>, square_sum<double>, square_sum<uint16_t>};

}  // namespace
}  // namespace micro_kernels::cpu
