#include "micro/expert_attention.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <gtest/gtest.h>

#include <cmath>
#include <vector>

namespace {

constexpr int64_t kHeads = 4, kGroups = 2, kSize = 8, kSlots = 5;

at::Tensor int32(std::initializer_list<int64_t> values) { return at::tensor(values, at::kInt); }

// One sequence of five tokens; 0, 1 and 4 are the first expert's, 2 and 3 the second's.
const std::initializer_list<int64_t> kTokens{0, 1, 4, 2, 3}, kOffsets{0, 3, 5};

// Row by row: softmax over the slots up to its own, of the keys of its expert.
at::Tensor by_hand(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
  std::vector<at::Tensor> rows;
  for (int64_t n = 0; n < kSlots; ++n) {
    const int64_t expert = n < 3 ? 0 : 1, seen = kTokens.begin()[n] + 1;
    std::vector<at::Tensor> heads;
    for (int64_t a = 0; a < kHeads; ++a) {
      const int64_t group = a / (kHeads / kGroups);
      const at::Tensor keys = k[0][expert][group].slice(0, 0, seen), values = v[0][expert][group].slice(0, 0, seen);
      heads.push_back(at::matmul(at::softmax(at::matmul(keys, q[n][a]) / std::sqrt(double{kSize}), 0), values));
    }
    rows.push_back(at::stack(heads));
  }
  return at::stack(rows);
}

TEST(ExpertAttention, EqualsItsFormulaWithGradients) {
  const auto leaf = [](at::IntArrayRef shape) { return at::randn(shape, at::kDouble).requires_grad_(); };
  const at::Tensor q = leaf({kSlots, kHeads, kSize});
  const at::Tensor k = leaf({1, 2, kGroups, kSlots, kSize}), v = leaf({1, 2, kGroups, kSlots, kSize});
  const at::Tensor upstream = at::randn({kSlots, kHeads, kSize}, at::kDouble);
  const at::Tensor got = micro::expert_attention(q, k, v, int32(kTokens), int32(kOffsets), kSlots);
  got.backward(upstream);
  std::vector<at::Tensor> gradients;
  for (const at::Tensor& leaf : {q, k, v}) {
    gradients.push_back(leaf.grad().clone());
    leaf.mutable_grad() = at::Tensor();
  }
  const at::Tensor want = by_hand(q, k, v);
  want.backward(upstream);
  EXPECT_TRUE(at::allclose(got, want));
  EXPECT_TRUE(at::allclose(gradients[0], q.grad()));
  EXPECT_TRUE(at::allclose(gradients[1], k.grad()));
  EXPECT_TRUE(at::allclose(gradients[2], v.grad()));
}

TEST(ExpertAttention, ACallMayGoOnFromCachedSlots) {
  const at::Tensor q = at::randn({2, kHeads, kSize}), k = at::randn({1, 1, kGroups, 7, kSize});
  const at::Tensor v = at::randn({1, 1, kGroups, 7, kSize}), both = int32({0, 1}), offsets = int32({0, 2});
  const at::Tensor at_once = micro::expert_attention(q, k, v, both, offsets, 2, 3);
  const at::Tensor later = micro::expert_attention(q.slice(0, 1), k, v, int32({0}), int32({0, 1}), 1, 4);
  EXPECT_TRUE(at::equal(at_once[1], later[0]));
}

TEST(ExpertAttention, PaddingIsNeitherSeenNorSees) {
  const at::Tensor q = at::randn({2, kHeads, kSize}), k = at::randn({1, 1, kGroups, 2, kSize});
  const at::Tensor v = at::randn({1, 1, kGroups, 2, kSize}), mask = at::tensor({0, 1}).to(at::kBool).unsqueeze(0);
  const at::Tensor out = micro::expert_attention(q, k, v, int32({0, 1}), int32({0, 2}), 2, 0, mask);
  EXPECT_EQ(out[0].abs().max().item<float>(), 0.0f);
  EXPECT_TRUE(at::allclose(out[1], v[0][0].select(1, 1).repeat_interleave(kHeads / kGroups, 0)));
}

TEST(ExpertAttention, MistakesAreNamed) {
  const at::Tensor q = at::ones({1, kHeads, kSize}), k = at::ones({1, 1, kGroups, 1, kSize});
  const at::Tensor token = int32({0}), offsets = int32({0, 1});
  EXPECT_THROW(micro::expert_attention(q, k, k, token, offsets, 2), c10::ValueError);  // two slots, one key
  EXPECT_THROW(micro::expert_attention(q, k, k, token, int32({0, 1, 1}), 1), c10::ValueError);
  EXPECT_THROW(micro::expert_attention(q, k, k.to(at::kDouble), token, offsets, 1), c10::TypeError);
  EXPECT_THROW(micro::expert_attention(q, k, k, token.to(at::kLong), offsets, 1), c10::TypeError);
}

}  // namespace
