// The losses over routing decisions and their gradients against plain loops in double, on whichever back end this
// program was built for. (That those gradients are the slopes of the losses is shown on the CPU, by differences.)

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "backend.h"
#include "elements.h"
#include "micro_kernels/label_loss.h"
#include "micro_kernels/load_balancing_loss.h"
#include "micro_kernels/routing_entropy.h"
#include "micro_kernels/z_loss.h"
#include "offset.h"

namespace micro_kernels {
namespace {

struct Shape {
  int64_t layers, tokens, experts;
  int64_t offset = 0;  // of every array, in elements: with 1, rows of four cannot move as vectors
  int64_t choices = 2;
};

// No layer, no token; around blocks of tokens; four experts, which move as vectors, and other numbers.
const Shape kShapes[] = {{0, 5, 4},   {2, 0, 4},     {1, 1, 1},         {3, 33, 4},
                         {2, 300, 4}, {3, 41, 4, 1}, {1, 260, 9, 0, 3}, {2, 17, 21, 1, 1}};

// What storing in T may lose, relative, and its smallest step. Sums are carried in double.
template <class T>
constexpr double kRounding = std::is_same_v<T, double>     ? 1e-13
                             : std::is_same_v<T, float>    ? 1.2e-7
                             : std::is_same_v<T, BFloat16> ? 0x1p-8
                                                           : 0x1p-11 + 1e-6;
template <class T>
constexpr double kStep = std::is_same_v<T, Float16> ? 3e-8 : 1e-40;

template <class T>
double wide(T value) {
  return static_cast<accumulator_t<T>>(value);
}

// Tokens that are padding hold NaN, which must not come out anywhere. Every second token has a label.
template <class T>
struct Problem {
  Shape shape;
  std::vector<T> logits, probs;
  std::vector<int32_t> ids;
  std::vector<int64_t> labels;
  std::vector<char> mask;
  bool masked;
  double real;  // tokens, at least 1

  explicit Problem(Shape s, bool with_mask = true) : shape(s), masked(with_mask) {
    std::mt19937 random(static_cast<unsigned>(s.tokens * 10 + s.experts));
    std::normal_distribution<float> normal;
    for (int64_t t = 0; t < s.tokens; ++t) {
      mask.push_back(!with_mask || t % 3 != 2);
      labels.push_back(t % 2 ? -1 - t : t / 2 % s.experts);
    }
    for (int64_t row = 0; row < s.layers * s.tokens; ++row) {
      double sum = 0;
      for (int64_t e = 0; e < s.experts; ++e) {
        const bool padding = !mask[row % s.tokens], ablated = row % 5 == 4 && e == 1 && labels[row % s.tokens] < 0;
        logits.push_back(T(padding ? NAN : ablated ? -INFINITY : normal(random) * (row % 4 == 0 ? 10.0f : 1.0f)));
        sum += std::exp(wide(logits.back()));
      }
      for (int64_t e = 0; e < s.experts; ++e) probs.push_back(T(static_cast<float>(std::exp(z(row, e)) / sum)));
      for (int64_t k = 0; k < s.choices; ++k) ids.push_back(static_cast<int32_t>(random() % s.experts));
    }
    real = std::max<double>(1, std::count(mask.begin(), mask.end(), 1));
  }

  bool is_real(int64_t row) const { return mask[row % shape.tokens]; }
  int64_t rows() const { return shape.layers * shape.tokens; }
  double z(int64_t row, int64_t e) const { return wide(logits[row * shape.experts + e]); }
  double p(int64_t row, int64_t e) const { return wide(probs[row * shape.experts + e]); }
  double log_sum(int64_t row) const {
    double top = -INFINITY, sum = 0;
    for (int64_t e = 0; e < shape.experts; ++e) top = std::max(top, z(row, e));
    for (int64_t e = 0; e < shape.experts; ++e) sum += std::exp(z(row, e) - top);
    return top + std::log(sum);
  }
};

// What a kernel reads of a problem, in its memory.
template <class T>
struct Inputs {
  OffsetBuffer<T> logits, probs;
  Buffer<int32_t> ids;
  Buffer<int64_t> labels;
  OffsetBuffer<char> mask_memory;
  const bool* mask;

  explicit Inputs(const Problem<T>& p)
      : logits(p.logits, p.shape.offset),
        probs(p.probs, p.shape.offset),
        ids(p.ids),
        labels(p.labels),
        mask_memory(p.mask, p.shape.offset),
        mask(p.masked ? reinterpret_cast<const bool*>(mask_memory.data()) : nullptr) {}
};

template <class T>
class RoutingLossTest : public testing::Test {
 protected:
  using Acc = accumulator_t<T>;

