// Routed attention against plain loops in double. The suite runs once per instruction set (MICRO_ISA).

#include "micro_kernels/expert_attention.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "elements.h"
#include "micro_kernels/isa.h"

namespace micro_kernels {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct Backend {
  const char* name;
  Status (*forward)(const ExpertAttentionParams&);
  Status (*backward)(const ExpertAttentionBackwardParams&);
};

constexpr Backend kBackends[] = {
    {"cpu", [](const ExpertAttentionParams& p) { return cpu::expert_attention(p, serial); },
     [](const ExpertAttentionBackwardParams& p) { return cpu::expert_attention_backward(p, serial); }},
};

struct Shape {
  int64_t batch, slots, start, spare, heads, groups, head_dim;
  AttentionMask mask;
};

// Three experts, of which the last has no query. Every seventh value is larger: some scores dominate.
struct Problem {
  static constexpr int64_t kExperts = 3;
  Shape s;
  int64_t rows, keys;
  std::vector<int32_t> tokens, offsets{0};
  std::vector<float> q, k, v, grad_out, bias;
  std::vector<uint8_t> visible;

  explicit Problem(Shape shape) : s(shape), rows(s.batch * s.slots), keys(s.start + s.slots + s.spare) {
    std::mt19937 random(rows * 100 + s.head_dim);
    std::normal_distribution<float> normal;
    auto fill = [&](std::vector<float>& values, int64_t count) {
      for (int64_t i = 0; i < count; ++i) values.push_back(normal(random) * (i % 7 == 0 ? 4.0f : 1.0f));
    };
    std::vector<int> expert(rows);
    for (int& e : expert) e = random() % 2;
    for (int e = 0; e < kExperts; ++e) {
      for (int64_t t = 0; t < rows; ++t)
        if (expert[t] == e) tokens.push_back(static_cast<int32_t>(t));
      offsets.push_back(static_cast<int32_t>(tokens.size()));
    }
    fill(q, rows * s.heads * s.head_dim);
    fill(grad_out, rows * s.heads * s.head_dim);
    fill(k, s.batch * kExperts * s.groups * keys * s.head_dim);
    fill(v, s.batch * kExperts * s.groups * keys * s.head_dim);
    fill(bias, s.batch * s.slots * keys);
    for (int64_t i = 0; i < s.batch * s.slots * keys; ++i) visible.push_back(random() % 3 > 0);
  }

  HeadStrides strides() const {
    const int64_t group = keys * s.head_dim;
    return {kExperts * s.groups * group, s.groups * group, group, s.head_dim};
  }
  const void* mask() const {
    if (s.mask == AttentionMask::kNone) return nullptr;
    return s.mask == AttentionMask::kBias ? static_cast<const void*>(bias.data()) : visible.data();
  }
  ExpertAttentionShape params() const {
    return {.tokens = tokens.data(),
            .offsets = offsets.data(),
            .mask = mask(),
            .mask_kind = s.mask,
            .masks = s.batch,
            .rows = rows,
            .heads = s.heads,
            .groups = s.groups,
            .head_dim = s.head_dim,
            .batch = s.batch,
            .experts = kExperts,
            .slots = s.slots,
            .keys = keys,
            .start = s.start,
            .starts = nullptr,
            .scale = 0.3,
            .dtype = DType::kFloat32};
  }
  int64_t expert_of(int64_t n) const { return n < offsets[1] ? 0 : n < offsets[2] ? 1 : 2; }
  int64_t query(int64_t n, int64_t a) const { return (n * s.heads + a) * s.head_dim; }
  int64_t key(int64_t n, int64_t a, int64_t j) const {
    const int64_t b = tokens[n] / s.slots, g = a / (s.heads / s.groups);
    return (((b * kExperts + expert_of(n)) * s.groups + g) * keys + j) * s.head_dim;
  }

