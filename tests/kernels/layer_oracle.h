#pragma once
// A layer as model.md 2.3 - 2.8 and 2.12 say it, token by token, in float64: what every back end is measured against.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace micro_kernels {

using Doubles = std::vector<double>;

struct LayerSizes {
  int64_t hidden = 64, heads = 4, groups = 2, head_dim = 16, inner = 48, experts = 4, router_hidden = 40;
  bool whole_block = true, post_norm = false;

  int64_t attention_experts() const { return whole_block ? experts : 1; }
  int64_t query_width() const { return heads * head_dim; }
  int64_t key_width() const { return groups * head_dim; }
};

// Matrices [experts, out, in] and gains [experts, width] as in BlockWeights.
struct LayerWeights {
  Doubles q, k, v, o, gate, up, down, router_in, router_out;
  Doubles input_norm, post_attention_norm, post_ffn_norm, q_norm, k_norm;
};

struct LayerInputs {
  Doubles x;  // [B, S, H]
  int64_t batch, slots, k;
  std::vector<uint8_t> real;      // [B, S]; empty: all
  std::vector<int32_t> ids;       // [B * S, K]; empty: the largest
  Doubles cos, sin;               // [positions, D / 2]
  std::vector<int32_t> position;  // [B * S]
  double scale, eps;
};

struct LayerResults {
  Doubles y, logits, probs, weights, keys, values;  // keys, values: [B, attention experts, G, S, D]
  std::vector<int32_t> ids;
};

class LayerOracle {
 public:
  LayerOracle(const LayerSizes& sizes, const LayerWeights& weights, const LayerInputs& inputs)
      : s_(sizes), w_(weights), in_(inputs), tokens_(in_.batch * in_.slots) {}

  LayerResults run() {
    make_keys();
    for (int64_t t = 0; t < tokens_; ++t) s_.whole_block ? whole_block(t) : shared_attention(t);
    return out_;
  }

  static Doubles product(const double* x, const Doubles& matrix, int64_t expert, int64_t in, int64_t out) {
    Doubles y(out, 0);
    for (int64_t o = 0; o < out; ++o)
      for (int64_t i = 0; i < in; ++i) y[o] += matrix[(expert * out + o) * in + i] * x[i];
    return y;
  }

 private:
  Doubles norm(const Doubles& x, const Doubles& gain, int64_t expert) const {
    double sum = 0;
    for (const double value : x) sum += value * value;
    const double scale = 1 / std::sqrt(sum / static_cast<double>(x.size()) + in_.eps);
    Doubles y;
    for (size_t i = 0; i < x.size(); ++i) y.push_back(x[i] * scale * gain[expert * x.size() + i]);
    return y;
  }
  static Doubles sum(const Doubles& a, const Doubles& b) {
    Doubles y;
    for (size_t i = 0; i < a.size(); ++i) y.push_back(a[i] + b[i]);
    return y;
  }
  void rotate(Doubles& x, int64_t token) const {
    const int64_t half = s_.head_dim / 2, row = in_.position[token] * half;
    for (size_t head = 0; head < x.size(); head += s_.head_dim)
      for (int64_t i = 0; i < half; ++i) {
        const double a = x[head + i], b = x[head + i + half], c = in_.cos[row + i], s = in_.sin[row + i];
        x[head + i] = a * c - b * s;
        x[head + i + half] = b * c + a * s;
      }
  }
  Doubles row(int64_t token) const {
    return {in_.x.begin() + token * s_.hidden, in_.x.begin() + (token + 1) * s_.hidden};
  }
  bool real(int64_t token) const { return in_.real.empty() || in_.real[token]; }

  Doubles attention_input(int64_t token, int64_t expert) const {
    return s_.post_norm ? row(token) : norm(row(token), w_.input_norm, expert);
  }

  size_t key_at(int64_t batch, int64_t expert, int64_t group, int64_t slot) const {
    return (((batch * s_.attention_experts() + expert) * s_.groups + group) * in_.slots + slot) * s_.head_dim;
  }

  void make_keys() {
    out_.keys.resize(tokens_ * s_.attention_experts() * s_.key_width());
    out_.values.resize(out_.keys.size());
    for (int64_t t = 0; t < tokens_; ++t)
      for (int64_t e = 0; e < s_.attention_experts(); ++e) {
        const Doubles n = attention_input(t, e);
        Doubles k = product(n.data(), w_.k, e, s_.hidden, s_.key_width());
        const Doubles v = product(n.data(), w_.v, e, s_.hidden, s_.key_width());
        if (s_.post_norm) k = norm(k, w_.k_norm, e);
        rotate(k, t);
        for (int64_t g = 0; g < s_.groups; ++g) {
          const size_t at = key_at(t / in_.slots, e, g, t % in_.slots);
          std::copy_n(k.begin() + g * s_.head_dim, s_.head_dim, out_.keys.begin() + at);
          std::copy_n(v.begin() + g * s_.head_dim, s_.head_dim, out_.values.begin() + at);
        }
      }
  }

