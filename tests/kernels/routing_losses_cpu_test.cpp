// The gradients of the losses over routing decisions against finite differences of the losses, and these once more
// against plain loops in double.

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#include "micro_kernels/label_loss.h"
#include "micro_kernels/load_balancing_loss.h"
#include "micro_kernels/routing_entropy.h"
#include "micro_kernels/z_loss.h"

namespace micro_kernels {
namespace {

constexpr int64_t kLayers = 3, kTokens = 9, kExperts = 4, kChoices = 2, kSize = kLayers * kTokens * kExperts;

// Every third token is padding, and every second has a label.
struct Problem {
  std::vector<double> logits, probs;
  std::vector<int32_t> ids;
  std::vector<int64_t> labels;
  std::unique_ptr<bool[]> mask = std::make_unique<bool[]>(kTokens);
  double real = 0;

  Problem() {
    std::mt19937 random(4);
    std::normal_distribution<double> normal;
    for (int64_t i = 0; i < kSize; ++i) logits.push_back(2 * normal(random));
    for (int64_t i = 0; i < kLayers * kTokens * kChoices; ++i) ids.push_back(random() % kExperts);
    for (int64_t t = 0; t < kTokens; ++t) {
      mask[t] = t % 3 != 2;
      real += mask[t];
      labels.push_back(t % 2 ? -1 : t % kExperts);
    }
    for (int64_t i = 0; i < kSize; ++i) probs.push_back(std::exp(logits[i] - log_sum(logits, i / kExperts)));
  }

