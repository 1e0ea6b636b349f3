// Routing and its gradient against plain loops in double, on whichever back end this program was built for.

#include "micro_kernels/route.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <optional>
#include <random>
#include <vector>

#include "backend.h"
#include "elements.h"
#include "offset.h"

namespace micro_kernels {
namespace {

struct Shape {
  int64_t tokens, experts, k;
  int64_t offset = 0;  // of every array, in elements: with 1, rows of four cannot move as vectors
};

// Around blocks; four experts, which move as vectors, and other numbers; all experts chosen.
const Shape kShapes[] = {{0, 4, 2},  {1, 1, 1},   {31, 4, 1},  {33, 4, 4},   {64, 4, 2, 1},
                         {65, 4, 2}, {129, 9, 2}, {5, 65, 65}, {20, 3, 2, 1}};

std::string name_of(const Shape& s) {
  return std::to_string(s.tokens) + "_E" + std::to_string(s.experts) + "_K" + std::to_string(s.k) + "_" +
         std::to_string(s.offset);
}

// What storing in T may lose, relative, and its smallest step.
template <class T>
constexpr double kRounding = std::is_same_v<T, double>     ? 1e-13
                             : std::is_same_v<T, float>    ? 2e-6
                             : std::is_same_v<T, BFloat16> ? 0x1p-8
                                                           : 0x1p-10;
template <class T>
constexpr double kStep = std::is_same_v<T, Float16> ? 6e-8 : 0;

// Of probabilities: some roundings of the exponent's argument, which outliers make large.
template <class T>
constexpr double kNear = std::is_same_v<T, double> ? 1e-13 : 4e-6;

enum class Steering { kPerToken, kOneRow };

// Every kind of steering at once; expert 0 is never ablated.
template <class T>
struct Problem {
  using Acc = accumulator_t<T>;
  Shape shape;
  Steering steering;
  std::vector<T> logits;
  std::vector<Acc> bias;
  std::vector<char> ablate;
  std::vector<int32_t> force;

  explicit Problem(Shape s, Steering how = Steering::kPerToken) : shape(s), steering(how) {
    std::mt19937 random(static_cast<unsigned>(s.tokens * 100 + s.experts));
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < s.tokens * s.experts; ++i)  // ties and outliers
      logits.push_back(T(i % 7 == 0 ? 1.0f : normal(random) * (i % 5 == 0 ? 10.0f : 1.0f)));
    const int64_t rows = how == Steering::kOneRow ? 1 : s.tokens;
    for (int64_t i = 0; i < rows * s.experts; ++i) {
      bias.push_back(i % 3 == 0 ? 0.25f : 0.5f * normal(random));
      ablate.push_back(i % s.experts != 0 && random() % 4 == 0);
    }
    for (int64_t t = 0; t < rows; ++t) force.push_back(t % 6 == 5 ? static_cast<int32_t>(random() % s.experts) : -1);
  }

  int64_t row_of(int64_t t) const { return steering == Steering::kOneRow ? 0 : t; }
  bool constant(int64_t t, int64_t e) const { return force[row_of(t)] >= 0 || ablate[row_of(t) * shape.experts + e]; }

  std::vector<double> oracle_probs(int64_t t) const {
    std::vector<double> p(shape.experts);
    double sum = 0;
    for (int64_t e = 0; e < shape.experts; ++e) {
      const int64_t steered = row_of(t) * shape.experts + e;
      const double z = double(static_cast<Acc>(logits[t * shape.experts + e])) + double(bias[steered]);
      if (force[row_of(t)] >= 0)
        p[e] = e == force[row_of(t)];
      else
        p[e] = ablate[steered] ? 0.0 : std::exp(z);
      sum += p[e];
    }
    for (double& value : p) value /= sum;
    return p;
  }
};

// The order of choice, for any numbers: larger first, NaN behind all, of equals the lower id.
template <class Acc>
std::vector<int32_t> order_of(const Acc* p, int64_t experts) {
  std::vector<int32_t> order(experts);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [p](int32_t a, int32_t b) { return p[a] > p[b] || (std::isnan(p[b]) && !std::isnan(p[a])); });
  return order;
}

