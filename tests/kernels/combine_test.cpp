// The weighted sum and its gradients. Sums have one order and every rounding its place, so all but the dot products is
// compared bit for bit.

#include "micro_kernels/combine.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <vector>

#include "backend.h"
#include "elements.h"
#include "offset.h"
#include "rounding.h"

namespace micro_kernels {
namespace {

struct Shape {
  int64_t tokens, k, hidden;
  int64_t offset = 0;  // of every row from its vectors, in elements
};

// Sizes around vectors, warps and the pieces of a row that a warp takes; more pairs than a warp has lanes, and than it
// takes at once in the backward.
const Shape kShapes[] = {{0, 2, 8},   {1, 1, 1},    {3, 2, 33},    {31, 4, 32}, {33, 1, 64}, {129, 1, 8},
                         {4, 3, 0},   {9, 3, 15},   {9, 3, 16},    {9, 3, 17},  {7, 2, 127}, {7, 2, 128},
                         {7, 2, 129}, {2, 2, 1032}, {5, 2, 64, 1}, {3, 5, 24},  {3, 33, 16}, {2, 70, 9}};

enum class Idle { kSome, kNone, kAll };

// Any permutation of the pairs, any experts (one of them several times for a token), and an idle last fifth, or none,
// or all: the kernel asks no more of a plan.
template <class T>
struct Problem {
  static constexpr int64_t kExperts = 4;
  Shape shape;
  int64_t rows;
  std::vector<int32_t> inverse, experts, offsets;
  std::vector<T> y, weights, grad;

  Problem(Shape s, Idle idle)
      : shape(s),
        rows(s.tokens * s.k),
        inverse(rows),
        offsets(kExperts + 1, 0),
        y(random_elements<T>(rows * s.hidden, 1)),
        weights(random_elements<T>(rows, 2)),
        grad(random_elements<T>(s.tokens * s.hidden, 3)) {
    std::mt19937 random(static_cast<unsigned>(s.tokens + s.hidden));
    std::iota(inverse.begin(), inverse.end(), 0);
    std::shuffle(inverse.begin(), inverse.end(), random);
    for (int64_t i = 0; i < rows; ++i) experts.push_back(static_cast<int32_t>(random() % kExperts));
    offsets[kExperts] = static_cast<int32_t>(idle == Idle::kNone ? rows : idle == Idle::kAll ? 0 : rows - rows / 5);
  }
  bool active(int64_t pair) const { return inverse[pair] < offsets[kExperts]; }
  // The token's active pairs, experts ascending, those of one expert by rank.
  std::vector<int64_t> pairs_of(int64_t token) const {
    std::vector<int64_t> pairs;
    for (int64_t pair = token * shape.k; pair < (token + 1) * shape.k; ++pair)
      if (active(pair)) pairs.push_back(pair);
    std::stable_sort(pairs.begin(), pairs.end(),
                     [&](int64_t a, int64_t b) { return experts[inverse[a]] < experts[inverse[b]]; });
    return pairs;
  }
};

template <class T>
struct CombineTest : testing::Test {
  using Acc = accumulator_t<T>;
  static Acc wide(T value) { return static_cast<Acc>(value); }

  static void forward(const Problem<T>& problem) {
    const Shape& s = problem.shape;
    const OffsetBuffer<T> y(problem.y, s.offset), weights(problem.weights, s.offset);
    const OffsetBuffer<T> out(s.tokens * s.hidden, s.offset);
    const Buffer<int32_t> experts(problem.experts), offsets(problem.offsets), inverse(problem.inverse);
    ASSERT_EQ(MICRO_RUN(combine, CombineParams{y.data(), weights.data(), experts.data(), offsets.data(), inverse.data(),
                                               out.data(), s.tokens, s.k, s.hidden, problem.kExperts, kDTypeOf<T>}),
              Status::kOk);
    std::vector<T> want;
    for (int64_t t = 0; t < s.tokens; ++t) {
      const std::vector<int64_t> pairs = problem.pairs_of(t);
      for (int64_t h = 0; h < s.hidden; ++h) {
        T sum(Acc(0));
        for (int64_t pair : pairs) {
          const T term(wide(problem.y[problem.inverse[pair] * s.hidden + h]) * wide(problem.weights[pair]));
          sum = T(wide(sum) + wide(term));
        }
        want.push_back(sum);
      }
    }
    expect_same_bits(out.read(), want);
  }

  // What is not wanted is not read either: its inputs are left out.
  static void backward(const Problem<T>& problem, bool want_y, bool want_weights) {
    const Shape& s = problem.shape;
    const OffsetBuffer<T> grad(problem.grad, s.offset), y(problem.y, s.offset), weights(problem.weights, s.offset);
    const OffsetBuffer<T> grad_y(want_y ? problem.y.size() : 0, s.offset);
    const Buffer<Acc> grad_weights(want_weights ? problem.rows : 0);
    const Buffer<int32_t> offsets(problem.offsets), inverse(problem.inverse);
    ASSERT_EQ(MICRO_RUN(combine_backward, CombineBackwardParams{grad.data(), want_weights ? y.data() : nullptr,
                                                                want_y ? weights.data() : nullptr, offsets.data(),
                                                                inverse.data(), want_y ? grad_y.data() : nullptr,
                                                                want_weights ? grad_weights.data() : nullptr, s.tokens,
                                                                s.k, s.hidden, problem.kExperts, kDTypeOf<T>}),
              Status::kOk);
    if (want_y) expect_same_bits(grad_y.read(), scaled(problem));
    if (want_weights) expect_dots(grad_weights.read(), problem);
  }

