#pragma once
// The loops over one row of the weighted sum, one set per instruction set. bfloat16 travels as its bits.

#include <cstdint>

namespace micro_kernels::cpu {

// A row of y and the weight that it has for its token.
template <class T, class Acc>
struct WeightedRow {
  const T* y;
  Acc weight;
};

template <class T, class Acc>
struct CombineLoop {
  // out = sum of round(y * weight) over the rows in their order, each sum rounded; 0 without rows.
  void (*sum)(const WeightedRow<T, Acc>* rows, int64_t count, T* out, int64_t hidden);
  Acc (*dot)(const T* a, const T* b, int64_t hidden);
  // to = from * weight
  void (*scale)(const T* from, Acc weight, T* to, int64_t hidden);
};

struct CombineLoops {
  CombineLoop<float, float> float32;
  CombineLoop<double, double> float64;
  CombineLoop<uint16_t, float> bfloat16;
};

extern const CombineLoops kCombinePlain;
extern const CombineLoops kCombineAvx2;
extern const CombineLoops kCombineAvx512;

}  // namespace micro_kernels::cpu
