#pragma once
// The norm of one row, compiled once per instruction set (simd.h says why nothing here may be shared). No product is
// fused with a sum, and sums have one order: every set gives the same bits.

#include "common/cpu/stored.h"
#include "rms_norm/rms_norm_isa.h"

namespace micro_kernels::cpu {
namespace {

template <class T, class Acc>
struct Rows {
  static Acc sum_of_squares(const T* x, int64_t hidden) {
    return sum_terms<Acc>(hidden, [x](int64_t h, int64_t left) {
      const Vec<Acc> v = load_wide(x + h, left);
      return v * v;
    });
  }

  static void apply(const T* x, Acc scale, const NormCopies<T>& copies, int64_t hidden, bool round_before_gain) {
    each_vector<Acc>(hidden, [&](int64_t h, int64_t left) {
      const Vec<Acc> scaled = load_wide(x + h, left) * scale;
      const Vec<Acc> norm = round_before_gain ? rounded<T>(scaled) : scaled;
      for (int64_t c = 0; c < copies.count; ++c)
        store_narrow<T>(copies.y[c] + h, norm * load_wide(copies.gain[c] + h, left), left);
    });
  }

  static void add_gained(const NormCopies<const T>& copies, Acc* g, int64_t hidden, bool add) {
    each_vector<Acc>(hidden, [&](int64_t h, int64_t left) {
      Vec<Acc> sum = add ? load_wide(g + h, left) : Vec<Acc>{};
      for (int64_t c = 0; c < copies.count; ++c)
        sum += load_wide(copies.y[c] + h, left) * load_wide(copies.gain[c] + h, left);
      store_narrow(g + h, sum, left);
    });
  }

  static void backward(const T* x, const Acc* g, Acc scale, T* grad_x, int64_t hidden) {
    const Acc dot = sum_terms<Acc>(
        hidden, [&](int64_t h, int64_t left) { return load_wide(g + h, left) * load_wide(x + h, left); });
    const Acc pull = dot * scale * scale / static_cast<Acc>(hidden);
    each_vector<Acc>(hidden, [&](int64_t h, int64_t left) {
      store_narrow<T>(grad_x + h, scale * (load_wide(g + h, left) - load_wide(x + h, left) * pull), left);
    });
  }

  static void add_gain_gradient(const T* grad_y, const T* x, Acc scale, Acc* sum, int64_t columns) {
    each_vector<Acc>(columns, [&](int64_t h, int64_t left) {
      const Vec<Acc> term = load_wide(grad_y + h, left) * load_wide(x + h, left) * scale;
      store_narrow(sum + h, load_wide(sum + h, left) + term, left);
    });
  }

  static constexpr RmsNormLoop<T, Acc> kLoop = {sum_of_squares, apply, add_gained, backward, add_gain_gradient};
};

constexpr RmsNormLoops kLoops = {Rows<float, float>::kLoop, Rows<double, double>::kLoop, Rows<uint16_t, float>::kLoop};

}  // namespace
}  // namespace micro_kernels::cpu
