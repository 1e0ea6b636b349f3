#pragma once
// The sum of a token's rows, compiled once per instruction set (simd.h says why nothing here may be shared).

#include "common/cpu/stored.h"
#include "permute/permute_isa.h"

namespace micro_kernels::cpu {
namespace {

template <class T>
void sum(const T* const* rows, int64_t count, T* out, int64_t hidden) {
  using Acc = typename Stored<T>::Acc;
  each_vector<Acc>(hidden, [&](int64_t h, int64_t left) {
    Vec<Acc> total{};
    for (int64_t i = 0; i < count; ++i) total += load_wide(rows[i] + h, left);
    store_narrow<T>(out + h, total, left);
  });
}

constexpr PermuteLoops kLoops = {sum<float>, sum<double>, sum<uint16_t>};

}  // namespace
}  // namespace micro_kernels::cpu
