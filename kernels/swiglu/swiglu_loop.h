#pragma once
// One pass over the elements, vector by vector, compiled once per instruction set (simd.h says why nothing here may be
// shared). The last, partial vector is padded, so every element meets the same arithmetic.

#include "common/cpu/stored.h"
#include "swiglu/swiglu_isa.h"

namespace micro_kernels::cpu {
namespace {

template <class T>
void forward(const T* gate, const T* up, T* y, int64_t count) {
  using Acc = typename Stored<T>::Acc;
  each_vector<Acc>(count, [&](int64_t i, int64_t left) {
    const Vec<Acc> g = load_wide(gate + i, left), u = load_wide(up + i, left);
    store_narrow<T>(y + i, g * sigmoid<Acc>(g) * u, left);
  });
}

template <class T>
void backward(const T* grad_y, const T* gate, const T* up, T* grad_gate, T* grad_up, int64_t count) {
  using Acc = typename Stored<T>::Acc;
  each_vector<Acc>(count, [&](int64_t i, int64_t left) {
    const Vec<Acc> upstream = load_wide(grad_y + i, left), g = load_wide(gate + i, left), u = load_wide(up + i, left);
    const Vec<Acc> s = sigmoid<Acc>(g);
    store_narrow<T>(grad_gate + i, upstream * u * s * (Acc(1) + g * (Acc(1) - s)), left);
    store_narrow<T>(grad_up + i, upstream * (g * s), left);
  });
}

constexpr SwigluLoops kLoops = {
    {forward<float>, backward<float>}, {forward<double>, backward<double>}, {forward<uint16_t>, backward<uint16_t>}};

}  // namespace
}  // namespace micro_kernels::cpu
