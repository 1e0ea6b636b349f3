#pragma once
// Inputs of routed attention, and what it is by definition: plain loops in double.

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "backend.h"
#include "elements.h"
#include "micro_kernels/expert_attention.h"

namespace micro_kernels {

inline constexpr double kInfinity = std::numeric_limits<double>::infinity();

template <class T>
double wide(T value) {
  return static_cast<accumulator_t<T>>(value);
}

// How keys and values lie in memory.
enum class KeyLayout {
  kPlain,      // [B, E, G, J, D]
  kProjected,  // [E, B, J, G, D], as a projection leaves them
  kOdd,        // as kPlain, but no row begins at a multiple of 16 bytes
};

struct AttentionCase {
  int64_t batch, slots, start, spare, heads, groups, head_dim;
  AttentionMask mask;
  KeyLayout layout = KeyLayout::kPlain;
  int64_t idle = 0;  // plan rows that no expert has
};

inline std::string name_of(const AttentionCase& c) {
  return std::string("B").append(std::to_string(c.batch)) + " S" + std::to_string(c.slots) + " start " +
         std::to_string(c.start) + " A" + std::to_string(c.heads) + " G" + std::to_string(c.groups) + " D" +
         std::to_string(c.head_dim) + " mask " + std::to_string(static_cast<int>(c.mask)) + " layout " +
         std::to_string(static_cast<int>(c.layout));
}

// Three experts, of which the last has no query. Every seventh value is larger: some scores dominate. Keys and values
// that no query may see are not a number.
template <class T>
struct AttentionProblem {
  using Acc = accumulator_t<T>;
  static constexpr int64_t kExperts = 3;
  AttentionCase c;
  int64_t used, rows, keys;
  double scale = 0.8 / std::sqrt(static_cast<double>(c.head_dim));
  std::vector<int32_t> tokens, offsets{0};
  std::vector<T> q, k, v, grad_out;
  std::vector<Acc> bias;
  std::vector<uint8_t> visible;

  explicit AttentionProblem(const AttentionCase& shape)
      : c(shape), used(c.batch * c.slots), rows(used + c.idle), keys(c.start + c.slots + c.spare) {
    std::mt19937 random(rows * 100 + c.head_dim);
    std::normal_distribution<float> normal;
    const auto next = [&](int64_t i) { return normal(random) * (i % 7 == 0 ? 4.0f : 1.0f); };
    std::vector<int> expert(used);
    for (int& e : expert) e = random() % 2;
    for (int e = 0; e < kExperts; ++e) {
      for (int64_t t = 0; t < used; ++t)
        if (expert[t] == e) tokens.push_back(static_cast<int32_t>(t));
      offsets.push_back(static_cast<int32_t>(tokens.size()));
    }
    tokens.resize(rows, -1);
    for (int64_t i = 0; i < rows * c.heads * c.head_dim; ++i) q.push_back(T(next(i)));
    for (int64_t i = 0; i < rows * c.heads * c.head_dim; ++i) grad_out.push_back(T(next(i)));
    for (int64_t i = 0; i < c.batch * c.slots * keys; ++i) bias.push_back(random() % 5 ? next(i) : -INFINITY);
    for (int64_t i = 0; i < c.batch * c.slots * keys; ++i) visible.push_back(random() % 3 > 0);
    k = key_elements(next);
    v = key_elements(next);
  }

  // ---- where things are --------------------------------------------------------------------------------------------

  HeadStrides strides() const {
    const int64_t row = c.head_dim + (c.layout == KeyLayout::kOdd ? 3 : 0);
    if (c.layout == KeyLayout::kProjected)
      return {keys * c.groups * row, c.batch * keys * c.groups * row, row, c.groups * row};
    return {kExperts * c.groups * keys * row, c.groups * keys * row, keys * row, row};
  }
  int64_t key_size() const {
    return c.batch * kExperts * c.groups * keys * (c.head_dim + (c.layout == KeyLayout::kOdd ? 3 : 0));
  }
  int64_t key(int64_t b, int64_t e, int64_t g, int64_t j) const {
    const HeadStrides s = strides();
    return b * s.batch + e * s.expert + g * s.group + j * s.key;
  }
  int64_t expert_of(int64_t n) const { return n < offsets[1] ? 0 : n < offsets[2] ? 1 : 2; }
  int64_t query(int64_t n, int64_t a) const { return (n * c.heads + a) * c.head_dim; }
  int64_t key_of(int64_t n, int64_t a, int64_t j) const {
    return key(tokens[n] / c.slots, expert_of(n), a / (c.heads / c.groups), j);
  }

  // ---- what is seen ------------------------------------------------------------------------------------------------