template <class T>
struct Outputs {
  using Acc = accumulator_t<T>;
  std::vector<int32_t> ids;
  std::vector<T> weights;
  std::vector<Acc> probs, effective;
};

template <class T>
class RouteTest : public testing::Test {
 protected:
  using Acc = accumulator_t<T>;

  static Outputs<T> run(const Problem<T>& problem, WeightRule rule) {
    const Shape& s = problem.shape;
    const OffsetBuffer<T> logits(problem.logits, s.offset);
    const OffsetBuffer<Acc> bias(problem.bias, s.offset);
    const Buffer<char> ablate(problem.ablate);
    const Buffer<int32_t> force(problem.force);
    const bool one_row = problem.steering == Steering::kOneRow;
    RouteParams params{};
    params.logits = logits.data();
    params.bias = bias.data();
    params.ablate = reinterpret_cast<const bool*>(ablate.data());
    params.force = force.data();
    params.bias_stride = params.ablate_stride = one_row ? 0 : s.experts;
    params.force_stride = one_row ? 0 : 1;
    params.rule = rule;
    return run_params(params, s);
  }

  // Without steering: the rows, or the logits.
  static Outputs<T> run_rows(const std::vector<Acc>& values, Shape s) {
    const OffsetBuffer<Acc> rows(values, s.offset);
    RouteParams params{};
    params.rows = rows.data();
    return run_params(params, s);
  }

  static Outputs<T> run_params(RouteParams params, Shape s) {
    const OffsetBuffer<int32_t> ids(s.tokens * s.k, s.offset);
    const OffsetBuffer<T> weights(s.tokens * s.k, s.offset);
    const OffsetBuffer<Acc> probs(s.tokens * s.experts, s.offset), effective(s.tokens * s.experts, s.offset);
    params.ids = ids.data();
    params.weights = weights.data();
    params.probs = probs.data();
    params.effective = effective.data();
    params.tokens = s.tokens;
    params.experts = s.experts;
    params.k = s.k;
    params.dtype = kDTypeOf<T>;
    EXPECT_EQ(MICRO_RUN(route, params), Status::kOk);
    return {ids.read(), weights.read(), probs.read(), effective.read()};
  }

  // Ids and weights of a token must follow from its probabilities: the ids exactly.
  static void expect_choice(const Outputs<T>& out, Shape s, int64_t t, WeightRule rule) {
    const Acc* p = out.probs.data() + t * s.experts;
    const std::vector<int32_t> order = order_of(p, s.experts);
    double sum = 1e-9;
    for (int64_t i = 0; i < s.k; ++i) sum += double(p[order[i]]);
    for (int64_t i = 0; i < s.k; ++i) {
      ASSERT_EQ(out.ids[t * s.k + i], order[i]) << "token " << t;
      const double want = double(p[order[i]]) / (rule == WeightRule::kProbability ? 1.0 : sum);
      const double got = double(static_cast<Acc>(out.weights[t * s.k + i]));
      if (std::isnan(want))
        EXPECT_TRUE(std::isnan(got));
      else
        EXPECT_NEAR(got, want, kRounding<T> * std::abs(want) + kStep<T>);
    }
  }

  static void backward(const Problem<T>& problem, WeightRule rule, bool weights_only);
};
TYPED_TEST_SUITE(RouteTest, DeviceElementTypes);

constexpr WeightRule kRules[] = {WeightRule::kRenormalized, WeightRule::kProbability, WeightRule::kStraightThrough};

