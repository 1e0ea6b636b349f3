#pragma once
// Rows of stored elements as accumulator vectors, and back. Only the per-ISA files include this (see simd.h).

#include "common/cpu/simd.h"

namespace micro_kernels::cpu {
namespace {

template <class T>
struct Stored;  // uint16_t stands for bfloat16: dtype.h has inline code and stays outside
template <>
struct Stored<float> {
  using Acc = float;
};
template <>
struct Stored<double> {
  using Acc = double;
};
template <>
struct Stored<uint16_t> {
  using Acc = float;
};

inline Vec<float> load_wide(const float* from) { return load(from); }
inline Vec<double> load_wide(const double* from) { return load(from); }
inline Vec<float> load_wide(const uint16_t* from) { return load_bfloat16(from); }

inline void store_narrow(float* to, Vec<float> v) { store(to, v); }
inline void store_narrow(double* to, Vec<double> v) { store(to, v); }
inline void store_narrow(uint16_t* to, Vec<float> v) { store_bfloat16(to, v); }

// Reads `count` elements at most, zeros behind them.
template <class T>
inline auto load_wide(const T* from, int64_t count) {
  constexpr int n = kLanes<typename Stored<T>::Acc>;
  if (count >= n) return load_wide(from);
  T part[n] = {};
  for (int64_t i = 0; i < count; ++i) part[i] = from[i];
  return load_wide(part);
}

template <class T>
inline void store_narrow(T* to, Vec<typename Stored<T>::Acc> v, int64_t count) {
  constexpr int n = kLanes<typename Stored<T>::Acc>;
  if (count >= n) return store_narrow(to, v);
  T part[n];
  store_narrow(part, v);
  for (int64_t i = 0; i < count; ++i) to[i] = part[i];
}

// What is left of v after a store and a load.
template <class T>
inline Vec<typename Stored<T>::Acc> rounded(Vec<typename Stored<T>::Acc> v) {
  if constexpr (sizeof(T) == 2)
    return (Vec<float>)(bfloat16_bits(v) << 16);
  else
    return v;
}

// Calls body(i, left) for each vector of `count` elements: `left` is a whole vector's width, and in the last call what
// is left of it.
template <class Acc, class Body>
inline void each_vector(int64_t count, const Body& body) {
  constexpr int64_t n = kLanes<Acc>;
  int64_t i = 0;
  for (; i + n <= count; i += n) body(i, n);
  if (i < count) body(i, count - i);
}

// The sum of the terms 0 .. count - 1 as 16 partial sums and their tree: the same bits on every instruction set.
// term(i, left) is a vector of terms from i on, zero behind `left` of them.
template <class Acc, class Term>
inline Acc sum_terms(int64_t count, const Term& term) {
  constexpr int64_t n = kLanes<Acc>, partial_sums = 16, vectors = partial_sums / n;
  Vec<Acc> sum[vectors] = {};
  int64_t i = 0;
  for (; i + partial_sums <= count; i += partial_sums)
#pragma GCC unroll 8
    for (int64_t j = 0; j < vectors; ++j) sum[j] += term(i + j * n, n);
  for (int64_t j = 0; j < vectors && i + j * n < count; ++j) sum[j] += term(i + j * n, count - i - j * n);
#pragma GCC unroll 4
  for (int64_t half = vectors / 2; half > 0; half /= 2)
#pragma GCC unroll 4
    for (int64_t j = 0; j < half; ++j) sum[j] += sum[j + half];
  return sum_lanes<Acc>(sum[0]);
}

}  // namespace
}  // namespace micro_kernels::cpu