  // -inf hides.
  double addition(int64_t n, int64_t j) const {
    const int64_t b = tokens[n] / s.slots, slot = tokens[n] % s.slots, own = s.start + slot;
    const int64_t pair = (b * s.slots + slot) * keys;
    switch (s.mask) {
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

  double dot(const std::vector<float>& x, int64_t i, const std::vector<float>& y, int64_t j) const {
    double sum = 0;
    for (int64_t d = 0; d < s.head_dim; ++d) sum += double(x[i + d]) * y[j + d];
    return sum;
  }

  // Softmax weights of one query; all 0 where nothing is seen.
  std::vector<double> weights(int64_t n, int64_t a) const {
    std::vector<double> p(keys);
    double top = -kInfinity, sum = 0;
    for (int64_t j = 0; j < keys; ++j) {
      p[j] = 0.3 * dot(q, query(n, a), k, key(n, a, j)) + addition(n, j);
      top = std::max(top, p[j]);
    }
    for (double& x : p) sum += x = top == -kInfinity ? 0 : std::exp(x - top);
    for (double& x : p) x /= sum == 0 ? 1 : sum;
    return p;
  }
};

struct Gradients {
  std::vector<double> q, k, v;
};

Gradients gradients(const Problem& x) {
  Gradients want{std::vector<double>(x.q.size()), std::vector<double>(x.k.size()), std::vector<double>(x.v.size())};
  for (int64_t n = 0; n < x.rows; ++n)
    for (int64_t a = 0; a < x.s.heads; ++a) {
      const std::vector<double> p = x.weights(n, a);
      double delta = 0;
      for (int64_t j = 0; j < x.keys; ++j) delta += p[j] * x.dot(x.grad_out, x.query(n, a), x.v, x.key(n, a, j));
      for (int64_t j = 0; j < x.keys; ++j) {
        const int64_t at = x.key(n, a, j);
        const double ds = 0.3 * p[j] * (x.dot(x.grad_out, x.query(n, a), x.v, at) - delta);
        for (int64_t d = 0; d < x.s.head_dim; ++d) {
          want.v[at + d] += p[j] * x.grad_out[x.query(n, a) + d];
          want.k[at + d] += ds * x.q[x.query(n, a) + d];
          want.q[x.query(n, a) + d] += ds * x.k[at + d];
        }
      }
    }
  return want;
}

// Relative to the largest value: 2e-5 is some hundred roundings of 2^-23 in the sums of a score and its gradient.
void expect_near(const std::vector<float>& got, const std::vector<double>& want) {
  double scale = 1;
  for (double w : want) scale = std::max(scale, std::abs(w));
  for (size_t i = 0; i < want.size(); ++i) ASSERT_NEAR(got[i], want[i], 2e-5 * scale) << "at " << i;
}

class ExpertAttentionTest : public testing::TestWithParam<std::tuple<Backend, Shape>> {
 protected:
  const Backend backend_ = std::get<0>(GetParam());
  const Problem x_{std::get<1>(GetParam())};
  std::vector<float> out_ = std::vector<float>(x_.q.size(), NAN);
  std::vector<float> logsumexp_ = std::vector<float>(x_.rows * x_.s.heads, NAN);

  Status forward() {
    return backend_.forward({x_.params(), x_.q.data(), x_.k.data(), x_.v.data(), x_.strides(), x_.strides(),
                             out_.data(), logsumexp_.data()});
  }
};

TEST_P(ExpertAttentionTest, ForwardEqualsTheDefinition) {
  ASSERT_EQ(forward(), Status::kOk);
  std::vector<double> want(x_.q.size());
  for (int64_t n = 0; n < x_.rows; ++n)
    for (int64_t a = 0; a < x_.s.heads; ++a) {
      const std::vector<double> p = x_.weights(n, a);
      for (int64_t j = 0; j < x_.keys; ++j)
        for (int64_t d = 0; d < x_.s.head_dim; ++d) want[x_.query(n, a) + d] += p[j] * x_.v[x_.key(n, a, j) + d];
    }
  expect_near(out_, want);
}

TEST_P(ExpertAttentionTest, BackwardEqualsTheDefinition) {
  ASSERT_EQ(forward(), Status::kOk);
  std::vector<float> grad_q(x_.q.size(), NAN), grad_k(x_.k.size(), NAN), grad_v(x_.v.size(), NAN);
  ASSERT_EQ(backend_.backward({x_.params(), x_.grad_out.data(), x_.q.data(), x_.k.data(), x_.v.data(), out_.data(),
                               logsumexp_.data(), x_.strides(), x_.strides(), grad_q.data(), grad_k.data(),
                               grad_v.data(), x_.strides(), x_.strides()}),
            Status::kOk);
  const Gradients want = gradients(x_);
  expect_near(grad_q, want.q);
  expect_near(grad_k, want.k);
  expect_near(grad_v, want.v);
}

constexpr AttentionMask kNone = AttentionMask::kNone;
INSTANTIATE_TEST_SUITE_P(
    Shapes, ExpertAttentionTest,
    testing::Combine(testing::ValuesIn(kBackends),
                     testing::Values(Shape{1, 1, 0, 0, 1, 1, 8, kNone}, Shape{2, 31, 0, 0, 6, 2, 16, kNone},
                                     Shape{1, 129, 0, 5, 3, 1, 64, kNone}, Shape{2, 1, 70, 9, 9, 3, 24, kNone},
                                     Shape{1, 20, 64, 0, 33, 1, 8, kNone}, Shape{1, 12, 3, 0, 2, 2, 256, kNone},
                                     Shape{2, 66, 5, 0, 4, 2, 40, AttentionMask::kKeys},
                                     Shape{2, 33, 40, 0, 4, 2, 16, AttentionMask::kPairs},
                                     Shape{2, 33, 40, 0, 4, 1, 16, AttentionMask::kBias})),
    [](const auto& info) {
      const Shape& s = std::get<1>(info.param);
      return std::string(std::get<0>(info.param).name) + "_B" + std::to_string(s.batch) + "_S" +
             std::to_string(s.slots) + "_A" + std::to_string(s.heads) + "_D" + std::to_string(s.head_dim) + "_mask" +
             std::to_string(static_cast<int>(s.mask));
    });

TEST(ExpertAttention, ABrokenPlanIsRefused) {
  Problem x(Shape{1, 6, 0, 0, 1, 1, 8, kNone});
  std::vector<float> out(x.q.size()), logsumexp(x.rows);
  auto run = [&] {
    return cpu::expert_attention(
        {x.params(), x.q.data(), x.k.data(), x.v.data(), x.strides(), x.strides(), out.data(), logsumexp.data()},
        serial);
  };
  ASSERT_EQ(run(), Status::kOk);
  const Problem good = x;
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
  const Problem x(Shape{2, 90, 0, 0, 4, 2, 16, kNone});
  auto run = [&](const ParallelFor& parallel_for) {
    std::vector<float> out(x.q.size(), NAN), logsumexp(x.rows * x.s.heads, NAN);
    EXPECT_EQ(cpu::expert_attention({x.params(), x.q.data(), x.k.data(), x.v.data(), x.strides(), x.strides(),
                                     out.data(), logsumexp.data()},
                                    parallel_for),
              Status::kOk);
    return out;
  };
  const ParallelFor backwards = [](int64_t count, int64_t, const auto& body) {
    for (int64_t i = count; i-- > 0;) body(i, i + 1);
  };
  EXPECT_EQ(run(serial), run(backwards));
}

// Rows of one batch with starts and lengths of their own.
class RaggedRows : public testing::TestWithParam<AttentionMask> {
 protected:
  const Problem x_{Shape{3, 40, 0, 60, 4, 2, 16, GetParam()}};
  const std::vector<int32_t> starts_{31, 0, 60}, lengths_{40, 7, 33};
  const int64_t query_ = x_.s.heads * x_.s.head_dim, keys_ = x_.strides().batch;

  // The plan of some batch rows, without padding; `from` says where in the problem's plan a row stood.
  struct Plan {
    std::vector<int32_t> tokens, offsets{0};
    std::vector<int64_t> from;
  };
  Plan plan_of(int64_t first, int64_t end) const {
    Plan plan;
    for (int e = 0; e < Problem::kExperts; ++e) {
      for (int64_t n = x_.offsets[e]; n < x_.offsets[e + 1]; ++n) {
        const int64_t b = x_.tokens[n] / x_.s.slots;
        if (b < first || b >= end || x_.tokens[n] % x_.s.slots >= lengths_[b]) continue;
        plan.tokens.push_back(static_cast<int32_t>(x_.tokens[n] - first * x_.s.slots));
        plan.from.push_back(n);
      }
      plan.offsets.push_back(static_cast<int32_t>(plan.tokens.size()));
    }
    return plan;
  }

  static std::vector<float> rows_of(const std::vector<float>& values, int64_t size, const std::vector<int64_t>& rows) {
    std::vector<float> gathered;
    for (int64_t n : rows) gathered.insert(gathered.end(), values.begin() + n * size, values.begin() + (n + 1) * size);
    return gathered;
  }

  struct Result {
    std::vector<float> out, logsumexp, grad_q, grad_k, grad_v;
  };
  Result run(const Plan& plan, int64_t b, ExpertAttentionShape shape) const {
    shape.tokens = plan.tokens.data();
    shape.offsets = plan.offsets.data();
    shape.rows = static_cast<int64_t>(plan.tokens.size());
    const std::vector<float> q = rows_of(x_.q, query_, plan.from), grad_out = rows_of(x_.grad_out, query_, plan.from);
    const float *k = x_.k.data() + b * keys_, *v = x_.v.data() + b * keys_;
    const HeadStrides strides = x_.strides();
    const std::vector<float> empty_keys(shape.batch * keys_, NAN);
    Result r{q, std::vector<float>(shape.rows * shape.heads, NAN), q, empty_keys, empty_keys};
    EXPECT_EQ(
        cpu::expert_attention({shape, q.data(), k, v, strides, strides, r.out.data(), r.logsumexp.data()}, serial),
        Status::kOk);
    EXPECT_EQ(cpu::expert_attention_backward(
                  {shape, grad_out.data(), q.data(), k, v, r.out.data(), r.logsumexp.data(), strides, strides,
                   r.grad_q.data(), r.grad_k.data(), r.grad_v.data(), strides, strides},
                  serial),
              Status::kOk);
    return r;
  }
};

TEST_P(RaggedRows, EachIsWhatItIsAloneBitForBit) {
  const Plan plan = plan_of(0, x_.s.batch);
  ExpertAttentionShape shape = x_.params();
  shape.starts = starts_.data();
  const Result together = run(plan, 0, shape);
  for (int64_t b = 0; b < x_.s.batch; ++b) {
    ExpertAttentionShape one = x_.params();
    one.batch = one.masks = 1;
    one.start = starts_[b];
    if (one.mask) one.mask = x_.visible.data() + b * x_.keys;
    const Plan own = plan_of(b, b + 1);
    const Result alone = run(own, b, one);
    std::vector<int64_t> at;
    for (int64_t n : own.from) at.push_back(std::find(plan.from.begin(), plan.from.end(), n) - plan.from.begin());
    EXPECT_EQ(rows_of(together.out, query_, at), alone.out);
    EXPECT_EQ(rows_of(together.grad_q, query_, at), alone.grad_q);
    EXPECT_EQ(rows_of(together.logsumexp, x_.s.heads, at), alone.logsumexp);
    EXPECT_EQ(rows_of(together.grad_k, keys_, {b}), alone.grad_k);
    EXPECT_EQ(rows_of(together.grad_v, keys_, {b}), alone.grad_v);
  }
}

INSTANTIATE_TEST_SUITE_P(Masks, RaggedRows, testing::Values(kNone, AttentionMask::kKeys));

TEST(ExpertAttention, AStartBehindTheKeysIsRefused) {
  const Problem x(Shape{2, 3, 4, 0, 1, 1, 8, kNone});
  std::vector<float> out(x.q.size()), logsumexp(x.rows);
  const auto run_from = [&](std::vector<int32_t> starts) {
    ExpertAttentionShape shape = x.params();
    shape.starts = starts.data();
    return cpu::expert_attention(
        {shape, x.q.data(), x.k.data(), x.v.data(), x.strides(), x.strides(), out.data(), logsumexp.data()}, serial);
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
