#pragma once
// What the losses over routing decisions share: a mask over tokens, and the softmax over a handful of experts.

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "micro_kernels/dtype.h"

namespace micro_kernels::cpu {

template <class T>
double wide_value(T value) {
  return static_cast<double>(static_cast<accumulator_t<T>>(value));
}

inline bool is_real(const bool* mask, int64_t token) { return !mask || mask[token]; }

// Number of real tokens, at least 1: it only ever divides.
inline double real_tokens(const bool* mask, int64_t tokens) {
  if (!mask) return static_cast<double>(std::max<int64_t>(1, tokens));
  return static_cast<double>(std::max<int64_t>(1, std::count(mask, mask + tokens, true)));
}

// log sum_e exp(z[e]), in double because E is small and sums over many tokens follow. -inf for a row of -inf.
template <class T>
double log_sum_exp(const T* z, int64_t experts) {
  double top = -INFINITY;
  for (int64_t e = 0; e < experts; ++e) {
    const double value = wide_value(z[e]);
    if (std::isnan(value)) return value;
    top = std::max(top, value);
  }
  if (std::isinf(top)) return top;
  double sum = 0;
  for (int64_t e = 0; e < experts; ++e) sum += std::exp(wide_value(z[e]) - top);
  return top + std::log(sum);
}

}  // namespace micro_kernels::cpu
