// Routed attention on the CPU alone: refused plans, the order of the work, and bits across its ways of computing. The
// suite runs once per instruction set (MICRO_ISA).

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <utility>
#include <vector>

#include "attention_problem.h"
#include "micro_kernels/isa.h"

namespace micro_kernels {
namespace {

constexpr AttentionMask kNone = AttentionMask::kNone;

TEST(ExpertAttention, ABrokenPlanIsRefused) {
  AttentionProblem<float> x({1, 6, 0, 0, 1, 1, 8, kNone});
  const auto run = [&] { return AttentionTensors<float>(x).forward(); };
  ASSERT_EQ(run(), Status::kOk);
  const AttentionProblem<float> good = x;
  x.tokens.back() = 6;
  EXPECT_EQ(run(), Status::kIndexOutOfRange);
  x = good;
  x.offsets.back() = 7;
  EXPECT_EQ(run(), Status::kIndexOutOfRange);
  x = good;
  x.offsets = {0, 6, 6, 6};
  x.tokens = {0, 1, 3, 2, 4, 5};
  EXPECT_EQ(run(), Status::kIndexOutOfRange);
}

// Who takes which item must not show in the result.
TEST(ExpertAttention, TheOrderOfTheWorkDoesNotShow) {
  const AttentionProblem<float> x({2, 90, 0, 0, 4, 2, 16, kNone});
  const auto run = [&](const ParallelFor& parallel_for) {
    AttentionTensors<float> t(x);
    EXPECT_EQ(cpu::expert_attention({t.shape(), t.q.data(), t.k.data(), t.v.data(), x.strides(), x.strides(),
                                     t.out.data(), t.logsumexp.data()},
                                    parallel_for),
              Status::kOk);
    return t.out.read();
  };
  const ParallelFor backwards = [](int64_t count, int64_t, const auto& body) {
    for (int64_t i = count; i-- > 0;) body(i, i + 1);
  };
  EXPECT_EQ(run(serial), run(backwards));
}

TEST(ExpertAttention, AStartBehindTheKeysIsRefused) {
  const AttentionProblem<float> x({2, 3, 4, 0, 1, 1, 8, kNone});
  AttentionTensors<float> t(x);
  const auto run_from = [&](std::vector<int32_t> starts) {
    ExpertAttentionShape shape = t.shape();
    shape.starts = starts.data();
    return cpu::expert_attention(
        {shape, t.q.data(), t.k.data(), t.v.data(), x.strides(), x.strides(), t.out.data(), t.logsumexp.data()},
        serial);
  };
  EXPECT_EQ(run_from({4, 0}), Status::kOk);
  EXPECT_EQ(run_from({4, 5}), Status::kIndexOutOfRange);
  EXPECT_EQ(run_from({-1, 0}), Status::kIndexOutOfRange);
}

// ---- however many tokens come at once, and in whatever call, a token's bits are the same ---------------------------

template <class T>
struct AttentionInPieces : testing::Test {
  using Acc = accumulator_t<T>;
  static constexpr int64_t kTokens = 140, kGroups = 2;

  struct Inputs {
    int64_t heads, head_dim;
    AttentionMask mask;
    std::vector<T> q = random_elements<T>(kTokens * heads * head_dim, 1);
    std::vector<T> k = random_elements<T>(kTokens * kGroups * head_dim, 2);
    std::vector<T> v = random_elements<T>(kTokens * kGroups * head_dim, 3);
    std::vector<Acc> bias = random_elements<Acc>(kTokens * kTokens, 4);
    std::vector<uint8_t> real = std::vector<uint8_t>(kTokens, 1);
  };

  // Tokens `count` at a time. The keys lie as a projection leaves them, [J, G, D].
  static std::pair<std::vector<T>, std::vector<Acc>> run(const Inputs& x, int64_t count) {
    const int64_t row = x.heads * x.head_dim;
    std::vector<T> out(x.q.size());
    std::vector<Acc> logsumexp(kTokens * x.heads);
    for (int64_t first = 0; first < kTokens; first += count) {
      const int64_t slots = std::min(count, kTokens - first);
      std::vector<int32_t> tokens(slots);
      std::iota(tokens.begin(), tokens.end(), 0);
      const int32_t offsets[] = {0, static_cast<int32_t>(slots)};
      const bool pairwise = x.mask == AttentionMask::kBias;
      const ExpertAttentionShape shape{
          .tokens = tokens.data(),
          .offsets = offsets,
          .mask = pairwise ? static_cast<const void*>(x.bias.data() + first * kTokens) : x.real.data(),
          .mask_kind = x.mask,
          .masks = 1,
          .rows = slots,
          .heads = x.heads,
          .groups = kGroups,
          .head_dim = x.head_dim,
          .batch = 1,
          .experts = 1,
          .slots = slots,
          .keys = kTokens,
          .start = first,
          .starts = nullptr,
          .scale = 0.2,
          .dtype = kDTypeOf<T>};
      const HeadStrides strides{0, 0, x.head_dim, kGroups * x.head_dim};
      EXPECT_EQ(cpu::expert_attention({shape, x.q.data() + first * row, x.k.data(), x.v.data(), strides, strides,
                                       out.data() + first * row, logsumexp.data() + first * x.heads},
                                      serial),
                Status::kOk);
    }
    return {out, logsumexp};
  }
};
TYPED_TEST_SUITE(AttentionInPieces, ElementTypes);

TYPED_TEST(AttentionInPieces, ATokenKeepsItsBits) {
  for (int64_t heads : {2, 6, 10, 16})
    for (int64_t head_dim : {8, 40, 64, 96})
      for (AttentionMask mask : {AttentionMask::kNone, AttentionMask::kKeys, AttentionMask::kBias}) {
        SCOPED_TRACE(testing::Message() << heads << " heads of " << head_dim << ", mask " << static_cast<int>(mask));
        typename TestFixture::Inputs x{heads, head_dim, mask};
        if (mask == AttentionMask::kKeys) std::fill_n(x.real.begin(), 70, 0);  // left padding
        const auto [out, logsumexp] = TestFixture::run(x, TestFixture::kTokens);
        for (int64_t count : {1, 2, 33}) {
          SCOPED_TRACE(count);
          const auto [out_in_pieces, logsumexp_in_pieces] = TestFixture::run(x, count);
          expect_same_bits(out_in_pieces, out);
          expect_same_bits(logsumexp_in_pieces, logsumexp);
        }
      }
}

TEST(Isa, TheChoiceIsNamedAndNeverAboveTheBest) {
  const cpu::IsaChoice& choice = cpu::isa_choice();
  EXPECT_LE(choice.isa, choice.best);
  if (!choice.honoured) {
    EXPECT_EQ(choice.isa, choice.best);
  } else if (choice.requested) {
    EXPECT_STREQ(cpu::isa_name(choice.isa), choice.requested);
  }
}

}  // namespace
}  // namespace micro_kernels
