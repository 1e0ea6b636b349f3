#pragma once
// The turn of one row, one function per instruction set. bfloat16 travels as its bits.

#include <cstdint>

namespace micro_kernels::cpu {

// Turns `heads` heads of 2 * half elements by the angles of one position; sign -1 turns back. y may be x.
template <class T, class Acc>
using RopeLoop = void (*)(const T* x, const Acc* cos, const Acc* sin, Acc sign, T* y, int64_t heads, int64_t half);

struct RopeLoops {
  RopeLoop<float, float> float32;
  RopeLoop<double, double> float64;
  RopeLoop<uint16_t, float> bfloat16;
};

extern const RopeLoops kRopePlain;
extern const RopeLoops kRopeAvx2;
extern const RopeLoops kRopeAvx512;

}  // namespace micro_kernels::cpu
