#pragma once
// How far rounding to an element type moves a number: relative to it, and, below the smallest normal number, at all.

#include <limits>

#include "micro_kernels/dtype.h"

namespace micro_kernels {

template <class T>
constexpr double kRounding = std::numeric_limits<T>::epsilon() / 2;
template <>
inline constexpr double kRounding<BFloat16> = 0x1p-8;
template <>
inline constexpr double kRounding<Float16> = 0x1p-11;

template <class T>
constexpr double kSmallRounding = std::numeric_limits<T>::denorm_min() / 2;
template <>
inline constexpr double kSmallRounding<double> = std::numeric_limits<double>::denorm_min();
template <>
inline constexpr double kSmallRounding<BFloat16> = 0x1p-134;
template <>
inline constexpr double kSmallRounding<Float16> = 0x1p-25;

// The bound of a number that was `want` up to `error`, and was then rounded to T.
template <class T>
constexpr double rounded_bound(double want, double error) {
  return error + kRounding<T> * ((want < 0 ? -want : want) + error) + kSmallRounding<T>;
}

}  // namespace micro_kernels