  // A number that a loss or its gradient adds up, in float, and the sum of its terms' sizes.
  static void expect_loss(Acc got, double want, double size) {
    EXPECT_NEAR(got, want, (std::is_same_v<T, double> ? 1e-13 : 1.2e-7) * size);
  }
  // Of each gradient: what it should be, and the size of the terms that cancel in it.
  template <class Want>
  static void expect_gradient(const Problem<T>& p, const std::vector<T>& got, const Want& want) {
    for (int64_t row = 0; row < p.rows(); ++row)
      for (int64_t e = 0; e < p.shape.experts; ++e) {
        const auto [value, size] = p.is_real(row) ? want(row, e) : std::pair(0.0, 0.0);
        ASSERT_NEAR(wide(got[row * p.shape.experts + e]), value,
                    kRounding<T> * std::abs(value) + 1e-13 * size + kStep<T>)
            << "row " << row << ", expert " << e;
      }
  }

  static void z(const Problem<T>& p) {
    const Shape& s = p.shape;
    const Inputs<T> in(p);
    const Buffer<Acc> loss(1), slope(std::vector<Acc>{0.75f});
    const OffsetBuffer<T> grad(p.logits.size(), s.offset);
    ASSERT_EQ(MICRO_RUN_WITH_WORKSPACE(z_loss, ZLossParams{in.logits.data(), in.mask, loss.data(), s.layers, s.tokens,
                                                           s.experts, kDTypeOf<T>}),
              Status::kOk);
    const double count = p.real * std::max<double>(1, s.layers);
    double want = 0;
    for (int64_t row = 0; row < p.rows(); ++row)
      if (p.is_real(row)) want += p.log_sum(row) * p.log_sum(row) / count;
    expect_loss(loss.read()[0], want, want);
    ASSERT_EQ(MICRO_RUN(z_loss_backward, ZLossBackwardParams{slope.data(), in.logits.data(), in.mask, grad.data(),
                                                             s.layers, s.tokens, s.experts, kDTypeOf<T>}),
              Status::kOk);
    expect_gradient(p, grad.read(), [&](int64_t row, int64_t e) {
      const double value = 0.75 / count * 2 * p.log_sum(row) * std::exp(p.z(row, e) - p.log_sum(row));
      return std::pair(value, 30 * std::abs(value));  // an error of the exponent weighs as much as the exponent
    });
  }

  static void label(const Problem<T>& p, const std::vector<Acc>& weights) {
    const Shape& s = p.shape;
    const Inputs<T> in(p);
    const Buffer<Acc> loss(1), slope(std::vector<Acc>{-1.5f}), layer_weights(weights);
    const OffsetBuffer<T> grad(p.logits.size(), s.offset);
    const void* layers = weights.empty() ? nullptr : layer_weights.data();
    ASSERT_EQ(
        MICRO_RUN_WITH_WORKSPACE(label_loss, LabelLossParams{in.logits.data(), in.labels.data(), in.mask, layers,
                                                             loss.data(), s.layers, s.tokens, s.experts, kDTypeOf<T>}),
        Status::kOk);
    double total = 0, want = 0, size = 0;
    for (int64_t l = 0; l < s.layers; ++l) total += weights.empty() ? 1.0 : weights[l];
    const auto share = [&](int64_t row) {
      return (weights.empty() ? 1.0 : double(weights[row / s.tokens])) / std::max(total, 1e-30);
    };
    for (int64_t row = 0; row < p.rows(); ++row) {
      const int64_t expert = p.labels[row % s.tokens];
      if (expert < 0 || !p.is_real(row) || share(row) == 0) continue;
      want += share(row) * (p.log_sum(row) - p.z(row, expert));
      size += share(row) * (std::abs(p.log_sum(row)) + std::abs(p.z(row, expert)));
    }
    expect_loss(loss.read()[0], want, size);
    ASSERT_EQ(MICRO_RUN(label_loss_backward,
                        LabelLossBackwardParams{slope.data(), in.logits.data(), in.labels.data(), in.mask, layers,
                                                grad.data(), s.layers, s.tokens, s.experts, kDTypeOf<T>}),
              Status::kOk);
    expect_gradient(p, grad.read(), [&](int64_t row, int64_t e) {
      const int64_t expert = p.labels[row % s.tokens];
      const double right = expert == e ? 1 : 0, scale = -1.5 * share(row);
      if (expert < 0) return std::pair(0.0, 0.0);
      return std::pair(scale * (std::exp(p.z(row, e) - p.log_sum(row)) - right), 30 * std::abs(scale));
    });
  }

