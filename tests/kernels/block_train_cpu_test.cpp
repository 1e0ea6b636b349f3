// The gradient of a whole layer on the CPU against differences of the forward, and against itself under threads,
// policies and partial wishes.

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <vector>

#include "block_forward_layer.h"
#include "micro_kernels/block_train.h"

namespace micro_kernels {
namespace {

constexpr int64_t kBatch = 2, kSlots = 5, kTokens = kBatch * kSlots;

enum class Keeps { kAll, kNothing };

// A layer, what its forward kept, and a gradient for each result.
template <class T>
struct Training {
  using Acc = accumulator_t<T>;
  Weights<T> w;
  Call<T> call;
  int64_t pairs;
  std::vector<int32_t> tokens, experts, offsets, inverse;
  std::vector<T> q, k, v, attention, behind, mid, gate, up, out, grad_y, grad_raw;
  std::vector<Acc> logsumexp, grad_probs;
  BlockSaved saved{};

  Training(bool post, int64_t per_token, Keeps keeps)
      : w(true, post),
        call(w, random_values<T>(kTokens * kHidden, 7, 1), kBatch, 0, per_token, kSlots),
        pairs(kTokens * per_token),
        tokens(pairs),
        experts(pairs),
        offsets(kExperts + 1),
        inverse(pairs),
        q(pairs * kQueries),
        k(kTokens * kExperts * kKeys),
        v(k.size()),
        attention(q.size()),
        behind(pairs * kHidden),
        mid(kTokens * kRouter),
        gate(pairs * kInner),
        up(gate.size()),
        out(behind.size()),
        grad_y(random_values<T>(kTokens * kHidden, 8, 1)),
        grad_raw(random_values<T>(kTokens * kExperts, 9, 1)),
        logsumexp(pairs * kHeads),
        grad_probs(random_values<Acc>(kTokens * kExperts, 10, 1)) {
    saved = {.tokens = tokens.data(),
             .experts = experts.data(),
             .offsets = offsets.data(),
             .inverse = inverse.data(),
             .q = q.data(),
             .k = k.data(),
             .v = v.data(),
             .attention = attention.data(),
             .logsumexp = logsumexp.data(),
             .behind = behind.data(),
             .router_mid = nullptr,
             .gate = nullptr,
             .up = nullptr,
             .out = nullptr};
    if (keeps == Keeps::kAll) saved.router_mid = mid.data(), saved.gate = gate.data();
    if (keeps == Keeps::kAll) saved.up = up.data(), saved.out = out.data();
    call.real.assign(kTokens, 1);
    call.real[0] = 0;
  }
  Training(const Training&) = delete;

  BlockForwardParams forward_params() {
    BlockForwardParams p = call.params(nullptr, nullptr);
    p.position = nullptr;
    p.route.rule = WeightRule::kProbability;
    return p;
  }

  Status forward(const ParallelFor& parallel_for = serial) {
    BlockForwardParams p = forward_params();
    p.saved = &saved;
    return run(p, parallel_for);
  }

  // What is differentiated, from a forward that keeps nothing.
  double value() {
    EXPECT_EQ(run(forward_params()), Status::kOk);
    const auto dot = [](const auto& a, const auto& b) {
      double sum = 0;
      for (size_t i = 0; i < a.size(); ++i) sum += static_cast<double>(a[i]) * static_cast<double>(b[i]);
      return sum;
    };
    return dot(call.y, grad_y) + dot(call.raw, grad_raw) + dot(call.probs, grad_probs);
  }

