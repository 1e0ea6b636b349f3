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

// Four or five streams at once are more than the hardware follows across small pages, so each is asked for this far
// ahead. Past the end of a tensor a request is ignored.
constexpr int64_t kAhead = 16 * 1024;  // bytes
constexpr int64_t kStep = 32;          // elements

template <class T>
inline void ask_ahead(const T* stream) {
  constexpr int64_t kLine = 64;
  for (int64_t at = 0; at < kStep * static_cast<int64_t>(sizeof(T)); at += kLine)
    __builtin_prefetch(reinterpret_cast<const char*>(stream) + kAhead + at);
}

template <class Acc>
inline void some(const Acc* __restrict gradient, Acc* __restrict first, Acc* __restrict second, Acc* __restrict value,
                 int64_t size, const AdamWFactors<Acc>& f) {
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) value[i] = adamw(gradient[i], first[i], second[i], value[i], f);
}

inline void some(const uint16_t* __restrict gradient, float* __restrict first, float* __restrict second,
                 float* __restrict value, uint16_t* __restrict parameter, int64_t size, const AdamWFactors<float>& f) {
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) {
    value[i] = adamw(widen(gradient[i]), first[i], second[i], value[i], f);
    parameter[i] = narrow(value[i]);
  }
}

template <class Acc>
void same_type(const Acc* gradient, Acc* first, Acc* second, Acc* value, int64_t size,
               const AdamWFactors<Acc>& factors) {
  const AdamWFactors<Acc> f = factors;
  const int64_t whole = size / kStep * kStep;
  for (int64_t i = 0; i < whole; i += kStep) {
    ask_ahead(gradient + i), ask_ahead(first + i), ask_ahead(second + i), ask_ahead(value + i);
    some(gradient + i, first + i, second + i, value + i, kStep, f);
  }
  some(gradient + whole, first + whole, second + whole, value + whole, size - whole, f);
}

void with_master(const uint16_t* gradient, float* first, float* second, float* value, uint16_t* parameter, int64_t size,
                 const AdamWFactors<float>& factors) {
  const AdamWFactors<float> f = factors;
  const int64_t whole = size / kStep * kStep;
  for (int64_t i = 0; i < whole; i += kStep) {
    ask_ahead(gradient + i), ask_ahead(first + i), ask_ahead(second + i), ask_ahead(value + i);
    ask_ahead(parameter + i);
    some(gradient + i, first + i, second + i, value + i, parameter + i, kStep, f);
  }
  some(gradient + whole, first + whole, second + whole, value + whole, parameter + whole, size - whole, f);
}

constexpr AdamWLoops kLoops = {same_type<float>, same_type<double>, with_master};

}  // namespace
}  // namespace micro_kernels::cpu