  static double log_sum(const std::vector<double>& z, int64_t row) {
    double sum = 0;
    for (int64_t e = 0; e < kExperts; ++e) sum += std::exp(z[row * kExperts + e]);
    return std::log(sum);
  }
};

const Problem kProblem;

using Loss = std::function<double(const std::vector<double>&)>;

void gradient_is_the_slope(const Loss& loss, std::vector<double> at, const std::vector<double>& gradient) {
  for (size_t i = 0; i < at.size(); ++i) {
    const double middle = at[i];
    const double step = 1e-4 * std::min(0.1, std::abs(middle));  // small beside a probability, whose entropy is curved
    at[i] = middle + step;
    const double above = loss(at);
    at[i] = middle - step;
    const double below = loss(at);
    at[i] = middle;
    EXPECT_NEAR(gradient[i], (above - below) / (2 * step), 1e-7);
  }
}

TEST(RoutingLossSlopes, LoadBalancingLoss) {
  for (const bool pooled : {true, false}) {
    std::vector<double> slope(kLayers * kExperts);
    const Loss loss = [&](const std::vector<double>& probs) {
      double value = NAN;
      EXPECT_EQ(cpu::load_balancing_loss({probs.data(), kProblem.ids.data(), kProblem.mask.get(), &value, slope.data(),
                                          kLayers, kTokens, kChoices, kExperts, pooled, DType::kFloat64},
                                         serial),
                Status::kOk);
      return value;
    };
    double want = 0;
    const int64_t pools = pooled ? 1 : kLayers, layers_per_pool = kLayers / pools;
    for (int64_t pool = 0; pool < pools; ++pool)
      for (int64_t e = 0; e < kExperts; ++e) {
        double chosen = 0, probability = 0;
        for (int64_t l = pool * layers_per_pool; l < (pool + 1) * layers_per_pool; ++l)
          for (int64_t t = 0; t < kTokens; ++t) {
            if (!kProblem.mask[t]) continue;
            const int64_t row = l * kTokens + t;
            for (int64_t k = 0; k < kChoices; ++k) chosen += kProblem.ids[row * kChoices + k] == e;
            probability += kProblem.probs[row * kExperts + e];
          }
        const double count = kProblem.real * double(layers_per_pool);
        want += kExperts * chosen / count * probability / count / double(pools);
      }
    EXPECT_NEAR(loss(kProblem.probs), want, 1e-13);
    const double grad_loss = 1;
    std::vector<double> gradient(kSize, NAN);
    ASSERT_EQ(cpu::load_balancing_loss_backward({&grad_loss, slope.data(), kProblem.mask.get(), gradient.data(),
                                                 kLayers, kTokens, kExperts, DType::kFloat64},
                                                serial),
              Status::kOk);
    gradient_is_the_slope(loss, kProblem.probs, gradient);
  }
}

TEST(RoutingLossSlopes, ZLoss) {
  const Loss loss = [](const std::vector<double>& logits) {
    double value = NAN;
    EXPECT_EQ(
        cpu::z_loss({logits.data(), kProblem.mask.get(), &value, kLayers, kTokens, kExperts, DType::kFloat64}, serial),
        Status::kOk);
    return value;
  };
  double want = 0;
  for (int64_t row = 0; row < kLayers * kTokens; ++row)
    if (kProblem.mask[row % kTokens]) want += std::pow(Problem::log_sum(kProblem.logits, row), 2);
  EXPECT_NEAR(loss(kProblem.logits), want / (kLayers * kProblem.real), 1e-13);
  const double grad_loss = 1;
  std::vector<double> gradient(kSize, NAN);
  ASSERT_EQ(cpu::z_loss_backward({&grad_loss, kProblem.logits.data(), kProblem.mask.get(), gradient.data(), kLayers,
                                  kTokens, kExperts, DType::kFloat64},
                                 serial),
            Status::kOk);
  gradient_is_the_slope(loss, kProblem.logits, gradient);
}

TEST(RoutingLossSlopes, LabelLoss) {
  const std::vector<double> weights = {1, 0.5, 0};
  const Loss loss = [&](const std::vector<double>& logits) {
    double value = NAN;
    EXPECT_EQ(cpu::label_loss({logits.data(), kProblem.labels.data(), kProblem.mask.get(), weights.data(), &value,
                               kLayers, kTokens, kExperts, DType::kFloat64},
                              serial),
              Status::kOk);
    return value;
  };
  double want = 0;
  for (int64_t row = 0; row < kLayers * kTokens; ++row) {
    const int64_t label = kProblem.labels[row % kTokens];
    if (label < 0 || !kProblem.mask[row % kTokens]) continue;
    want += weights[row / kTokens] / 1.5 *
            (Problem::log_sum(kProblem.logits, row) - kProblem.logits[row * kExperts + label]);
  }
  EXPECT_NEAR(loss(kProblem.logits), want, 1e-13);
  const double grad_loss = 1;
  std::vector<double> gradient(kSize, NAN);
  ASSERT_EQ(cpu::label_loss_backward({&grad_loss, kProblem.logits.data(), kProblem.labels.data(), kProblem.mask.get(),
                                      weights.data(), gradient.data(), kLayers, kTokens, kExperts, DType::kFloat64},
                                     serial),
            Status::kOk);
  gradient_is_the_slope(loss, kProblem.logits, gradient);
}

TEST(RoutingLossSlopes, RoutingEntropy) {
  std::vector<double> entropy(kLayers), grad_entropy = {1, -2, 0.5};
  const Loss loss = [&](const std::vector<double>& probs) {
    EXPECT_EQ(
        cpu::routing_entropy(
            {probs.data(), kProblem.mask.get(), entropy.data(), kLayers, kTokens, kExperts, DType::kFloat64}, serial),
        Status::kOk);
    double sum = 0;
    for (int64_t l = 0; l < kLayers; ++l) sum += grad_entropy[l] * entropy[l];
    return sum;
  };
  double want = 0;
  for (int64_t i = 0; i < kSize; ++i) {
    const int64_t row = i / kExperts;
    if (kProblem.mask[row % kTokens])
      want -= grad_entropy[row / kTokens] * kProblem.probs[i] * std::log(kProblem.probs[i]) / kProblem.real;
  }
  EXPECT_NEAR(loss(kProblem.probs), want, 1e-13);
  std::vector<double> gradient(kSize, NAN);
  ASSERT_EQ(cpu::routing_entropy_backward({grad_entropy.data(), kProblem.probs.data(), kProblem.mask.get(),
                                           gradient.data(), kLayers, kTokens, kExperts, DType::kFloat64},
                                          serial),
            Status::kOk);
  gradient_is_the_slope(loss, kProblem.probs, gradient);
}

}  // namespace
}  // namespace micro_kernels
