#pragma once
// The loops over one row of the norm, one set per instruction set. bfloat16 travels as its bits.

#include <cstdint>

namespace micro_kernels::cpu {

constexpr int64_t kNormCopies = 8;  // rows of y that one pass over a row of x makes

// Some rows of y that share a row of x; `y` is grad_y in the backward.
template <class T>
struct NormCopies {
  T* y[kNormCopies];
  const T* gain[kNormCopies];
  int64_t count;
};

template <class T, class Acc>
struct RmsNormLoop {
  Acc (*sum_of_squares)(const T* x, int64_t hidden);
  // y = x * scale * gain, rounded once, or in front of the gain too.
  void (*apply)(const T* x, Acc scale, const NormCopies<T>& copies, int64_t hidden, bool round_before_gain);
  // g = grad_y * gain, added up over the copies; added to what g holds on demand.
  void (*add_gained)(const NormCopies<const T>& copies, Acc* g, int64_t hidden, bool add);
  // grad_x = scale * (g - x * scale^2 * mean(g * x))
  void (*backward)(const T* x, const Acc* g, Acc scale, T* grad_x, int64_t hidden);
  // sum += grad_y * x * scale
  void (*add_gain_gradient)(const T* grad_y, const T* x, Acc scale, Acc* sum, int64_t columns);
};

struct RmsNormLoops {
  RmsNormLoop<float, float> float32;
  RmsNormLoop<double, double> float64;
  RmsNormLoop<uint16_t, float> bfloat16;
};

extern const RmsNormLoops kRmsNormPlain;
extern const RmsNormLoops kRmsNormAvx2;
extern const RmsNormLoops kRmsNormAvx512;

}  // namespace micro_kernels::cpu