  bool may_be_seen(int64_t b, int64_t j) const {
    if (c.mask == AttentionMask::kPairs || c.mask == AttentionMask::kBias) return true;
    return j < c.start + c.slots && (c.mask == AttentionMask::kNone || visible[b * keys + j]);
  }
  // -inf hides.
  double addition(int64_t n, int64_t j) const {
    const int64_t b = tokens[n] / c.slots, slot = tokens[n] % c.slots, own = c.start + slot;
    const int64_t pair = (b * c.slots + slot) * keys;
    switch (c.mask) {
      case AttentionMask::kNone:
        return j <= own ? 0 : -kInfinity;
      case AttentionMask::kKeys:
        return j <= own && visible[b * keys + j] && visible[b * keys + own] ? 0 : -kInfinity;
      case AttentionMask::kPairs:
        return visible[pair + j] ? 0 : -kInfinity;
      case AttentionMask::kBias:
        return bias[pair + j];
    }
    return 0;
  }

  // ---- the definition ----------------------------------------------------------------------------------------------

  double dot(const std::vector<T>& x, int64_t i, const std::vector<T>& y, int64_t j) const {
    double sum = 0;
    for (int64_t d = 0; d < c.head_dim; ++d) sum += wide(x[i + d]) * wide(y[j + d]);
    return sum;
  }

  // Softmax weights of one query; all 0 where nothing is seen.
  struct Weights {
    std::vector<double> p;
    double logsumexp;
  };
  Weights weights(int64_t n, int64_t a) const {
    Weights w{std::vector<double>(keys), -kInfinity};
    double top = -kInfinity, sum = 0;
    for (int64_t j = 0; j < keys; ++j) {
      w.p[j] = addition(n, j);
      if (w.p[j] > -kInfinity) w.p[j] += scale * dot(q, query(n, a), k, key_of(n, a, j));
      top = std::max(top, w.p[j]);
    }
    for (double& x : w.p) sum += x = top == -kInfinity ? 0 : std::exp(x - top);
    for (double& x : w.p) x /= sum == 0 ? 1 : sum;
    if (sum > 0) w.logsumexp = top + std::log(sum);
    return w;
  }

  struct Output {
    std::vector<double> out, logsumexp;
  };
  Output output() const {
    Output want{std::vector<double>(q.size()), std::vector<double>(rows * c.heads, -kInfinity)};
    for (int64_t n = 0; n < used; ++n)
      for (int64_t a = 0; a < c.heads; ++a) {
        const Weights w = weights(n, a);
        want.logsumexp[n * c.heads + a] = w.logsumexp;
        for (int64_t j = 0; j < keys; ++j)
          for (int64_t d = 0; w.p[j] > 0 && d < c.head_dim; ++d)
            want.out[query(n, a) + d] += w.p[j] * wide(v[key_of(n, a, j) + d]);
      }
    return want;
  }

  struct Gradients {
    std::vector<double> q, k, v;
    // What an element of the gradients of q and k is a difference of, at most; and the largest score.
    double terms = 0, score = 0;
  };
  Gradients gradients() const {
    Gradients want{std::vector<double>(q.size()), std::vector<double>(k.size()), std::vector<double>(v.size())};
    const std::vector<double> out = output().out;
    for (int64_t n = 0; n < used; ++n)
      for (int64_t a = 0; a < c.heads; ++a) add_gradients(n, a, out, want);
    return want;
  }

 private:
  template <class Next>
  std::vector<T> key_elements(const Next& next) const {
    std::vector<T> values(key_size(), T(NAN));
    int64_t i = 0;
    for (int64_t b = 0; b < c.batch; ++b)
      for (int64_t e = 0; e < kExperts; ++e)
        for (int64_t g = 0; g < c.groups; ++g)
          for (int64_t j = 0; j < keys; ++j)
            for (int64_t d = 0; d < c.head_dim; ++d) {
              const float value = next(i++);
              if (may_be_seen(b, j)) values[key(b, e, g, j) + d] = T(value);
            }
    return values;
  }

