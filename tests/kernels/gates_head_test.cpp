// Bytes of the kernels behind the last layer: rows of the cross-entropy, sampling, AdamW, gradient norm. What is
// changed in place counts once as memory, and again as what is asked for.

#include <gtest/gtest.h>

#include <vector>

#include "adamw_tensors.h"
#include "backend.h"
#include "elements.h"
#include "gates.h"
#include "micro_kernels/adamw_step.h"
#include "micro_kernels/cross_entropy.h"
#include "micro_kernels/gradient_norm.h"
#include "micro_kernels/sample.h"

namespace micro_kernels {
namespace {

constexpr int64_t kRows = 2, kVocabulary = 8192, kElements = 20'000;
constexpr double kSector = 32;

template <class T>
class GatesHead : public testing::Test {};
using GatedTypes = testing::Types<float, BFloat16>;
TYPED_TEST_SUITE(GatesHead, GatedTypes);

TYPED_TEST(GatesHead, CrossEntropy) {
  using T = TypeParam;
  const Buffer<T> logits(random_elements<T>(kRows * kVocabulary, 1));
  const Buffer<int64_t> targets(std::vector<int64_t>{5, 4000});
  const Buffer<accumulator_t<T>> losses(kRows);
  constexpr double kRow = kVocabulary * sizeof(T);
  expect_launches({{kRows * kRow, 2 * kRows * kRow}}, [&] {  // read, read again from the cache, written
    return MICRO_RUN(cross_entropy, CrossEntropyParams{logits.data(), targets.data(), losses.data(), kRows, kVocabulary,
                                                       true, kDTypeOf<T>});
  });
}

TYPED_TEST(GatesHead, Sample) {
  using T = TypeParam;
  const Buffer<T> logits(random_elements<T>(kRows * kVocabulary, 2));
  const Buffer<int64_t> seeds(std::vector<int64_t>{1, 2}), steps(std::vector<int64_t>{3, 4}), ids(kRows);
  SampleParams p{.logits = logits.data(),
                 .previous = nullptr,
                 .stop_ids = nullptr,
                 .seeds = seeds.data(),
                 .steps = steps.data(),
                 .ids = ids.data(),
                 .rows = kRows,
                 .vocab = kVocabulary,
                 .previous_count = 0,
                 .stop_count = 0,
                 .min_new_tokens = 0,
                 .top_k = 0,
                 .top_p = 1,
                 .temperature = 0,
                 .repetition_penalty = 1,
                 .dtype = kDTypeOf<T>};
  constexpr double kLogits = kRows * kVocabulary * sizeof(T), kNumbers = 8.0 * kRows * kVocabulary;
  expect_launches({{kLogits}}, [&] { return MICRO_RUN_WITH_WORKSPACE(sample, p); });
  // Scores are written; read for the largest; replaced by weights; read for the draw, and a sixteenth of it again.
  p.temperature = 1;
  expect_launches({{kLogits + kNumbers, (1 + 2 + 17.0 / 16) * kNumbers}},
                  [&] { return MICRO_RUN_WITH_WORKSPACE(sample, p); });
}

TYPED_TEST(GatesHead, AdamWStep) {
  using T = TypeParam;
  const OnDevice<T> tensors(Tensors<T>(kElements, 3));
  const AdamWTensor view = tensors.view();
  AdamWStepParams p = kSettings;
  p.tensors = &view;
  p.count = 1;
  // The gradient, and a rounded copy of the value or none; moments and value in and out.
  constexpr double kOnce = sizeof(T) + (kHasMaster<T> ? sizeof(T) : 0), kInPlace = 3 * sizeof(accumulator_t<T>);
  expect_launches({{kElements * (kOnce + kInPlace), kElements * kInPlace}}, [&] { return MICRO_RUN(adamw_step, p); });
}

TYPED_TEST(GatesHead, GradientNorm) {
  using T = TypeParam;
  const Buffer<T> gradient(random_elements<T>(kElements, 4));
  const Buffer<double> norm(1);
  const GradientTensor tensor{gradient.data(), kElements, kDTypeOf<T>};
  const GradientNormParams p{&tensor, 1, norm.data()};
  // Three parts in one sector, and the norm.
  expect_launches({{kElements * sizeof(T)}, {2 * kSector}}, [&] { return MICRO_RUN_WITH_WORKSPACE(gradient_norm, p); });
}

// A model of 500 million parameters has a few hundred tensors.
TEST(GatesOfAStep, Launches) {
  constexpr int64_t kTensors = 300;
  const Tensors<float> numbers(8, 5);
  std::vector<OnDevice<float>> tensors;
  std::vector<AdamWTensor> views;
  std::vector<GradientTensor> gradients;
  for (int64_t i = 0; i < kTensors; ++i) {
    tensors.emplace_back(numbers);
    views.push_back(tensors.back().view());
    gradients.push_back({views.back().gradient, views.back().size, DType::kFloat32});
  }
  AdamWStepParams p = kSettings;
  p.tensors = views.data();
  p.count = kTensors;
  EXPECT_EQ(counted_launches([&] { return MICRO_RUN(adamw_step, p); }).size(), 5U);
  const Buffer<double> norm(1);
  const GradientNormParams q{gradients.data(), kTensors, norm.data()};
  EXPECT_EQ(counted_launches([&] { return MICRO_RUN_WITH_WORKSPACE(gradient_norm, q); }).size(), 4U);
}

}  // namespace
}  // namespace micro_kernels