  // Of one token by one expert, up to and with the residual: u.
  Doubles behind_attention(int64_t token, int64_t expert) const {
    const Doubles n = attention_input(token, expert);
    Doubles q = product(n.data(), w_.q, expert, s_.hidden, s_.query_width());
    if (s_.post_norm) q = norm(q, w_.q_norm, expert);
    rotate(q, token);
    Doubles a(s_.query_width(), 0);
    for (int64_t head = 0; head < s_.heads; ++head) attend(token, expert, head, q, a);
    Doubles o = product(a.data(), w_.o, expert, s_.query_width(), s_.hidden);
    if (s_.post_norm) o = norm(o, w_.post_attention_norm, expert);
    return sum(row(token), o);
  }

  void attend(int64_t token, int64_t expert, int64_t head, const Doubles& q, Doubles& a) const {
    const int64_t batch = token / in_.slots, group = head / (s_.heads / s_.groups), d = s_.head_dim;
    if (!real(token)) return;
    Doubles weights;
    double total = 0;
    for (int64_t slot = 0; slot <= token % in_.slots; ++slot) {
      double score = 0;
      for (int64_t i = 0; i < d; ++i) score += q[head * d + i] * out_.keys[key_at(batch, expert, group, slot) + i];
      weights.push_back(real(batch * in_.slots + slot) ? std::exp(score * in_.scale) : 0);
      total += weights.back();
    }
    for (size_t slot = 0; slot < weights.size(); ++slot)
      for (int64_t i = 0; i < d; ++i)
        a[head * d + i] += weights[slot] / total * out_.values[key_at(batch, expert, group, slot) + i];
  }

  Doubles feed_forward(const Doubles& n, int64_t expert) const {
    const Doubles gate = product(n.data(), w_.gate, expert, s_.hidden, s_.inner);
    Doubles inner = product(n.data(), w_.up, expert, s_.hidden, s_.inner);
    for (int64_t i = 0; i < s_.inner; ++i) inner[i] *= gate[i] / (1 + std::exp(-gate[i]));
    return product(inner.data(), w_.down, expert, s_.inner, s_.hidden);
  }

  // The token's experts, weights [K], renormalised.
  void decide(int64_t token, const Doubles& x) {
    const Doubles mid = product(x.data(), w_.router_in, 0, s_.hidden, s_.router_hidden);
    const Doubles z = product(mid.data(), w_.router_out, 0, s_.router_hidden, s_.experts);
    Doubles p;
    double total = 0, chosen = 0;
    for (const double value : z) p.push_back(std::exp(value - *std::max_element(z.begin(), z.end())));
    for (const double value : p) total += value;
    for (double& value : p) value /= total;
    std::vector<int32_t> order(s_.experts);
    for (int32_t e = 0; e < s_.experts; ++e) order[e] = e;
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return p[a] > p[b]; });
    if (!in_.ids.empty()) order.assign(in_.ids.begin() + token * in_.k, in_.ids.begin() + (token + 1) * in_.k);
    for (int64_t i = 0; i < in_.k; ++i) chosen += p[order[i]];
    for (int64_t i = 0; i < in_.k; ++i) {
      out_.ids.push_back(order[i]);
      out_.weights.push_back(p[order[i]] / (chosen + 1e-9));
    }
    out_.logits.insert(out_.logits.end(), z.begin(), z.end());
    out_.probs.insert(out_.probs.end(), p.begin(), p.end());
  }

  template <class Body>
  Doubles mixture(int64_t token, const Body& of_expert) const {
    Doubles y(s_.hidden, 0);
    if (!real(token)) return y;
    for (int64_t i = token * in_.k; i < (token + 1) * in_.k; ++i) {
      const Doubles part = of_expert(out_.ids[i]);
      for (int64_t h = 0; h < s_.hidden; ++h) y[h] += out_.weights[i] * part[h];
    }
    return y;
  }

  void whole_block(int64_t token) {
    decide(token, row(token));
    const Doubles y = mixture(token, [&](int64_t e) {
      const Doubles u = behind_attention(token, e);
      Doubles f = feed_forward(s_.post_norm ? u : norm(u, w_.post_attention_norm, e), e);
      if (s_.post_norm) f = norm(f, w_.post_ffn_norm, e);
      return sum(u, f);
    });
    out_.y.insert(out_.y.end(), y.begin(), y.end());
  }

  void shared_attention(int64_t token) {
    const Doubles u = behind_attention(token, 0);
    const Doubles n = s_.post_norm ? u : norm(u, w_.post_attention_norm, 0);
    decide(token, n);
    Doubles m = mixture(token, [&](int64_t e) { return feed_forward(n, e); });
    if (s_.post_norm) m = norm(m, w_.post_ffn_norm, 0);
    const Doubles y = sum(u, m);
    out_.y.insert(out_.y.end(), y.begin(), y.end());
  }

  const LayerSizes& s_;
  const LayerWeights& w_;
  const LayerInputs& in_;
  int64_t tokens_;
  LayerResults out_;
};

}  // namespace micro_kernels
