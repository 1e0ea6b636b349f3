#pragma once
// The inner loops of the gated unit, one set per instruction set. bfloat16 travels as its bits.

#include <cstdint>

namespace micro_kernels::cpu {

template <class T>
struct SwigluLoop {
  void (*forward)(const T* gate, const T* up, T* y, int64_t count);
  void (*backward)(const T* grad_y, const T* gate, const T* up, T* grad_gate, T* grad_up, int64_t count);
};

struct SwigluLoops {
  SwigluLoop<float> float32;
  SwigluLoop<double> float64;
  SwigluLoop<uint16_t> bfloat16;
};

extern const SwigluLoops kSwigluPlain;
extern const SwigluLoops kSwigluAvx2;
extern const SwigluLoops kSwigluAvx512;

}  // namespace micro_kernels::cpu
