// Bytes of the small kernels between a layer's products, forward and backward.

#include <gtest/gtest.h>

#include <numeric>
#include <vector>

#include "backend.h"
#include "block_forward/block_forward.cuh"
#include "block_train/block_train.cuh"
#include "common/cuda/launch.cuh"
#include "elements.h"
#include "gates.h"

namespace micro_kernels::cuda {
namespace {

// Rows of a large backbone: what is known of a token in a few words is little beside them.
constexpr int64_t kTokens = 12, kHidden = 2048, kExperts = 4, kHeads = 32, kHeadDim = 64;

template <class T>
class GatesLayer : public testing::Test {
 protected:
  using Acc = accumulator_t<T>;
  static constexpr double kRow = kHidden * sizeof(T);
  static constexpr int kN = kVector<T>;

  static Buffer<T> rows(int64_t count) { return Buffer<T>(random_elements<T>(count * kHidden, 1)); }
  static Buffer<Acc> ones(int64_t count) { return Buffer<Acc>(std::vector<Acc>(count, Acc(1))); }
  static Buffer<int32_t> counted(int64_t count) {
    std::vector<int32_t> values(count);
    std::iota(values.begin(), values.end(), 0);
    return values;
  }
  // Tokens in order, a quarter of them for each expert.
  static Buffer<int32_t> experts() {
    std::vector<int32_t> values;
    for (int64_t n = 0; n < kTokens; ++n) values.push_back(static_cast<int32_t>(n * kExperts / kTokens));
    return values;
  }
  static Buffer<int32_t> offsets() {
    std::vector<int32_t> values;
    for (int64_t e = 0; e <= kExperts; ++e) values.push_back(static_cast<int32_t>(e * kTokens / kExperts));
    return values;
  }
  template <class Params>
  static void expect(void (*kernel)(Params), int64_t count, const Params& params, const Traffic& traffic) {
    expect_launches({traffic}, [&] {
      return launch(kernel, dim3(static_cast<unsigned>(ceil_div(count, kRowWarps))), dim3(kRowThreads), nullptr,
                    params);
    });
  }
};
using GatedTypes = testing::Types<float, BFloat16>;
TYPED_TEST_SUITE(GatesLayer, GatedTypes);

// What is read twice in a row comes from the first-level cache the second time: a row for its statistic and its norm.
TYPED_TEST(GatesLayer, Token) {
  using T = TypeParam;
  using Acc = accumulator_t<T>;
  using Test = TestFixture;
  const auto x = Test::rows(kTokens), mid = Test::rows(kTokens), router = Test::rows(kExperts);
  const Buffer<Acc> inverse(kTokens), probs(kTokens * kExperts), effective(kTokens * kExperts);
  const Buffer<T> logits(kTokens * kExperts), weights(kTokens);
  const Buffer<int32_t> keys(kTokens), values(kTokens), ids(kTokens);
  TokenStep step{};
  step.x = x.data(), step.inverse_rms = inverse.data();
  step.tokens = kTokens, step.hidden = step.router_width = kHidden, step.eps = 1e-5;
  step.places = {keys.data(), values.data(), {kHidden, 0, 0, 1}, {kHidden, 0, 0, 1}, 1, 1, kTokens, 0, nullptr};
  step.decides = true, step.router_input = mid.data(), step.router_out = router.data(), step.logits = logits.data();
  step.route.logits = logits.data(), step.route.ids = ids.data(), step.route.weights = weights.data();
  step.route.probs = probs.data(), step.route.effective = effective.data();
  step.route.tokens = kTokens, step.route.experts = kExperts, step.route.k = 1;
  // The router's matrix once more for each token. A word of each array that a token writes is a sector of its own.
  constexpr double kWords = 12 * 32;
  Test::expect(block_token_kernel<T, T, Test::kN, 4>, kTokens, step,
               {(2 * kTokens + kExperts) * Test::kRow, kTokens * kWords + (kTokens - 1) * kExperts * Test::kRow});
}

TYPED_TEST(GatesLayer, Join) {
  using T = TypeParam;
  using Test = TestFixture;
  const auto a = Test::rows(kTokens), b = Test::rows(kTokens), gain = Test::rows(kExperts);
  const auto tokens = Test::counted(kTokens), expert = Test::experts();
  const Buffer<T> y(kTokens * kHidden);
  JoinStep step{};
  step.a = a.data(), step.a_index = tokens.data(), step.b = b.data(), step.gain = gain.data();
  step.expert = expert.data(), step.y = y.data(), step.rows = kTokens, step.hidden = kHidden, step.eps = 1e-5;
  // b for its statistic and for its norm; the gain once for each row.
  Test::expect(block_join_kernel<T, Test::kN>, kTokens, step,
               {(3 * kTokens + kExperts) * Test::kRow, (2 * kTokens - kExperts) * Test::kRow + kTokens * 64.0});
}

TYPED_TEST(GatesLayer, Turn) {
  using T = TypeParam;
  using Acc = accumulator_t<T>;
  using Test = TestFixture;
  constexpr int kN = kVector<T> < 4 ? kVector<T> : 4;
  const auto q = Test::rows(kTokens), gain = Test::rows(kExperts);
  const auto tokens = Test::counted(kTokens), expert = Test::experts();
  const auto cos = Test::ones(kTokens * kHeadDim / 2), sin = Test::ones(kTokens * kHeadDim / 2);
  const Buffer<T> y(kTokens * kHidden);
  TurnStep step{};
  step.queries = {q.data(), y.data(), gain.data(), kTokens, kHeads, true};
  step.query_tokens = tokens.data(), step.query_experts = expert.data();
  step.tokens = step.slots = step.positions = kTokens;
  step.cos = cos.data(), step.sin = sin.data(), step.head_dim = kHeadDim, step.eps = 1e-5;
  // The angles of a token once for each head.
  constexpr double kAngles = kHeadDim * sizeof(Acc);
  Test::expect(block_turn_kernel<T, kN>, kTokens, step,
               {(2 * kTokens + kExperts) * Test::kRow + kTokens * kAngles,
                (2 * kTokens - kExperts) * Test::kRow + kTokens * ((kHeads - 1) * kAngles + 64)});
}

TYPED_TEST(GatesLayer, SplitAndGradients) {
  using T = TypeParam;
  using Acc = accumulator_t<T>;
  using Test = TestFixture;
  const auto grad_y = Test::rows(kTokens), u = Test::rows(kTokens), x = Test::rows(kTokens);
  const auto u_gain = Test::rows(kExperts), x_gain = Test::rows(kExperts);
  const auto tokens = Test::counted(kTokens), expert = Test::experts(), offsets = Test::offsets();
  const Buffer<T> weights(std::vector<T>(kTokens, T(Acc(1))));
  const Buffer<T> grad_out(kTokens * kHidden), normed_u(kTokens * kHidden), normed_x(kExperts * kTokens * kHidden);
  const Buffer<Acc> inverse_u(kTokens), inverse_x(kTokens);
  const double row = Test::kRow;
  SplitStep split{};
  split.tokens = tokens.data(), split.experts = expert.data(), split.offsets = offsets.data();
  split.inverse = tokens.data(), split.grad_y = grad_y.data(), split.weights = weights.data();
  split.grad_out = grad_out.data(), split.u = u.data(), split.u_gain = u_gain.data();
  split.normed_u = normed_u.data(), split.inverse_u = inverse_u.data(), split.x = x.data();
  split.x_gain = x_gain.data(), split.normed_x = normed_x.data(), split.inverse_x = inverse_x.data();
  split.tokens_count = split.pairs = kTokens, split.k = 1, split.hidden = kHidden, split.expert_count = kExperts;
  Test::expect(train_split_kernel<T, Test::kN>, 2 * kTokens, split,
               {((5 + kExperts) * kTokens + 2 * kExperts) * row,
                ((2 + 2 * kExperts) * kTokens - 2 * kExperts) * row + kTokens * 20 * 32});

  const Buffer<T> grad_u(kTokens * kHidden);
  const auto grad_normed = Test::rows(kTokens);
  const GradNormStep norm{grad_out.data(), grad_normed.data(),        u.data(),      u_gain.data(), inverse_u.data(),
                          expert.data(),   offsets.data() + kExperts, grad_u.data(), kTokens,       kHidden};
  Test::expect(train_grad_norm_kernel<T, Test::kN>, kTokens, norm,
               {(4 * kTokens + kExperts) * row, (4 * kTokens - kExperts) * row + kTokens * 96});

  // Keys of all experts: everything twice, for the norm's mean and for the result.
  const auto grad_keys = Test::rows(kExperts * kTokens), grad_rows = Test::rows(kTokens);
  const Buffer<T> grad_x(kTokens * kHidden);
  const GradInputStep input{expert.data(),
                            offsets.data(),
                            tokens.data(),
                            grad_keys.data(),
                            grad_rows.data(),
                            grad_u.data(),
                            nullptr,
                            x.data(),
                            x_gain.data(),
                            inverse_x.data(),
                            grad_x.data(),
                            kTokens,
                            1,
                            kHidden,
                            kExperts};
  const double vectors = kHidden / (32.0 * Test::kN), words = 2 * vectors * (2 * kExperts + 3) * 32;
  Test::expect(train_grad_input_kernel<T, Test::kN>, kTokens, input,
               {((kExperts + 4) * kTokens + kExperts) * row,
                ((2 * kExperts + 5) * kTokens + (kExperts - 1) * kTokens) * row + kTokens * words});
}

}  // namespace
}  // namespace micro_kernels::cuda
