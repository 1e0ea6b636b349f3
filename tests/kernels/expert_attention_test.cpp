// Routed attention against its definition, on whichever back end this program was built for.

#include "micro_kernels/expert_attention.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "attention_problem.h"
#include "expert_attention/attention_launch.h"
#include "rounding.h"

namespace micro_kernels {
namespace {

constexpr AttentionMask kNone = AttentionMask::kNone, kKeys = AttentionMask::kKeys, kPairs = AttentionMask::kPairs,
                        kBias = AttentionMask::kBias;

// Rows and keys around the sizes of tiles and blocks, every head size that has kernels of its own, more heads than rows
// of a tile, few tokens in front of many keys, idle rows, and keys in other layouts.
std::vector<AttentionCase> cases() {
  std::vector<AttentionCase> all{
      {1, 1, 0, 0, 1, 1, 8, kNone},
      {2, 17, 0, 0, 6, 2, 16, kNone},
      {1, 65, 0, 5, 1, 1, 64, kNone, KeyLayout::kProjected},
      {2, 1, 20, 9, 6, 2, 24, kNone, KeyLayout::kProjected, 2},
      {1, 5, 60, 0, 33, 1, 8, kNone},
      {1, 6, 30, 0, 2, 1, 256, kNone},
      {1, 9, 60, 0, 2, 1, 128, kNone},
      {1, 2, 63, 0, 1, 1, 256, kNone},
      {1, 1, 66, 0, 4, 1, 128, kNone},
      {1, 3, 254, 3, 2, 1, 8, kNone},
      {1, 9, 10, 0, 2, 1, 16, kNone, KeyLayout::kOdd, 67},
      {1, 2, 14, 0, 2, 1, 16, kKeys, KeyLayout::kOdd},
      {2, 20, 50, 0, 2, 1, 40, kKeys, KeyLayout::kProjected},
      {1, 3, 255, 0, 2, 1, 8, kKeys},
      {2, 9, 60, 0, 2, 1, 16, kPairs},
      {1, 4, 254, 0, 2, 1, 8, kPairs},
      {2, 9, 60, 0, 2, 1, 16, kBias},
      {1, 3, 255, 0, 3, 1, 8, kBias},
  };
#ifndef MICRO_EMULATED  // where the size costs nothing
  const AttentionCase large[] = {
      {2, 31, 0, 0, 6, 2, 16, kNone},   {1, 129, 0, 5, 3, 1, 64, kNone},  {2, 3, 600, 9, 9, 3, 24, kNone},
      {1, 20, 64, 0, 33, 1, 8, kNone},  {1, 128, 3, 0, 2, 2, 256, kNone}, {2, 66, 5, 0, 4, 2, 40, kKeys},
      {2, 33, 40, 0, 4, 2, 16, kPairs}, {2, 33, 40, 0, 4, 1, 16, kBias},  {1, 127, 5, 0, 8, 2, 128, kNone},
  };
  all.insert(all.end(), std::begin(large), std::end(large));
#endif
  return all;
}

template <class T>
struct ExpertAttentionTest : testing::Test {};
TYPED_TEST_SUITE(ExpertAttentionTest, DeviceElementTypes);

TYPED_TEST(ExpertAttentionTest, ForwardEqualsTheDefinition) {
  for (const AttentionCase& c : cases()) {
    SCOPED_TRACE(name_of(c));
    const AttentionProblem<TypeParam> x(c);
    AttentionTensors<TypeParam> t(x);
    ASSERT_EQ(t.forward(), Status::kOk);
    const auto want = x.output();
    expect_near(t.out.read(), want.out, kAttentionBound<TypeParam>);
    expect_near(t.logsumexp.read(), want.logsumexp, std::min(kAttentionBound<TypeParam>, kAttentionBound<float>));
    if (testing::Test::HasFatalFailure()) return;
  }
}

// Padding between rows, where the layout has any, must stay as it is.
template <class T>
void expect_key_gradient(const AttentionProblem<T>& x, const Buffer<T>& grad, int64_t shift,
                         const std::vector<double>& want, double error) {
  std::vector<T> got = shift == 0 ? grad.read() : grad.read_raw();
  const T untouched = Buffer<T>(1).read_raw()[0];
  std::vector<bool> inside(got.size());
  for (int64_t b = 0; b < x.c.batch; ++b)
    for (int64_t e = 0; e < x.kExperts; ++e)
      for (int64_t g = 0; g < x.c.groups; ++g)
        for (int64_t j = 0; j < x.keys; ++j)
          std::fill_n(inside.begin() + shift + x.key(b, e, g, j), x.c.head_dim, true);
  for (size_t i = 0; i < got.size(); ++i)
    if (!inside[i]) {
      ASSERT_EQ(std::memcmp(&got[i], &untouched, sizeof(T)), 0) << "at " << i;
      got[i] = T(0);
    }
  got.erase(got.begin(), got.begin() + shift);
  expect_near(got, want, kAttentionBound<T>, error);
}

TYPED_TEST(ExpertAttentionTest, BackwardEqualsTheDefinition) {
  for (const AttentionCase& c : cases()) {
    SCOPED_TRACE(name_of(c));
    const AttentionProblem<TypeParam> x(c);
    AttentionTensors<TypeParam> t(x);
    ASSERT_EQ(t.forward(), Status::kOk);
    ASSERT_EQ(t.backward(), Status::kOk);
    const auto want = x.gradients();
    // Of the output in delta, and of the score and its logarithm of a sum in a weight: three roundings each.
    const double error = want.terms * (kRounding<TypeParam> + 6 * want.score * kRounding<accumulator_t<TypeParam>>);
    expect_near(t.grad_q.read(), want.q, kAttentionBound<TypeParam>, error);
    expect_key_gradient(x, t.grad_k, t.shift, want.k, error);
    expect_key_gradient(x, t.grad_v, t.shift, want.v, 0);
    if (testing::Test::HasFatalFailure()) return;
  }
}

// Whatever else is wanted, a gradient keeps its bits; the others are left alone.
TYPED_TEST(ExpertAttentionTest, EachGradientIsOptional) {
  for (int64_t head_dim : {16, 136}) {
    const AttentionProblem<TypeParam> x({1, 9, 3, 0, 2, 1, head_dim, kNone, KeyLayout::kPlain, 1});
    AttentionTensors<TypeParam> all(x);
    ASSERT_EQ(all.forward(), Status::kOk);
    ASSERT_EQ(all.backward(), Status::kOk);
    for (int only = 0; only < 3; ++only) {
      AttentionTensors<TypeParam> one(x);
      ASSERT_EQ(one.forward(), Status::kOk);
      ASSERT_EQ(one.backward(only == 0, only == 1, only == 2), Status::kOk);
      const AttentionTensors<TypeParam> untouched(x);
      expect_same_bits(one.grad_q.read_raw(), (only == 0 ? all : untouched).grad_q.read_raw());
      expect_same_bits(one.grad_k.read_raw(), (only == 1 ? all : untouched).grad_k.read_raw());
      expect_same_bits(one.grad_v.read_raw(), (only == 2 ? all : untouched).grad_v.read_raw());
    }
  }
}

TYPED_TEST(ExpertAttentionTest, NoQueryAtAll) {
  AttentionProblem<TypeParam> x({1, 2, 3, 0, 2, 1, 8, kNone});
  x.rows = x.used = 0;
  x.offsets = {0, 0, 0, 0};
  AttentionTensors<TypeParam> t(x);
  ASSERT_EQ(t.forward(), Status::kOk);
  ASSERT_EQ(t.backward(), Status::kOk);
  for (TypeParam grad : t.grad_k.read()) EXPECT_EQ(wide(grad), 0);
  for (TypeParam grad : t.grad_v.read()) EXPECT_EQ(wide(grad), 0);
}

// ---- rows of one batch with starts and lengths of their own --------------------------------------------------------

template <class T>
struct RaggedRows : testing::Test {
  const std::vector<int32_t> starts{31, 0, 60}, lengths{20, 7, 13};