  static void entropy(const Problem<T>& p) {
    const Shape& s = p.shape;
    const Inputs<T> in(p);
    std::vector<Acc> slopes;
    for (int64_t l = 0; l < s.layers; ++l) slopes.push_back(Acc(1) - l);
    const Buffer<Acc> entropy(s.layers), slope(slopes);
    const OffsetBuffer<T> grad(p.probs.size(), s.offset);
    ASSERT_EQ(
        MICRO_RUN_WITH_WORKSPACE(routing_entropy, RoutingEntropyParams{in.probs.data(), in.mask, entropy.data(),
                                                                       s.layers, s.tokens, s.experts, kDTypeOf<T>}),
        Status::kOk);
    const std::vector<Acc> got = entropy.read();
    for (int64_t l = 0; l < s.layers; ++l) {
      double want = 0;
      for (int64_t row = l * s.tokens; row < (l + 1) * s.tokens; ++row)
        for (int64_t e = 0; e < s.experts; ++e)
          if (p.is_real(row) && p.p(row, e) > 0) want -= p.p(row, e) * std::log(p.p(row, e)) / p.real;
      expect_loss(got[l], want, std::abs(want));
    }
    ASSERT_EQ(MICRO_RUN(routing_entropy_backward,
                        RoutingEntropyBackwardParams{slope.data(), in.probs.data(), in.mask, grad.data(), s.layers,
                                                     s.tokens, s.experts, kDTypeOf<T>}),
              Status::kOk);
    expect_gradient(p, grad.read(), [&](int64_t row, int64_t e) {
      const double scale = double(slopes[row / s.tokens]) / p.real, log_p = std::log(p.p(row, e));
      if (p.p(row, e) == 0) return std::pair(0.0, 0.0);
      return std::pair(-scale * (log_p + 1), std::abs(scale) * (std::abs(log_p) + 1));
    });
  }
};
TYPED_TEST_SUITE(RoutingLossTest, DeviceElementTypes);

std::string name_of(const Shape& s) {
  return std::to_string(s.layers) + "x" + std::to_string(s.tokens) + "x" + std::to_string(s.experts);
}

TYPED_TEST(RoutingLossTest, ZLossEqualsTheDefinition) {
  for (const Shape& shape : kShapes)
    for (const bool masked : {true, false}) {
      SCOPED_TRACE(name_of(shape));
      this->z(Problem<TypeParam>(shape, masked));
    }
}

TYPED_TEST(RoutingLossTest, LabelLossEqualsTheDefinition) {
  for (const Shape& shape : kShapes) {
    SCOPED_TRACE(name_of(shape));
    this->label(Problem<TypeParam>(shape), {});
    std::vector<accumulator_t<TypeParam>> weights(shape.layers, 0.5f);
    if (shape.layers > 0) weights.back() = 2;
    this->label(Problem<TypeParam>(shape, false), weights);
  }
}

// Not even a layer full of NaN; and where all weights are 0, the loss is 0.
TYPED_TEST(RoutingLossTest, ALayerOfWeightZeroIsNotRead) {
  using Acc = accumulator_t<TypeParam>;
  Problem<TypeParam> problem({2, 12, 4}, false);
  std::fill_n(problem.logits.begin(), 12 * 4, TypeParam(static_cast<float>(NAN)));
  const Inputs<TypeParam> in(problem);
  const std::vector<Acc> weights = {0, 2};
  const Buffer<Acc> loss(1), layer_weights(weights), none(std::vector<Acc>{0, 0});
  for (const Acc* layers : {layer_weights.data(), none.data()}) {
    ASSERT_EQ(MICRO_RUN_WITH_WORKSPACE(label_loss, LabelLossParams{in.logits.data(), in.labels.data(), nullptr, layers,
                                                                   loss.data(), 2, 12, 4, kDTypeOf<TypeParam>}),
              Status::kOk);
    const Acc got = loss.read()[0];
    EXPECT_FALSE(std::isnan(got));
    EXPECT_EQ(got == 0, layers == none.data());
  }
}

// A NaN among the logits of a real token, whatever stands beside it, shows in the loss and in that token's gradient.
TYPED_TEST(RoutingLossTest, NaNComesOut) {
  using T = TypeParam;
  using Acc = accumulator_t<T>;
  for (const int64_t experts : {4, 5}) {
    std::vector<T> values(2 * experts, T(0.5f));
    values[experts + 1] = T(static_cast<float>(NAN));
    for (const int64_t e : {0, 2, 3}) values[experts + e] = T(-static_cast<float>(INFINITY));
    const Buffer<T> logits(values), grad(2 * experts);
    const Buffer<int64_t> labels(std::vector<int64_t>{0, 1});
    const Buffer<Acc> loss(1), slope(std::vector<Acc>{1});
    const auto expect_nan = [&](Status status) {
      ASSERT_EQ(status, Status::kOk);
      EXPECT_TRUE(std::isnan(loss.read()[0]));
    };
    const auto expect_nan_behind_numbers = [&](Status status) {
      ASSERT_EQ(status, Status::kOk);
      const std::vector<T> got = grad.read();
      for (int64_t i = 0; i < 2 * experts; ++i) EXPECT_EQ(std::isnan(wide(got[i])), i >= experts);
    };
    expect_nan(
        MICRO_RUN_WITH_WORKSPACE(z_loss, ZLossParams{logits.data(), nullptr, loss.data(), 1, 2, experts, kDTypeOf<T>}));
    expect_nan_behind_numbers(MICRO_RUN(z_loss_backward, ZLossBackwardParams{slope.data(), logits.data(), nullptr,
                                                                             grad.data(), 1, 2, experts, kDTypeOf<T>}));
    expect_nan(MICRO_RUN_WITH_WORKSPACE(label_loss, LabelLossParams{logits.data(), labels.data(), nullptr, nullptr,
                                                                    loss.data(), 1, 2, experts, kDTypeOf<T>}));
    expect_nan_behind_numbers(
        MICRO_RUN(label_loss_backward, LabelLossBackwardParams{slope.data(), logits.data(), labels.data(), nullptr,
                                                               nullptr, grad.data(), 1, 2, experts, kDTypeOf<T>}));
  }
}

TYPED_TEST(RoutingLossTest, EntropyEqualsTheDefinition) {
  for (const Shape& shape : kShapes)
    for (const bool masked : {true, false}) {
      SCOPED_TRACE(name_of(shape));
      this->entropy(Problem<TypeParam>(shape, masked));
    }
}

TYPED_TEST(RoutingLossTest, NoRealToken) {
  Problem<TypeParam> none({2, 20, 4});
  none.mask.assign(20, 0);
  none.real = 1;
  this->z(none);
  this->label(none, {});
  this->entropy(none);
}

// More tokens than the blocks of a layer have threads, and a mask that begins off any alignment.
using RoutingLossOfFloats = RoutingLossTest<float>;
TEST_F(RoutingLossOfFloats, ManyTokens) {
  const Problem<float> many({1, 8300, 4, 3});
  z(many);
  entropy(many);
}

// ---- load balancing: probabilities are never narrow ----------------------------------------------------------------

template <class T>
class LoadBalancingLossTest : public testing::Test {
 protected:
  static void run(const Problem<T>& p, bool pooled) {
    const Shape& s = p.shape;
    const Inputs<T> in(p);
    const Buffer<T> loss(1), grad_loss(std::vector<T>{T(0.5f)}), slope(s.layers * s.experts);
    const OffsetBuffer<T> grad(p.probs.size(), s.offset);
    ASSERT_EQ(MICRO_RUN_WITH_WORKSPACE(
                  load_balancing_loss,
                  LoadBalancingLossParams{in.probs.data(), in.ids.data(), in.mask, loss.data(), slope.data(), s.layers,
                                          s.tokens, s.choices, s.experts, pooled, kDTypeOf<T>}),
              Status::kOk);
    ASSERT_EQ(MICRO_RUN(load_balancing_loss_backward,
                        LoadBalancingLossBackwardParams{grad_loss.data(), slope.data(), in.mask, grad.data(), s.layers,
                                                        s.tokens, s.experts, kDTypeOf<T>}),
              Status::kOk);
    const double rounding = std::is_same_v<T, double> ? 1e-13 : 1.2e-7;
    const std::vector<T> got_slope = slope.read(), got = grad.read();
    const int64_t pools = pooled ? std::min<int64_t>(1, s.layers) : s.layers;
    const int64_t layers_per_pool = pooled ? s.layers : 1;
    double want = 0;
    for (int64_t pool = 0; pool < pools; ++pool)
      for (int64_t e = 0; e < s.experts; ++e) {
        double chosen = 0, probability = 0;
        for (int64_t row = pool * layers_per_pool * s.tokens; row < (pool + 1) * layers_per_pool * s.tokens; ++row) {
          if (!p.is_real(row)) continue;
          for (int64_t k = 0; k < s.choices; ++k) chosen += p.ids[row * s.choices + k] == e;
          probability += p.p(row, e);
        }
        const double count = p.real * double(layers_per_pool);
        want += s.experts * chosen / count * probability / count / double(pools);
        const double want_slope = s.experts * chosen / count / count / double(pools);
        for (int64_t l = pool * layers_per_pool; l < (pool + 1) * layers_per_pool; ++l) {
          ASSERT_NEAR(got_slope[l * s.experts + e], want_slope, rounding * want_slope);
          for (int64_t t = 0; t < s.tokens; ++t)
            ASSERT_NEAR(got[(l * s.tokens + t) * s.experts + e], p.mask[t] ? 0.5 * want_slope : 0.0,
                        rounding * want_slope);
        }
      }
    EXPECT_NEAR(loss.read()[0], want, rounding * want);
  }
};
using WideTypes = testing::Types<float, double>;
TYPED_TEST_SUITE(LoadBalancingLossTest, WideTypes);

TYPED_TEST(LoadBalancingLossTest, EqualsTheDefinition) {
  for (const Shape& shape : kShapes)
    for (const bool pooled : {true, false}) {
      SCOPED_TRACE(name_of(shape));
      this->run(Problem<TypeParam>(shape, true), pooled);
      this->run(Problem<TypeParam>(shape, false), pooled);
    }
}

using LoadBalancingLossOfFloats = LoadBalancingLossTest<float>;
TEST_F(LoadBalancingLossOfFloats, ManyTokens) { run(Problem<float>({1, 8300, 4, 3}), true); }

TYPED_TEST(LoadBalancingLossTest, AllOnOneExpertAndNoRealToken) {
  Problem<TypeParam> problem({2, 70, 4});
  problem.ids.assign(problem.ids.size(), 3);
  this->run(problem, true);
  this->run(problem, false);
  problem.mask.assign(70, 0);
  problem.real = 1;
  this->run(problem, true);
}

// ---- single facts --------------------------------------------------------------------------------------------------

TEST(RoutingEntropy, ZeroTimesItsLogarithmIsZeroWithAZeroGradient) {
  const Buffer<float> probs(std::vector<float>{0, 1}), entropy(1), gradient(2), slope(std::vector<float>{1});
  ASSERT_EQ(MICRO_RUN_WITH_WORKSPACE(
                routing_entropy, RoutingEntropyParams{probs.data(), nullptr, entropy.data(), 1, 1, 2, DType::kFloat32}),
            Status::kOk);
  EXPECT_EQ(entropy.read()[0], 0);
  ASSERT_EQ(
      MICRO_RUN(routing_entropy_backward, RoutingEntropyBackwardParams{slope.data(), probs.data(), nullptr,
                                                                       gradient.data(), 1, 1, 2, DType::kFloat32}),
      Status::kOk);
  EXPECT_EQ(gradient.read(), (std::vector<float>{0, -1}));
}

TEST(LabelLoss, ALabelOutsideIsRefused) {
  if (kOnDevice) GTEST_SKIP() << "a device assertion on CUDA";
  const Buffer<float> logits(std::vector<float>(8, 1.0f)), loss(1);
  const Buffer<int64_t> labels(std::vector<int64_t>{0, 4});
  EXPECT_EQ(MICRO_RUN_WITH_WORKSPACE(label_loss, LabelLossParams{logits.data(), labels.data(), nullptr, nullptr,
                                                                 loss.data(), 1, 2, 4, DType::kFloat32}),
            Status::kIndexOutOfRange);
}

TEST(LoadBalancingLoss, AnIdOutsideIsRefused) {
  if (kOnDevice) GTEST_SKIP() << "a device assertion on CUDA";
  const Buffer<float> probs(std::vector<float>(8, 0.25f)), loss(1), slope(4);
  for (const int32_t id : {-1, 4}) {
    const Buffer<int32_t> ids(std::vector<int32_t>{0, id});
    EXPECT_EQ(MICRO_RUN_WITH_WORKSPACE(load_balancing_loss,
                                       LoadBalancingLossParams{probs.data(), ids.data(), nullptr, loss.data(),
                                                               slope.data(), 1, 2, 1, 4, true, DType::kFloat32}),
              Status::kIndexOutOfRange);
  }
}

}  // namespace
}  // namespace micro_kernels
