#pragma once
// Sums in a fixed order that a compiler can still put into vector registers: kLanes partial sums, then their tree. The
// same bits on every instruction set and for every number of threads.

#include <cstdint>

namespace micro_kernels::cpu {

inline constexpr int64_t kLanes = 16;

// term(0) + ... + term(count - 1).
template <class Acc, class Term>
Acc sum_lanes(int64_t count, const Term& term) {
  Acc lane[kLanes] = {};
  const int64_t full = count - count % kLanes;
  for (int64_t i = 0; i < full; i += kLanes)
    for (int64_t j = 0; j < kLanes; ++j) lane[j] += term(i + j);
  for (int64_t i = full; i < count; ++i) lane[i - full] += term(i);
  for (int64_t width = kLanes / 2; width > 0; width /= 2)
    for (int64_t j = 0; j < width; ++j) lane[j] += lane[j + width];
  return lane[0];
}

}  // namespace micro_kernels::cpu
