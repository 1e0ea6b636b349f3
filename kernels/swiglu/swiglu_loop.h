#pragma once
// One pass over the elements, vector by vector, compiled once per instruction set (simd.h says why nothing here may be
// shared). The last, partial vector goes through a padded copy, so every element meets the same arithmetic.

#include "common/cpu/simd.h"
#include "swiglu/swiglu_isa.h"

namespace micro_kernels::cpu {
namespace {

template <class T>
struct Wide {
  using type = T;
};
template <>
struct Wide<uint16_t> {
  using type = float;
};
template <class T>
using wide_t = typename Wide<T>::type;

template <class T>
inline Vec<wide_t<T>> load_wide(const T* from) {
  if constexpr (std::is_same_v<T, uint16_t>)
    return load_bfloat16(from);
  else
    return load<T>(from);
}

template <class T>
inline void store_narrow(T* to, Vec<wide_t<T>> v) {
  if constexpr (std::is_same_v<T, uint16_t>)
    store_bfloat16(to, v);
  else
    store<T>(to, v);
}

template <class T>
inline void forward_vector(const T* gate, const T* up, T* y) {
  const Vec<wide_t<T>> g = load_wide(gate);
  store_narrow<T>(y, g * sigmoid<wide_t<T>>(g) * load_wide(up));
}

template <class T>
inline void backward_vector(const T* grad_y, const T* gate, const T* up, T* grad_gate, T* grad_up) {
  using Acc = wide_t<T>;
  const Vec<Acc> upstream = load_wide(grad_y), g = load_wide(gate), u = load_wide(up);
  const Vec<Acc> s = sigmoid<Acc>(g);
  store_narrow<T>(grad_gate, upstream * u * s * (Acc(1) + g * (Acc(1) - s)));
  store_narrow<T>(grad_up, upstream * (g * s));
}

template <class T>
void forward(const T* gate, const T* up, T* y, int64_t count) {
  constexpr int64_t kWidth = kLanes<wide_t<T>>;
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) forward_vector(gate + i, up + i, y + i);
  if (i == count) return;
  const size_t bytes = static_cast<size_t>(count - i) * sizeof(T);
  T g[kWidth] = {}, u[kWidth] = {};
  __builtin_memcpy(g, gate + i, bytes);
  __builtin_memcpy(u, up + i, bytes);
  forward_vector(g, u, g);
  __builtin_memcpy(y + i, g, bytes);
}

template <class T>
void backward(const T* grad_y, const T* gate, const T* up, T* grad_gate, T* grad_up, int64_t count) {
  constexpr int64_t kWidth = kLanes<wide_t<T>>;
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) backward_vector(grad_y + i, gate + i, up + i, grad_gate + i, grad_up + i);
  if (i == count) return;
  const size_t bytes = static_cast<size_t>(count - i) * sizeof(T);
  T d[kWidth] = {}, g[kWidth] = {}, u[kWidth] = {};
  __builtin_memcpy(d, grad_y + i, bytes);
  __builtin_memcpy(g, gate + i, bytes);
  __builtin_memcpy(u, up + i, bytes);
  backward_vector(d, g, u, g, u);
  __builtin_memcpy(grad_gate + i, g, bytes);
  __builtin_memcpy(grad_up + i, u, bytes);
}

constexpr SwigluLoops kLoops = {
    {forward<float>, backward<float>}, {forward<double>, backward<double>}, {forward<uint16_t>, backward<uint16_t>}};

}  // namespace
}  // namespace micro_kernels::cpu