TYPED_TEST(RouteTest, ForwardEqualsTheDefinition) {
  for (const Shape& shape : kShapes)
    for (const Steering steering : {Steering::kPerToken, Steering::kOneRow}) {
      SCOPED_TRACE(name_of(shape));
      const Problem<TypeParam> problem(shape, steering);
      const WeightRule rule = kRules[shape.tokens % 3];
      const Outputs<TypeParam> out = this->run(problem, rule);
      for (int64_t t = 0; t < shape.tokens; ++t) {
        const std::vector<double> want = problem.oracle_probs(t);
        for (int64_t e = 0; e < shape.experts; ++e) {
          const int64_t i = t * shape.experts + e;
          EXPECT_NEAR(out.probs[i], want[e], kNear<TypeParam>);
          const bool forced_here = problem.force[problem.row_of(t)] == e;
          EXPECT_EQ(out.effective[i] == -INFINITY, problem.constant(t, e) && !forced_here);
        }
        this->expect_choice(out, shape, t, rule);
      }
    }
}

TYPED_TEST(RouteTest, GivenRowsWinOverLogits) {
  for (const Shape& shape : kShapes) {
    SCOPED_TRACE(name_of(shape));
    std::vector<accumulator_t<TypeParam>> rows(shape.tokens * shape.experts);
    std::mt19937 random(3);
    for (auto& value : rows) value = (random() % 4) * 0.25f;  // mostly ties
    const Outputs<TypeParam> out = this->run_rows(rows, shape);
    EXPECT_EQ(out.probs, rows);
    EXPECT_EQ(out.effective, rows);
    for (int64_t t = 0; t < shape.tokens; ++t) this->expect_choice(out, shape, t, WeightRule::kRenormalized);
  }
}

TYPED_TEST(RouteTest, EveryNumberHasItsPlaceInTheOrder) {
  const float numbers[] = {NAN, INFINITY, -INFINITY, 0.0f, -0.0f, 1.0f, 1e-40f, -1.0f};
  for (const Shape& shape : {Shape{200, 4, 4}, Shape{200, 4, 3, 1}, Shape{50, 7, 5}}) {
    std::vector<accumulator_t<TypeParam>> rows(shape.tokens * shape.experts);
    std::mt19937 random(11);
    for (auto& value : rows) value = numbers[random() % 8];
    const Outputs<TypeParam> out = this->run_rows(rows, shape);
    for (int64_t t = 0; t < shape.tokens; ++t) {
      const std::vector<int32_t> order = order_of(rows.data() + t * shape.experts, shape.experts);
      for (int64_t i = 0; i < shape.k; ++i) ASSERT_EQ(out.ids[t * shape.k + i], order[i]) << "token " << t;
    }
  }
}

TYPED_TEST(RouteTest, StrangeLogitsGiveNaNAndTheFirstIds) {
  using T = TypeParam;
  for (const Shape& shape : {Shape{3, 4, 2}, Shape{3, 9, 3}}) {
    std::vector<T> values(shape.tokens * shape.experts, T(1.0f));
    values[1] = T(static_cast<float>(NAN));                       // a NaN
    values[shape.experts + 2] = T(static_cast<float>(INFINITY));  // a positive infinity
    for (int64_t e = 0; e < shape.experts; ++e)                   // nothing but -inf
      values[2 * shape.experts + e] = T(-static_cast<float>(INFINITY));
    const Buffer<T> logits(values);
    RouteParams params{};
    params.logits = logits.data();
    const Outputs<T> out = this->run_params(params, shape);
    for (const auto p : out.probs) EXPECT_TRUE(std::isnan(p));
    for (size_t i = 0; i < out.ids.size(); ++i) {
      EXPECT_EQ(out.ids[i], static_cast<int32_t>(i) % shape.k);
      EXPECT_TRUE(std::isnan(static_cast<accumulator_t<T>>(out.weights[i])));
    }
  }
}

