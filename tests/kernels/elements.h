#pragma once
// Numbers of every element type, and their comparison bit for bit.

#include <gtest/gtest.h>

#include <cstring>
#include <random>
#include <vector>

#include "micro_kernels/dtype.h"

namespace micro_kernels {

template <class T>
constexpr DType kDTypeOf = DType::kFloat32;
template <>
inline constexpr DType kDTypeOf<double> = DType::kFloat64;
template <>
inline constexpr DType kDTypeOf<BFloat16> = DType::kBFloat16;
template <>
inline constexpr DType kDTypeOf<Float16> = DType::kFloat16;

using ElementTypes = testing::Types<float, double, BFloat16>;

// Normal, with outliers, and now and then a number below the smallest normal one of float32.
template <class T>
std::vector<T> random_elements(int64_t count, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<double> normal;
  std::vector<T> values;
  for (int64_t i = 0; i < count; ++i)
    values.push_back(T(static_cast<accumulator_t<T>>(normal(random) * (i % 5 == 0 ? 30 : i % 7 == 0 ? 1e-39 : 1))));
  return values;
}

template <class T>
void expect_same_bits(const std::vector<T>& got, const std::vector<T>& want) {
  ASSERT_EQ(got.size(), want.size());
  for (size_t i = 0; i < got.size(); ++i)
    ASSERT_EQ(std::memcmp(&got[i], &want[i], sizeof(T)), 0)
        << "at " << i << ": " << static_cast<accumulator_t<T>>(got[i]) << " instead of "
        << static_cast<accumulator_t<T>>(want[i]);
}

}  // namespace micro_kernels
