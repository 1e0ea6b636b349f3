// The choice of the next token from C++.

#include "micro/sample.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/full.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>
#include <gtest/gtest.h>

namespace micro {
namespace {

TEST(Sample, TakesTheLargestByDefault) {
  const at::Tensor logits = at::randn({5, 77});
  EXPECT_TRUE(at::equal(sample(logits), logits.argmax(1)));
}

TEST(Sample, DrawsByTheSeedOfTheRow) {
  const at::Tensor logits = at::zeros({64, 100}), seeds = at::arange(64), steps = at::zeros({64}, at::kLong);
  const at::Tensor ids = sample(logits, {.temperature = 1, .seeds = seeds, .steps = steps});
  EXPECT_TRUE(at::equal(ids, sample(logits, {.temperature = 1, .seeds = seeds, .steps = steps})));
  const at::Tensor later = sample(logits, {.temperature = 1, .seeds = seeds, .steps = steps + 1});
  EXPECT_LT(ids.eq(later).sum().item<int64_t>(), 10);
}

TEST(Sample, BarsAndPenalises) {
  const at::Tensor logits = at::tensor({1.0, 3.0, 2.5, 0.0}).reshape({1, 4});
  const at::Tensor one = at::full({1}, 1, at::kLong);
  EXPECT_EQ(sample(logits, {.min_new_tokens = 2, .stop_ids = one, .steps = one}).item<int64_t>(), 2);
  EXPECT_EQ(sample(logits, {.min_new_tokens = 1, .stop_ids = one, .steps = one}).item<int64_t>(), 1);
  EXPECT_EQ(sample(logits, {.repetition_penalty = 1.5, .previous = one.reshape({1, 1})}).item<int64_t>(), 2);
}

TEST(Sample, NamesWhatIsMissing) {
  const at::Tensor logits = at::zeros({2, 3});
  EXPECT_THROW(sample(logits, {.temperature = 1}), c10::ValueError);
  EXPECT_THROW(sample(logits, {.repetition_penalty = 2}), c10::ValueError);
  EXPECT_THROW(sample(logits, {.min_new_tokens = 2}), c10::ValueError);
  EXPECT_THROW(sample(logits.to(at::kHalf)), c10::TypeError);
}

}  // namespace
}  // namespace micro