TYPED_TEST(RouteTest, ReplayTakesTheGivenIds) {
  using T = TypeParam;
  for (const Shape& shape : {Shape{33, 4, 2}, Shape{33, 4, 2, 1}, Shape{9, 11, 3}}) {
    const Problem<T> problem(shape);
    std::vector<int32_t> ids;
    for (int64_t i = 0; i < shape.tokens * shape.k; ++i)
      ids.push_back(static_cast<int32_t>((i / shape.k + i % shape.k) % shape.experts));
    const OffsetBuffer<T> logits(problem.logits, shape.offset);
    const Buffer<int32_t> replay(ids);
    RouteParams params{};
    params.logits = logits.data();
    params.replay = replay.data();
    const Outputs<T> out = this->run_params(params, shape);
    EXPECT_EQ(out.ids, ids);
    for (int64_t t = 0; t < shape.tokens; ++t) {
      double sum = 1e-9;
      for (int64_t i = t * shape.k; i < (t + 1) * shape.k; ++i) sum += out.probs[t * shape.experts + ids[i]];
      for (int64_t i = t * shape.k; i < (t + 1) * shape.k; ++i) {
        const double want = out.probs[t * shape.experts + ids[i]] / sum;
        EXPECT_NEAR(static_cast<accumulator_t<T>>(out.weights[i]), want, kRounding<T> * want + kStep<T>);
      }
    }
  }
}

template <class T>
void RouteTest<T>::backward(const Problem<T>& problem, WeightRule rule, bool weights_only) {
  const Shape& s = problem.shape;
  const Outputs<T> out = run(problem, rule);
  const std::vector<T> delta = random_elements<T>(s.tokens * s.k, 5);
  const std::vector<Acc> probs_slope = random_elements<Acc>(s.tokens * s.experts, 6),
                         effective_slope = random_elements<Acc>(s.tokens * s.experts, 7);
  const OffsetBuffer<T> grad_weights(delta, s.offset);
  const OffsetBuffer<int32_t> ids(out.ids, s.offset);
  const Buffer<int32_t> force(problem.force);
  const OffsetBuffer<Acc> probs(out.probs, s.offset), effective(out.effective, s.offset),
      grad_probs(probs_slope, s.offset), grad_effective(effective_slope, s.offset), grad_z(out.probs.size(), s.offset);
  ASSERT_EQ(
      MICRO_RUN(route_backward, RouteBackwardParams{.grad_weights = grad_weights.data(),
                                                    .grad_probs = weights_only ? nullptr : grad_probs.data(),
                                                    .grad_effective = weights_only ? nullptr : grad_effective.data(),
                                                    .ids = ids.data(),
                                                    .probs = probs.data(),
                                                    .effective = effective.data(),
                                                    .force = force.data(),
                                                    .grad_z = grad_z.data(),
                                                    .force_stride = problem.steering == Steering::kOneRow ? 0 : 1,
                                                    .tokens = s.tokens,
                                                    .experts = s.experts,
                                                    .k = s.k,
                                                    .rule = rule,
                                                    .dtype = kDTypeOf<T>}),
      Status::kOk);
  const std::vector<Acc> got = grad_z.read();
  for (int64_t t = 0; t < s.tokens; ++t) {
    const Acc* p = out.probs.data() + t * s.experts;
    std::vector<double> dp(s.experts), size(s.experts);  // and the sizes of the terms that it is the sum of
    for (int64_t e = 0; e < s.experts; ++e) {
      dp[e] = weights_only ? 0.0 : double(probs_slope[t * s.experts + e]);
      size[e] = std::abs(dp[e]);
    }
    double sum = 1e-9, mean_delta = 0, size_delta = 0, mean = 0, size_mean = 0;
    for (int64_t i = t * s.k; i < (t + 1) * s.k; ++i) sum += double(p[out.ids[i]]);
    for (int64_t i = t * s.k; i < (t + 1) * s.k; ++i) {
      const double term = p[out.ids[i]] / sum * double(static_cast<Acc>(delta[i]));
      mean_delta += term;
      size_delta += std::abs(term);
    }
    for (int64_t i = t * s.k; i < (t + 1) * s.k; ++i) {
      const auto d = double(static_cast<Acc>(delta[i]));
      const bool closed = rule == WeightRule::kRenormalized;
      dp[out.ids[i]] += closed ? (d - mean_delta) / sum : d;
      size[out.ids[i]] += closed ? (std::abs(d) + size_delta) / sum : std::abs(d);
    }
    for (int64_t e = 0; e < s.experts; ++e) mean += p[e] * dp[e], size_mean += p[e] * size[e];
    for (int64_t e = 0; e < s.experts; ++e) {
      const int64_t i = t * s.experts + e;
      const double direct = weights_only ? 0.0 : double(effective_slope[i]);
      const bool constant = problem.constant(t, e);
      const double want = constant ? 0.0 : p[e] * (dp[e] - mean) + direct;
      const double terms = constant ? 0.0 : p[e] * (size[e] + size_mean) + std::abs(direct);
      ASSERT_NEAR(got[i], want, (std::is_same_v<T, double> ? 1e-13 : 3e-6) * terms) << t << ", " << e;
    }
  }
}

