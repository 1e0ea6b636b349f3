#pragma once
// Random layers for the tests of whole layers, as the kernels see them and as the oracle does.

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <optional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "backend.h"
#include "elements.h"
#include "layer_oracle.h"
#include "micro_kernels/block_forward.h"

namespace micro_kernels {

// A tensor of the kernels and the same numbers for the oracle: rounding them is not the layer's error.
template <class T>
std::vector<T> rounded_to(const Doubles& values) {
  std::vector<T> result;
  for (const double value : values) result.push_back(T(static_cast<accumulator_t<T>>(value)));
  return result;
}
template <class T>
Doubles as_doubles(const std::vector<T>& values) {
  Doubles result;
  for (const T value : values) result.push_back(static_cast<double>(static_cast<accumulator_t<T>>(value)));
  return result;
}

inline Doubles random_doubles(int64_t count, unsigned seed, double scale, double mean = 0) {
  std::mt19937 random(seed);
  std::normal_distribution<double> normal(mean, scale);
  Doubles values;
  for (int64_t i = 0; i < count; ++i) values.push_back(normal(random));
  return values;
}

// As Buffer, for the CPU's kernels on every back end.
template <class T>
class HostArray {
 public:
  explicit HostArray(int64_t count) : values_(count) { std::memset(values_.data(), 0xff, count * sizeof(T)); }
  HostArray(const std::vector<T>& values) : values_(values) {}  // NOLINT
  T* data() const { return const_cast<T*>(values_.data()); }
  int64_t size() const { return static_cast<int64_t>(values_.size()); }
  std::vector<T> read() const { return values_; }

 private:
  std::vector<T> values_;
};

// The parameters of a layer, rounded to Rounded, and where the kernels find them.
template <class T, template <class> class Memory = Buffer, class Rounded = T>
struct LayerParameters {
  LayerSizes sizes;
  LayerWeights weights;

  explicit LayerParameters(const LayerSizes& s) : sizes(s) {
    const int64_t a = s.attention_experts(), e = s.experts;
    unsigned seed = 1;
    const auto matrix = [&](Doubles& to, int64_t experts, int64_t out, int64_t in) {
      add(to, random_doubles(experts * out * in, seed++, 1 / std::sqrt(static_cast<double>(in))));
    };
    const auto gain = [&](Doubles& to, int64_t width) { add(to, random_doubles(a * width, seed++, 0.2, 1)); };
    matrix(weights.q, a, s.query_width(), s.hidden);
    matrix(weights.k, a, s.key_width(), s.hidden);
    matrix(weights.v, a, s.key_width(), s.hidden);
    matrix(weights.o, a, s.hidden, s.query_width());
    matrix(weights.gate, e, s.inner, s.hidden);
    matrix(weights.up, e, s.inner, s.hidden);
    matrix(weights.down, e, s.hidden, s.inner);
    matrix(weights.router_in, 1, s.router_hidden, s.hidden);
    matrix(weights.router_out, 1, e, s.router_hidden);
    gain(weights.input_norm, s.hidden);
    gain(weights.post_attention_norm, s.hidden);
    gain(weights.post_ffn_norm, s.hidden);
    gain(weights.q_norm, s.query_width());
    gain(weights.k_norm, s.key_width());
    q = matrices(0, a), k = matrices(1, a), v = matrices(2, a), o = matrices(3, a);
    gate = matrices(4, e), up = matrices(5, e), down = matrices(6, e);
  }
  LayerParameters(const LayerParameters&) = delete;

  BlockShape shape() const {
    const LayerSizes& s = sizes;
    return {.hidden = s.hidden,
            .heads = s.heads,
            .groups = s.groups,
            .head_dim = s.head_dim,
            .inner = s.inner,
            .experts = s.experts,
            .router_hidden = s.router_hidden,
            .whole_block = s.whole_block,
            .post_norm = s.post_norm,
            .eps = 1e-5,
            .rounding = s.post_norm ? GainRounding::kAfterGain : GainRounding::kBeforeGain,
            .dtype = kDTypeOf<T>};
  }
  BlockWeights params() const {
    const bool post = sizes.post_norm;
    return {.q = q.data(),
            .k = k.data(),
            .v = v.data(),
            .o = o.data(),
            .gate = gate.data(),
            .up = up.data(),
            .down = down.data(),
            .router_in = {buffers[7].data()},
            .router_out = {buffers[8].data()},
            .input_norm = post ? nullptr : buffers[9].data(),
            .post_attention_norm = buffers[10].data(),
            .post_ffn_norm = post ? buffers[11].data() : nullptr,
            .q_norm = post ? buffers[12].data() : nullptr,
            .k_norm = post ? buffers[13].data() : nullptr};
  }

  std::vector<Memory<T>> buffers;  // in the order of LayerWeights
  std::vector<Matrix> q, k, v, o, gate, up, down;

 private:
  void add(Doubles& to, const Doubles& values) {
    to = as_doubles(rounded_to<Rounded>(values));
    buffers.emplace_back(rounded_to<T>(to));
  }
  std::vector<Matrix> matrices(size_t number, int64_t experts) const {
    std::vector<Matrix> list(experts);
    for (int64_t e = 0; e < experts; ++e)
      list[e].data = buffers[number].data() + e * (buffers[number].size() / experts);
    return list;
  }
};

// What a layer's results may be off by: some rounding units of the largest of them. Every value has passed about ten
// roundings, and sums of a few dozen products, which widen float32's and float64's few units more than they do the
// large ones of 16 bits.
template <class T>
double layer_bound() {
  constexpr double kUnit = std::is_same_v<T, double>     ? 0x1p-53
                           : std::is_same_v<T, float>    ? 0x1p-24
                           : std::is_same_v<T, BFloat16> ? 0x1p-9
                                                         : 0x1p-12;
  return kUnit * (sizeof(T) == 2 ? 12 : 100);
}

inline void expect_close(const Doubles& got, const Doubles& want, double bound, const char* name) {
  ASSERT_EQ(got.size(), want.size()) << name;
  double largest = 1;
  for (const double value : want) largest = std::max(largest, std::abs(value));
  for (size_t i = 0; i < got.size(); ++i)
    ASSERT_LE(std::abs(got[i] - want[i]), bound * largest)
        << name << " at " << i << ": " << got[i] << " instead of " << want[i];
}

}  // namespace micro_kernels