  void add_gradients(int64_t n, int64_t a, const std::vector<double>& out, Gradients& want) const {
    const std::vector<double> p = weights(n, a).p;
    const int64_t at = query(n, a);
    std::vector<double> grad_p(keys);
    double delta = 0, delta_size = 0, largest = 0;
    for (int64_t d = 0; d < c.head_dim; ++d) {
      delta_size += std::abs(out[at + d] * wide(grad_out[at + d]));
      largest = std::max(largest, std::abs(wide(q[at + d])));
    }
    for (int64_t j = 0; j < keys; ++j)
      for (int64_t d = 0; p[j] > 0 && d < c.head_dim; ++d)
        largest = std::max(largest, std::abs(wide(k[key_of(n, a, j) + d])));
    want.terms = std::max(want.terms, scale * delta_size * largest);
    for (int64_t j = 0; j < keys; ++j)
      if (p[j] > 0) want.score = std::max(want.score, std::abs(scale * dot(q, at, k, key_of(n, a, j))));
    for (int64_t j = 0; j < keys; ++j)
      if (p[j] > 0) delta += p[j] * (grad_p[j] = dot(grad_out, at, v, key_of(n, a, j)));
    for (int64_t j = 0; j < keys; ++j) {
      const double ds = scale * p[j] * (grad_p[j] - delta);
      const int64_t from = key_of(n, a, j);
      for (int64_t d = 0; p[j] > 0 && d < c.head_dim; ++d) {
        want.v[from + d] += p[j] * wide(grad_out[at + d]);
        want.k[from + d] += ds * wide(q[at + d]);
        want.q[at + d] += ds * wide(k[from + d]);
      }
    }
  }
};

// A problem where the kernels can reach it, and room for their results.
template <class T>
struct AttentionTensors {
  using Acc = accumulator_t<T>;
  const AttentionProblem<T>& x;
  int64_t shift = x.c.layout == KeyLayout::kOdd ? 1 : 0;  // of the first key
  Buffer<int32_t> tokens{x.tokens}, offsets{x.offsets};
  Buffer<uint8_t> visible{x.visible};
  Buffer<Acc> bias{x.bias};
  Buffer<T> q{x.q}, k{shifted(x.k)}, v{shifted(x.v)}, grad_out{x.grad_out};
  Buffer<T> out{static_cast<int64_t>(x.q.size())};
  Buffer<Acc> logsumexp{x.rows * x.c.heads};
  Buffer<T> grad_q{static_cast<int64_t>(x.q.size())}, grad_k{x.key_size() + shift}, grad_v{x.key_size() + shift};

  explicit AttentionTensors(const AttentionProblem<T>& problem) : x(problem) {}

  std::vector<T> shifted(std::vector<T> values) const {
    values.insert(values.begin(), shift, T(NAN));
    return values;
  }

  ExpertAttentionShape shape() const {
    const void* mask = nullptr;
    if (x.c.mask == AttentionMask::kBias) mask = bias.data();
    if (x.c.mask == AttentionMask::kKeys || x.c.mask == AttentionMask::kPairs) mask = visible.data();
    return {.tokens = tokens.data(),
            .offsets = offsets.data(),
            .mask = mask,
            .mask_kind = x.c.mask,
            .masks = x.c.batch,
            .rows = x.rows,
            .heads = x.c.heads,
            .groups = x.c.groups,
            .head_dim = x.c.head_dim,
            .batch = x.c.batch,
            .experts = AttentionProblem<T>::kExperts,
            .slots = x.c.slots,
            .keys = x.keys,
            .start = x.c.start,
            .starts = nullptr,
            .scale = x.scale,
            .dtype = kDTypeOf<T>};
  }
  Status forward() {
    return MICRO_RUN_WITH_WORKSPACE(
        expert_attention, ExpertAttentionParams{shape(), q.data(), k.data() + shift, v.data() + shift, x.strides(),
                                                x.strides(), out.data(), logsumexp.data()});
  }
  // wanted: gradients of q, k, v.
  Status backward(bool of_q = true, bool of_k = true, bool of_v = true) {
    return MICRO_RUN_WITH_WORKSPACE(
        expert_attention_backward,
        ExpertAttentionBackwardParams{shape(), grad_out.data(), q.data(), k.data() + shift, v.data() + shift,
                                      out.data(), logsumexp.data(), x.strides(), x.strides(),
                                      of_q ? grad_q.data() : nullptr, of_k ? grad_k.data() + shift : nullptr,
                                      of_v ? grad_v.data() + shift : nullptr, x.strides(), x.strides()});
  }
};

// Bound relative to the largest value: in narrow types two roundings of 2^-9 (2^-12) each, of the weights or the
// gradients of the scores and of the result; in float32 some hundred roundings of 2^-23 in the sums of a score.
template <class T>
inline constexpr double kAttentionBound = 1e-12;
template <>
inline constexpr double kAttentionBound<float> = 2e-5;
template <>
inline constexpr double kAttentionBound<BFloat16> = 0x1p-7;
template <>
inline constexpr double kAttentionBound<Float16> = 0x1p-10;

// error: what may be added to the bound.
template <class T>
void expect_near(const std::vector<T>& got, const std::vector<double>& want, double bound, double error = 0) {
  double scale = 1;
  for (double w : want)
    if (std::isfinite(w)) scale = std::max(scale, std::abs(w));
  ASSERT_EQ(got.size(), want.size());
  for (size_t i = 0; i < want.size(); ++i) {
    if (want[i] == wide(got[i])) continue;  // infinities too
    ASSERT_NEAR(wide(got[i]), want[i], bound * scale + error) << "at " << i;
  }
}

}  // namespace micro_kernels
