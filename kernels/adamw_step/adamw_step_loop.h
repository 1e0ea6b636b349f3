#pragma once
// Plain loops that the compiler turns into vectors, compiled once per instruction set. Everything stands in an unnamed
// namespace and nothing comes from the standard library, so that the linker cannot swap one set's code for another's.
// The arithmetic is the same in all sets: every element has its own, and no product is fused with a sum.

#include "adamw_step/adamw_step_isa.h"

namespace micro_kernels::cpu {
namespace {

inline float root(float x) { return __builtin_sqrtf(x); }
inline double root(double x) { return __builtin_sqrt(x); }

inline float widen(uint16_t bits) { return __builtin_bit_cast(float, static_cast<uint32_t>(bits) << 16); }

// To nearest, ties to even, as BFloat16 of dtype.h.
inline uint16_t narrow(float value) {
  const uint32_t word = __builtin_bit_cast(uint32_t, value);
  const uint32_t rounded = (word + 0x7fffu + ((word >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((word & 0x7fffffffu) > 0x7f800000u ? (word >> 16) | 0x40u : rounded);
}

// Returns the new value and updates both moments.
template <class Acc>
inline Acc adamw(Acc gradient, Acc& first, Acc& second, Acc value, const AdamWFactors<Acc>& f) {
  const Acc g = gradient * f.gradient_scale;
  first = f.beta1 * first + f.other1 * g;
  second = f.beta2 * second + f.other2 * (g * g);
  return value * f.decay - f.step_size * first / (root(second) * f.inverse_root + f.eps);
}

template <class Acc>
void same_type(const Acc* __restrict gradient, Acc* __restrict first, Acc* __restrict second, Acc* __restrict value,
               int64_t size, const AdamWFactors<Acc>& factors) {
  const AdamWFactors<Acc> f = factors;
  for (int64_t i = 0; i < size; ++i) value[i] = adamw(gradient[i], first[i], second[i], value[i], f);
}

void with_master(const uint16_t* __restrict gradient, float* __restrict first, float* __restrict second,
                 float* __restrict value, uint16_t* __restrict parameter, int64_t size,
                 const AdamWFactors<float>& factors) {
  const AdamWFactors<float> f = factors;
  for (int64_t i = 0; i < size; ++i) {
    value[i] = adamw(widen(gradient[i]), first[i], second[i], value[i], f);
    parameter[i] = narrow(value[i]);
  }
}

constexpr AdamWLoops kLoops = {same_type<float>, same_type<double>, with_master};

}  // namespace
}  // namespace micro_kernels::cpu