  static std::vector<T> scaled(const Problem<T>& problem) {
    const int64_t hidden = problem.shape.hidden;
    std::vector<T> rows(problem.y.size(), T(Acc(0)));
    for (int64_t pair = 0; pair < problem.rows; ++pair)
      for (int64_t h = 0; h < hidden && problem.active(pair); ++h)
        rows[problem.inverse[pair] * hidden + h] =
            T(wide(problem.grad[pair / problem.shape.k * hidden + h]) * wide(problem.weights[pair]));
    return rows;
  }

  // A sum of n numbers in any order is off by less than n roundings of the sum of their sizes; every term is one more.
  static void expect_dots(const std::vector<Acc>& got, const Problem<T>& problem) {
    const int64_t hidden = problem.shape.hidden;
    for (int64_t pair = 0; pair < problem.rows; ++pair) {
      double dot = 0, size = 0;
      for (int64_t h = 0; h < hidden && problem.active(pair); ++h) {
        const double term = double(wide(problem.grad[pair / problem.shape.k * hidden + h])) *
                            wide(problem.y[problem.inverse[pair] * hidden + h]);
        dot += term;
        size += std::abs(term);
      }
      ASSERT_NEAR(got[pair], dot, static_cast<double>(hidden + 1) * kRounding<Acc> * size) << pair;
    }
  }

  template <class Body>
  static void each_problem(const Body& body) {
    for (const Shape& s : kShapes) each_problem(s, Idle::kSome, body);
    for (const Shape& s : {Shape{9, 3, 16}, Shape{3, 5, 24}})
      for (Idle idle : {Idle::kNone, Idle::kAll}) each_problem(s, idle, body);
  }
  template <class Body>
  static void each_problem(const Shape& s, Idle idle, const Body& body) {
    SCOPED_TRACE(testing::Message() << s.tokens << " tokens, K " << s.k << ", H " << s.hidden << ", offset " << s.offset
                                    << ", idle " << static_cast<int>(idle));
    body(Problem<T>(s, idle));
  }
};
TYPED_TEST_SUITE(CombineTest, DeviceElementTypes);

TYPED_TEST(CombineTest, ForwardEqualsTheDefinition) { TestFixture::each_problem(TestFixture::forward); }

TYPED_TEST(CombineTest, BackwardEqualsTheDefinition) {
  TestFixture::each_problem([](const auto& problem) { TestFixture::backward(problem, true, true); });
}

TYPED_TEST(CombineTest, OneGradientAloneIsTheSame) {
  for (const Shape& s : {Shape{9, 3, 17}, Shape{9, 3, 16}}) {
    TestFixture::backward(Problem<TypeParam>(s, Idle::kSome), true, false);
    TestFixture::backward(Problem<TypeParam>(s, Idle::kSome), false, true);
  }
}

TEST(Combine, ARowOutsideIsRefused) {
  if (kOnDevice) GTEST_SKIP() << "a device assertion";
  Problem<float> problem({3, 2, 8}, Idle::kNone);
  problem.inverse.back() = 6;
  std::vector<float> out(3 * 8), grad_weights(6);
  EXPECT_EQ(cpu::combine({problem.y.data(), problem.weights.data(), problem.experts.data(), problem.offsets.data(),
                          problem.inverse.data(), out.data(), 3, 2, 8, problem.kExperts, DType::kFloat32},
                         serial),
            Status::kIndexOutOfRange);
  EXPECT_EQ(cpu::combine_backward(
                {problem.grad.data(), problem.y.data(), problem.weights.data(), problem.offsets.data(),
                 problem.inverse.data(), nullptr, grad_weights.data(), 3, 2, 8, problem.kExperts, DType::kFloat32},
                serial),
            Status::kIndexOutOfRange);
}

// Addition in bfloat16 is not associative: 256 + 1 + 1 is 256, 1 + 1 + 256 is 258.
TEST(Combine, ExpertsAreAddedInAscendingOrderWhateverTheirRank) {
  const Buffer<BFloat16> y({BFloat16(256.0f), BFloat16(1.0f), BFloat16(1.0f)});
  const Buffer<BFloat16> weights(std::vector<BFloat16>(3, BFloat16(1.0f)));
  const Buffer<int32_t> inverse({2, 0, 1}), offsets({0, 0, 0, 3});
  const auto sum_with = [&](const std::vector<int32_t>& order) {
    const Buffer<int32_t> experts(order);
    const Buffer<BFloat16> out(1);
    EXPECT_EQ(MICRO_RUN(combine, CombineParams{y.data(), weights.data(), experts.data(), offsets.data(), inverse.data(),
                                               out.data(), 1, 3, 1, 3, DType::kBFloat16}),
              Status::kOk);
    return static_cast<float>(out.read()[0]);
  };
  EXPECT_EQ(sum_with({0, 1, 2}), 256.0f);
  EXPECT_EQ(sum_with({2, 0, 1}), 258.0f);
}

// The product is rounded before it is added: as one fused operation, the sum would keep what the rounding drops.
TEST(Combine, ProductsAreRoundedBeforeTheyAreAdded) {
  const float above_one = 1 + 0x1p-12f, square = 1 + 0x1p-11f;  // its square has one bit more
  const Buffer<float> y({-square, above_one}), weights({1.0f, above_one});
  const Buffer<int32_t> experts({0, 1}), offsets({0, 2}), inverse({0, 1});
  const Buffer<float> out(1);
  ASSERT_EQ(MICRO_RUN(combine, CombineParams{y.data(), weights.data(), experts.data(), offsets.data(), inverse.data(),
                                             out.data(), 1, 2, 1, 1, DType::kFloat32}),
            Status::kOk);
  EXPECT_EQ(out.read()[0], 0.0f);
}

}  // namespace
}  // namespace micro_kernels
