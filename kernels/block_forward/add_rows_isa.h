#pragma once
// The sum of two rows, one function per instruction set. bfloat16 travels as its bits.

#include <cstdint>

namespace micro_kernels::cpu {

// y = a + b, rounded; with `scale`, y = (a + b) * scale + 0, each step rounded (a token's sum begins with 0).
template <class T, class Acc>
using AddRow = void (*)(const T* a, const T* b, const Acc* scale, T* y, int64_t width);

struct AddRowLoops {
  AddRow<float, float> float32;
  AddRow<double, double> float64;
  AddRow<uint16_t, float> bfloat16;
};

extern const AddRowLoops kAddRowPlain;
extern const AddRowLoops kAddRowAvx2;
extern const AddRowLoops kAddRowAvx512;

}  // namespace micro_kernels::cpu
