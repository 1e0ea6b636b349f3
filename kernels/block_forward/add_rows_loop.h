#pragma once
// The sum of two rows, compiled once per instruction set (simd.h says why nothing here may be shared).

#include "block_forward/add_rows_isa.h"
#include "common/cpu/stored.h"

namespace micro_kernels::cpu {
namespace {

template <class T, class Acc>
void add(const T* a, const T* b, const Acc* scale, T* y, int64_t width) {
  each_vector<Acc>(width, [&](int64_t h, int64_t left) {
    const Vec<Acc> sum = load_wide(a + h, left) + load_wide(b + h, left);
    store_narrow<T>(y + h, scale ? rounded<T>(sum) * *scale + Vec<Acc>{} : sum, left);
  });
}

constexpr AddRowLoops kLoops = {add<float, float>, add<double, double>, add<uint16_t, float>};

}  // namespace
}  // namespace micro_kernels::cpu