  Status backward(const BlockGradients& grad, const ParallelFor& parallel_for = serial) {
    const BlockForwardParams f = forward_params();
    BlockTrainBackwardParams p{};
    p.shape = f.shape;
    p.weights = f.weights;
    p.saved = saved;
    p.x = call.x.data();
    p.batch = kBatch;
    p.slots = kSlots;
    p.cos = f.cos;
    p.sin = f.sin;
    p.scale = f.scale;
    p.routing = call.weights.data();
    p.route.ids = call.ids.data();
    p.route.probs = call.probs.data();
    p.route.effective = call.effective.data();
    p.route.grad_probs = grad_probs.data();
    p.route.k = call.k;
    p.route.rule = f.route.rule;
    p.grad_y = grad_y.data();
    p.grad_raw = grad_raw.data();
    p.grad = grad;
    std::vector<char> memory(cpu::block_train_backward_workspace(p) + 64, 0x7f);
    char* aligned = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64;
    return cpu::block_train_backward(p, aligned, parallel_for);
  }
};

// A parameter, and where its gradient goes.
template <class T>
struct Leaf {
  const char* name;
  std::vector<T>* values;
  void* BlockGradients::*place;
};

template <class T>
std::vector<Leaf<T>> leaves(Training<T>& t) {
  Weights<T>& w = t.w;
  std::vector<Leaf<T>> all{{"x", &t.call.x, &BlockGradients::x},
                           {"q", &w.q, &BlockGradients::q},
                           {"k", &w.k, &BlockGradients::k},
                           {"v", &w.v, &BlockGradients::v},
                           {"o", &w.o, &BlockGradients::o},
                           {"gate", &w.gate, &BlockGradients::gate},
                           {"up", &w.up, &BlockGradients::up},
                           {"down", &w.down, &BlockGradients::down},
                           {"router_in", &w.router_in, &BlockGradients::router_in},
                           {"router_out", &w.router_out, &BlockGradients::router_out},
                           {"post_attention_norm", &w.post_attention_norm, &BlockGradients::post_attention_norm}};
  if (!w.post_norm) {
    all.push_back({"input_norm", &w.input_norm, &BlockGradients::input_norm});
    return all;
  }
  all.push_back({"post_ffn_norm", &w.post_ffn_norm, &BlockGradients::post_ffn_norm});
  all.push_back({"q_norm", &w.q_norm, &BlockGradients::q_norm});
  all.push_back({"k_norm", &w.k_norm, &BlockGradients::k_norm});
  return all;
}

// Gradients of all leaves, or of one.
template <class T>
std::vector<std::vector<T>> gradients(Training<T>& t, const ParallelFor& parallel_for = serial, int64_t only = -1) {
  BlockGradients grad{};
  std::vector<std::vector<T>> values;
  const auto all = leaves(t);
  for (const Leaf<T>& leaf : all) values.emplace_back(leaf.values->size(), T(1e30f));
  for (size_t i = 0; i < all.size(); ++i)
    if (only < 0 || only == static_cast<int64_t>(i)) grad.*all[i].place = values[i].data();
  EXPECT_EQ(t.forward(parallel_for), Status::kOk);
  EXPECT_EQ(t.backward(grad, parallel_for), Status::kOk);
  return values;
}

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

TEST(BlockTrain, IsTheSlopeOfTheForward) {
  constexpr double kStep = 1e-6;
  for (const bool post : {false, true})
    for (const int64_t k : {1, 2}) {
      Training<double> t(post, k, Keeps::kAll);
      const auto found = gradients(t);
      const auto all = leaves(t);
      for (size_t i = 0; i < all.size(); ++i)
        for (size_t at = 1; at < all[i].values->size(); at += all[i].values->size() / 5) {
          double& value = (*all[i].values)[at];
          const double kept = value;
          value = kept + kStep;
          const double above = t.value();
          value = kept - kStep;
          const double below = t.value();
          value = kept;
          const double slope = (above - below) / (2 * kStep);
          EXPECT_NEAR(found[i][at], slope, 1e-5 * std::max(1.0, std::abs(slope)))
              << all[i].name << " " << at << " post " << post << " k " << k;
        }
    }
}

template <class T>
struct BlockTrain : testing::Test {};
using Types = testing::Types<float, double, BFloat16>;
TYPED_TEST_SUITE(BlockTrain, Types);

TYPED_TEST(BlockTrain, OneGradientThreadsAndPolicies) {
  for (const bool post : {false, true})
    for (const int64_t k : {1, 2}) {
      Training<TypeParam> t(post, k, Keeps::kAll), lean(post, k, Keeps::kNothing);
      const auto want = gradients(t), threads = gradients(t, two_threads), again = gradients(lean);
      for (size_t i = 0; i < want.size(); ++i) {
        SCOPED_TRACE(testing::Message() << leaves(t)[i].name << " post " << post << " k " << k);
        EXPECT_TRUE(same_bits(threads[i], want[i]));
        EXPECT_TRUE(same_bits(again[i], want[i]));
        EXPECT_TRUE(same_bits(gradients(lean, serial, static_cast<int64_t>(i))[i], want[i])) << "alone";
      }
    }
}

TYPED_TEST(BlockTrain, WhatIsKeptDoesNotChangeTheForward) {
  for (const bool post : {false, true}) {
    Training<TypeParam> t(post, 1, Keeps::kAll), plain(post, 1, Keeps::kNothing);
    ASSERT_EQ(t.forward(), Status::kOk);
    ASSERT_EQ(run(plain.forward_params()), Status::kOk);
    EXPECT_TRUE(same_bits(t.call.y, plain.call.y));
  }
}

}  // namespace
}  // namespace micro_kernels