  // The plan of some batch rows, without padding; `from` says where in the problem's plan a row stood.
  struct Plan {
    std::vector<int32_t> tokens, offsets{0};
    std::vector<int64_t> from;
  };
  Plan plan_of(const AttentionProblem<T>& x, int64_t first, int64_t end) const {
    Plan plan;
    for (int e = 0; e < x.kExperts; ++e) {
      for (int64_t n = x.offsets[e]; n < x.offsets[e + 1]; ++n) {
        const int64_t b = x.tokens[n] / x.c.slots;
        if (b < first || b >= end || x.tokens[n] % x.c.slots >= lengths[b]) continue;
        plan.tokens.push_back(static_cast<int32_t>(x.tokens[n] - first * x.c.slots));
        plan.from.push_back(n);
      }
      plan.offsets.push_back(static_cast<int32_t>(plan.tokens.size()));
    }
    return plan;
  }

  template <class Element>
  static std::vector<Element> rows_of(const std::vector<Element>& values, int64_t size,
                                      const std::vector<int64_t>& rows) {
    std::vector<Element> gathered;
    for (int64_t n : rows) gathered.insert(gathered.end(), values.begin() + n * size, values.begin() + (n + 1) * size);
    return gathered;
  }

  struct Result {
    std::vector<T> out, grad_q, grad_k, grad_v;
    std::vector<accumulator_t<T>> logsumexp;
  };
  // Batch rows first .. end of the problem. starts: one per row, or empty: `start` for all.
  Result run(const AttentionProblem<T>& x, int64_t first, int64_t end, const std::vector<int32_t>& own_starts,
             int64_t start) const {
    const Plan plan = plan_of(x, first, end);
    const int64_t query = x.c.heads * x.c.head_dim, keys = x.strides().batch, mask = x.keys;
    const auto batch_rows = [&](const auto& values, int64_t size) {
      return std::vector(values.begin() + first * size, values.begin() + end * size);
    };
    const Buffer<int32_t> tokens(plan.tokens), offsets(plan.offsets), row_starts(own_starts);
    const Buffer<uint8_t> visible(batch_rows(x.visible, mask));
    const Buffer<T> q(rows_of(x.q, query, plan.from)), grad_out(rows_of(x.grad_out, query, plan.from));
    const Buffer<T> k(batch_rows(x.k, keys)), v(batch_rows(x.v, keys));
    const auto rows = static_cast<int64_t>(plan.tokens.size());
    Buffer<T> out(rows * query), grad_q(rows * query), grad_k(k.size()), grad_v(k.size());
    Buffer<accumulator_t<T>> logsumexp(rows * x.c.heads);
    const ExpertAttentionShape shape{.tokens = tokens.data(),
                                     .offsets = offsets.data(),
                                     .mask = x.c.mask == kNone ? nullptr : visible.data(),
                                     .mask_kind = x.c.mask,
                                     .masks = end - first,
                                     .rows = rows,
                                     .heads = x.c.heads,
                                     .groups = x.c.groups,
                                     .head_dim = x.c.head_dim,
                                     .batch = end - first,
                                     .experts = x.kExperts,
                                     .slots = x.c.slots,
                                     .keys = x.keys,
                                     .start = start,
                                     .starts = own_starts.empty() ? nullptr : row_starts.data(),
                                     .scale = x.scale,
                                     .dtype = kDTypeOf<T>};
    const HeadStrides strides = x.strides();
    EXPECT_EQ(
        MICRO_RUN_WITH_WORKSPACE(expert_attention, ExpertAttentionParams{shape, q.data(), k.data(), v.data(), strides,
                                                                         strides, out.data(), logsumexp.data()}),
        Status::kOk);
    EXPECT_EQ(
        MICRO_RUN_WITH_WORKSPACE(expert_attention_backward,
                                 ExpertAttentionBackwardParams{
                                     shape, grad_out.data(), q.data(), k.data(), v.data(), out.data(), logsumexp.data(),
                                     strides, strides, grad_q.data(), grad_k.data(), grad_v.data(), strides, strides}),
        Status::kOk);
    return {out.read(), grad_q.read(), grad_k.read(), grad_v.read(), logsumexp.read()};
  }
};
TYPED_TEST_SUITE(RaggedRows, DeviceElementTypes);

TYPED_TEST(RaggedRows, EachIsWhatItIsAloneBitForBit) {
  for (AttentionMask mask : {kNone, kKeys}) {
    // The bits of numbers that no query may see would differ from row to row: all keys are numbers here.
    AttentionProblem<TypeParam> x({3, 20, 0, 60, 2, 1, 8, mask});
    for (auto* values : {&x.k, &x.v})
      for (size_t i = 0; i < values->size(); ++i)
        if (std::isnan(wide((*values)[i]))) (*values)[i] = TypeParam(static_cast<float>(i % 11) / 4 - 1);
    const int64_t query = x.c.heads * x.c.head_dim, keys = x.strides().batch;
    const auto together = this->run(x, 0, x.c.batch, this->starts, 0);
    const auto plan = this->plan_of(x, 0, x.c.batch);
    for (int64_t b = 0; b < x.c.batch; ++b) {
      const auto alone = this->run(x, b, b + 1, {}, this->starts[b]);
      std::vector<int64_t> at;
      for (int64_t n : this->plan_of(x, b, b + 1).from)
        at.push_back(std::find(plan.from.begin(), plan.from.end(), n) - plan.from.begin());
      expect_same_bits(this->rows_of(together.out, query, at), alone.out);
      expect_same_bits(this->rows_of(together.grad_q, query, at), alone.grad_q);
      expect_same_bits(this->rows_of(together.logsumexp, x.c.heads, at), alone.logsumexp);
      expect_same_bits(this->rows_of(together.grad_k, keys, {b}), alone.grad_k);
      expect_same_bits(this->rows_of(together.grad_v, keys, {b}), alone.grad_v);
    }
  }
}

// ---- a token's bits do not tell how many came with it, within the kernels for few tokens and within the others ------

template <class T>
std::vector<T> outputs_in_pieces(const std::vector<T>& q, const std::vector<T>& k, int64_t before, int64_t tokens,
                                 int64_t count) {
  constexpr int64_t kHeads = 3, kHead = 16, kRow = kHeads * kHead;
  const int64_t keys = before + tokens;
  const Buffer<T> key_buffer(k);
  std::vector<T> all;
  for (int64_t first = 0; first < tokens; first += count) {
    std::vector<int32_t> plan(count);
    std::iota(plan.begin(), plan.end(), 0);
    const Buffer<int32_t> plan_buffer(plan), offsets(std::vector<int32_t>{0, static_cast<int32_t>(count)});
    const Buffer<T> queries(std::vector<T>(q.begin() + first * kRow, q.begin() + (first + count) * kRow));
    Buffer<T> out(count * kRow);
    Buffer<accumulator_t<T>> logsumexp(count * kHeads);
    const ExpertAttentionShape shape{.tokens = plan_buffer.data(),
                                     .offsets = offsets.data(),
                                     .mask = nullptr,
                                     .mask_kind = kNone,
                                     .masks = 0,
                                     .rows = count,
                                     .heads = kHeads,
                                     .groups = 1,
                                     .head_dim = kHead,
                                     .batch = 1,
                                     .experts = 1,
                                     .slots = count,
                                     .keys = keys,
                                     .start = before + first,
                                     .starts = nullptr,
                                     .scale = 0.3,
                                     .dtype = kDTypeOf<T>};
    const HeadStrides strides{0, 0, 0, kHead};
    EXPECT_EQ(MICRO_RUN_WITH_WORKSPACE(
                  expert_attention, ExpertAttentionParams{shape, queries.data(), key_buffer.data(), key_buffer.data(),
                                                          strides, strides, out.data(), logsumexp.data()}),
              Status::kOk);
    const std::vector<T> piece = out.read();
    all.insert(all.end(), piece.begin(), piece.end());
  }
  return all;
}

TYPED_TEST(ExpertAttentionTest, ATokenKeepsItsBits) {
  constexpr int64_t kBefore = 258, kFew = 4, kMany = 10;
  const auto q = random_elements<TypeParam>(kMany * 48, 1), k = random_elements<TypeParam>((kBefore + kMany) * 16, 2);
  const auto few = [&](int64_t count) { return outputs_in_pieces(q, k, kBefore, kFew, count); };
  const auto many = [&](int64_t count) { return outputs_in_pieces(q, k, kBefore, kMany, count); };
  expect_same_bits(few(1), few(4));
  expect_same_bits(few(2), few(4));
  expect_same_bits(many(5), many(10));
}

// ---- products of whole tiles against what the queries need ---------------------------------------------------------

TEST(ExpertAttentionTiles, WasteLessThanAQuarter) {
  constexpr int64_t kTokens = 2048, kExperts = 4;
  for (int64_t heads : {1, 3, 4, 8})
    for (int64_t run : {1, 8}) {  // tokens that keep their expert
      std::mt19937 random(7);
      std::vector<std::vector<int32_t>> of(kExperts);
      for (int32_t t = 0, e = 0; t < kTokens; ++t) {
        if (t % run == 0) e = static_cast<int32_t>(random() % kExperts);
        of[e].push_back(t);
      }
      cuda::TileCount forward, backward;
      for (const std::vector<int32_t>& slots : of) {
        forward += cuda::forward_tiles(slots, heads);
        backward += cuda::grad_kv_tiles(slots, heads, kTokens);
      }
      EXPECT_EQ(forward.needed, backward.needed);
      EXPECT_GE(forward.issued, forward.needed);
      EXPECT_LE(forward.issued, 1.25 * forward.needed) << heads << " heads, runs of " << run;
      EXPECT_LE(backward.issued, 1.25 * backward.needed) << heads << " heads, runs of " << run;
    }
}

TEST(ExpertAttentionTiles, RowsFindTheirPosition) {
  for (int64_t heads : {1, 2, 3, 7, 12, 64, 100, 4095}) {
    ExpertAttentionShape shape{};
    shape.heads = 5 * heads;
    shape.groups = 5;
    const cuda::HeadCount count(shape);
    for (int64_t row = 0; row < std::numeric_limits<int32_t>::max(); row += row < 100000 ? 1 : 65521)
      ASSERT_EQ(count.position(static_cast<int>(row)), row / heads) << heads << " heads, row " << row;
    const int last = std::numeric_limits<int32_t>::max();
    ASSERT_EQ(count.position(last), last / heads);
  }
}

TEST(ExpertAttentionTiles, OneQueryNeedsItsKeysInWholeBlocks) {
  const cuda::TileCount one = cuda::forward_tiles({99}, 3);
  EXPECT_EQ(one.needed, 3 * 100);
  EXPECT_EQ(one.issued, 16 * 128);
}

}  // namespace
}  // namespace micro_kernels
