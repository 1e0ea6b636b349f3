#pragma once
// One row of the cross-entropy, compiled once per instruction set (simd.h says why nothing here may be shared). The row
// is widened into a scratch row that is padded with minus infinity, so that no loop over numbers has a tail.

#include "common/cpu/simd.h"
#include "cross_entropy/cross_entropy_isa.h"

namespace micro_kernels::cpu {
namespace {

template <class T>
inline void widen_row(const T* row, T* wide, int64_t n) {
  __builtin_memcpy(wide, row, static_cast<size_t>(n) * sizeof(T));
}

inline void widen_row(const uint16_t* row, float* wide, int64_t n) {
  int64_t v = 0;
  for (; v + kLanes<float> <= n; v += kLanes<float>) store(wide + v, load_bfloat16(row + v));
  for (; v < n; ++v) wide[v] = __builtin_bit_cast(float, static_cast<uint32_t>(row[v]) << 16);
}

template <class T>
inline void narrow_row(const T* wide, T* row, int64_t n) {
  __builtin_memcpy(row, wide, static_cast<size_t>(n) * sizeof(T));
}

inline void narrow_row(const float* wide, uint16_t* row, int64_t n) {
  int64_t v = 0;
  for (; v + kLanes<float> <= n; v += kLanes<float>) store_bfloat16(row + v, load(wide + v));
  if (v == n) return;
  uint16_t tail[kLanes<float>];
  store_bfloat16(tail, load(wide + v));  // inside the padding
  __builtin_memcpy(row + v, tail, static_cast<size_t>(n - v) * sizeof(uint16_t));
}

template <class Acc>
inline Acc largest(const Acc* wide, int64_t n) {
  Vec<Acc> best = load(wide);
  for (int64_t v = kLanes<Acc>; v < n; v += kLanes<Acc>) best = max<Acc>(best, load(wide + v));
  return max_lanes<Acc>(best);
}

// wide[v] = exp(wide[v] - top); returns the sum.
template <class Acc>
inline Acc exponentiate(Acc* wide, Acc top, int64_t n) {
  Vec<Acc> sum{};
  for (int64_t v = 0; v < n; v += kLanes<Acc>) {
    const Vec<Acc> term = exp<Acc>(load(wide + v) - top);
    store(wide + v, term);
    sum += term;
  }
  return sum_lanes<Acc>(sum);
}

template <class Acc>
inline void multiply(Acc* wide, Acc factor, int64_t n) {
  for (int64_t v = 0; v < n; v += kLanes<Acc>) store(wide + v, load(wide + v) * factor);
}

inline float logarithm(float x) { return __builtin_logf(x); }
inline double logarithm(double x) { return __builtin_log(x); }

template <class T, class Acc>
Acc cross_entropy_row(T* logits, int64_t vocabulary, int64_t target, bool write_gradient, Acc* wide) {
  constexpr Acc kMinusInfinity = -static_cast<Acc>(__builtin_inff());
  const int64_t padded = cross_entropy_scratch(vocabulary);
  widen_row(logits, wide, vocabulary);
  for (int64_t v = vocabulary; v < padded; ++v) wide[v] = kMinusInfinity;
  const Acc top = largest(wide, padded);
  const Acc below_top = wide[target] - top;
  const Acc sum = exponentiate(wide, top, padded);
  if (write_gradient) {
    multiply(wide, Acc(1) / sum, padded);
    wide[target] -= Acc(1);
    narrow_row(wide, logits, vocabulary);
  }
  return logarithm(sum) - below_top;
}

constexpr CrossEntropyRows kRows = {cross_entropy_row<float, float>, cross_entropy_row<double, double>,
                                    cross_entropy_row<uint16_t, float>};

}  // namespace
}  // namespace micro_kernels::cpu
