#pragma once
// The weighted sum of one token, compiled once per instruction set (simd.h says why nothing here may be shared). No
// product is fused with a sum, and sums have one order: every set gives the same bits.

#include "combine/combine_isa.h"
#include "common/cpu/stored.h"

namespace micro_kernels::cpu {
namespace {

template <class T, class Acc>
void sum(const WeightedRow<T, Acc>* rows, int64_t count, T* out, int64_t hidden) {
  each_vector<Acc>(hidden, [&](int64_t h, int64_t left) {
    Vec<Acc> total{};
    for (int64_t i = 0; i < count; ++i)
      total = rounded<T>(total + rounded<T>(load_wide(rows[i].y + h, left) * rows[i].weight));
    store_narrow<T>(out + h, total, left);
  });
}

template <class T, class Acc>
Acc dot(const T* a, const T* b, int64_t hidden) {
  return sum_terms<Acc>(hidden,
                        [&](int64_t h, int64_t left) { return load_wide(a + h, left) * load_wide(b + h, left); });
}

template <class T, class Acc>
void scale(const T* from, Acc weight, T* to, int64_t hidden) {
  each_vector<Acc>(hidden,
                   [&](int64_t h, int64_t left) { store_narrow<T>(to + h, load_wide(from + h, left) * weight, left); });
}

constexpr CombineLoops kLoops = {
    {sum<float, float>, dot<float, float>, scale<float, float>},
    {sum<double, double>, dot<double, double>, scale<double, double>},
    {sum<uint16_t, float>, dot<uint16_t, float>, scale<uint16_t, float>},
};

}  // namespace
}  // namespace micro_kernels::cpu
