#pragma once
// The turn of one row, compiled once per instruction set (simd.h says why nothing here may be shared). No product is
// fused with a sum: every set gives the same bits.

#include "common/cpu/stored.h"
#include "rope/rope_isa.h"

namespace micro_kernels::cpu {
namespace {

template <class T, class Acc>
void turn(const T* x, const Acc* cos, const Acc* sin, Acc sign, T* y, int64_t heads, int64_t half) {
  for (int64_t head = 0; head < heads; ++head, x += 2 * half, y += 2 * half) {
    each_vector<Acc>(half, [&](int64_t i, int64_t left) {
      const Vec<Acc> a = load_wide(x + i, left), b = load_wide(x + half + i, left);
      const Vec<Acc> c = load_wide(cos + i, left), s = sign * load_wide(sin + i, left);
      store_narrow<T>(y + i, a * c - b * s, left);
      store_narrow<T>(y + half + i, b * c + a * s, left);
    });
  }
}

constexpr RopeLoops kLoops = {turn<float, float>, turn<double, double>, turn<uint16_t, float>};

}  // namespace
}  // namespace micro_kernels::cpu