TYPED_TEST(RouteTest, BackwardEqualsTheDefinition) {
  for (const Shape& shape : kShapes)
    for (const WeightRule rule : kRules) {
      SCOPED_TRACE(name_of(shape));
      this->backward(Problem<TypeParam>(shape), rule, false);
    }
}

TYPED_TEST(RouteTest, AbsentGradientsAreZero) {
  for (const Shape& shape : {Shape{9, 4, 2}, Shape{9, 4, 2, 1}, Shape{9, 5, 3}})
    for (const Steering steering : {Steering::kPerToken, Steering::kOneRow})
      this->backward(Problem<TypeParam>(shape, steering), WeightRule::kRenormalized, true);
}

// The derivative of q / q is 0, and neither rounding nor an infinite gradient of an impossible expert may say
// otherwise.
TYPED_TEST(RouteTest, OneRenormalizedChoiceGetsExactlyNothing) {
  using T = TypeParam;
  using Acc = accumulator_t<T>;
  const std::vector<Acc> p = {0.7f, 0.3f, 0, 0, 0.25f, 0.25f, 0.5f, 0};
  const Buffer<Acc> probs(p), effective(std::vector<Acc>(8, Acc(1))), grad_z(8);
  const Buffer<Acc> grad_probs(std::vector<Acc>{0, 0, static_cast<Acc>(INFINITY), 0, 0, 0, 0, 0});
  const Buffer<T> grad_weights(std::vector<T>{T(3.1f), T(-0.7f)});
  const Buffer<int32_t> ids(std::vector<int32_t>{0, 2});
  RouteBackwardParams params{};
  params.grad_weights = grad_weights.data();
  params.grad_probs = grad_probs.data();
  params.ids = ids.data();
  params.probs = probs.data();
  params.effective = effective.data();
  params.grad_z = grad_z.data();
  params.tokens = 2;
  params.experts = 4;
  params.k = 1;
  params.rule = WeightRule::kRenormalized;
  params.dtype = kDTypeOf<T>;
  ASSERT_EQ(MICRO_RUN(route_backward, params), Status::kOk);
  for (const Acc value : grad_z.read())
    if constexpr (!std::is_same_v<T, double>)
      EXPECT_EQ(value, 0);
    else
      EXPECT_NEAR(value, 0, 1e-7);  // q / (q + 1e-9) is not 1 there: the derivative is 1e-9 / q^2
}

TEST(Route, AnIdOutsideIsRefused) {
  if (kOnDevice) GTEST_SKIP() << "a device assertion on CUDA";
  const Buffer<float> logits(std::vector<float>(8, 1.0f)), weights(2), probs(8), effective(8);
  const Buffer<int32_t> ids(2);
  RouteParams params{};
  params.logits = logits.data();
  params.ids = ids.data();
  params.weights = weights.data();
  params.probs = probs.data();
  params.effective = effective.data();
  params.force_stride = 1;
  params.tokens = 2;
  params.experts = 4;
  params.k = 1;
  for (const int32_t id : {-2, 4}) {
    const Buffer<int32_t> outside(std::vector<int32_t>{0, id});
    params.force = outside.data();
    params.replay = nullptr;
    EXPECT_EQ(MICRO_RUN(route, params), Status::kIndexOutOfRange);
    params.force = nullptr;
    params.replay = outside.data();
    EXPECT_EQ(MICRO_RUN(route, params), Status::kIndexOutOfRange);
  }
}

}  // namespace
}  // namespace micro_kernels
