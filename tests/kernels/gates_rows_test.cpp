// Bytes of the kernels that work row by row: rotation, gated unit, gather, weighted sum, norm.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <set>
#include <vector>

#include "backend.h"
#include "elements.h"
#include "gates.h"
#include "micro_kernels/combine.h"
#include "micro_kernels/intervene.h"
#include "micro_kernels/moments.h"
#include "micro_kernels/permute.h"
#include "micro_kernels/rms_norm.h"
#include "micro_kernels/rope.h"
#include "micro_kernels/swiglu.h"

namespace micro_kernels {
namespace {

// The smallest backbone's layer, few tokens, two experts for each; an idle fifth of the pairs.
constexpr int64_t kTokens = 48, kHidden = 576, kK = 2, kPairs = kTokens * kK, kActive = kPairs - kPairs / 5;
constexpr int64_t kExperts = 4;

template <class T>
class GatesRows : public testing::Test {
 protected:
  using Acc = accumulator_t<T>;
  static constexpr double kRow = kHidden * sizeof(T);
  static constexpr double kIndices = 4.0 * kPairs;
  static constexpr double kWeights = sizeof(T) * kPairs;

  static Buffer<T> rows(int64_t count) { return Buffer<T>(random_elements<T>(count * kHidden, 1)); }
};
using GatedTypes = testing::Types<float, BFloat16>;
TYPED_TEST_SUITE(GatesRows, GatedTypes);

struct Plan {
  std::vector<int32_t> inverse = std::vector<int32_t>(kPairs), tokens = inverse, experts = inverse;
  std::vector<int32_t> offsets = std::vector<int32_t>(kExperts + 1, kActive);
  Plan() {
    std::iota(inverse.begin(), inverse.end(), 0);
    std::shuffle(inverse.begin(), inverse.end(), std::mt19937(3));
    for (int64_t pair = 0; pair < kPairs; ++pair) {
      tokens[inverse[pair]] = static_cast<int32_t>(pair / kK);
      experts[inverse[pair]] = inverse[pair] * int32_t{kExperts} / int32_t{kPairs};
    }
  }
};

TYPED_TEST(GatesRows, Rope) {
  using T = TypeParam;
  using Acc = accumulator_t<T>;
  constexpr int64_t kHeads = 9, kHeadDim = 64, kPositions = 24;
  const Buffer<T> x = TestFixture::rows(kTokens), y(kTokens * kHidden);
  const Buffer<Acc> cos(std::vector<Acc>(kPositions * kHeadDim / 2)), sin(std::vector<Acc>(kPositions * kHeadDim / 2));
  const Buffer<int32_t> none(0);
  // So few rows that several warps share one, and each reads its angles.
  constexpr double kAngles = kHeadDim * sizeof(Acc), kHeadsAtOnce = 2.0 * 32 * 16 / (kHeadDim / 2 * sizeof(T));
  const double warps = std::ceil(kHeads / kHeadsAtOnce);
  expect_launches(
      {{2 * kTokens * TestFixture::kRow + kPositions * kAngles, (warps * kTokens - kPositions) * kAngles}}, [&] {
        return MICRO_RUN(rope, RopeParams{x.data(), cos.data(), sin.data(), nullptr, y.data(), kTokens, kPositions,
                                          kHeads, kHeadDim, RopeDirection::kForward, kDTypeOf<T>});
      });
}

TYPED_TEST(GatesRows, Swiglu) {
  using T = TypeParam;
  constexpr int64_t kCount = kTokens * kHidden;
  const Buffer<T> gate = TestFixture::rows(kTokens), up = TestFixture::rows(kTokens), grad = TestFixture::rows(kTokens);
  const Buffer<T> y(kCount), grad_gate(kCount), grad_up(kCount);
  expect_launches({{3 * kTokens * TestFixture::kRow}}, [&] {
    return MICRO_RUN(swiglu, SwigluParams{gate.data(), up.data(), y.data(), kCount, kDTypeOf<T>});
  });
  expect_launches({{5 * kTokens * TestFixture::kRow}}, [&] {
    return MICRO_RUN(swiglu_backward, SwigluBackwardParams{grad.data(), gate.data(), up.data(), grad_gate.data(),
                                                           grad_up.data(), kCount, kDTypeOf<T>});
  });
}

TYPED_TEST(GatesRows, Permute) {
  using T = TypeParam;
  const Plan plan;
  const Buffer<int32_t> tokens(plan.tokens), offsets(plan.offsets), inverse(plan.inverse);
  const Buffer<T> x = TestFixture::rows(kTokens), y(kPairs * kHidden), grad_x(kTokens * kHidden);
  const double row = TestFixture::kRow, indices = TestFixture::kIndices;
  // A token's row is read for each of its active pairs.
  const int64_t seen = std::set<int32_t>(plan.tokens.begin(), plan.tokens.begin() + kActive).size();
  expect_launches({{(seen + kPairs) * row + indices, (kActive - seen) * row}}, [&] {
    return MICRO_RUN(permute, PermuteParams{x.data(), tokens.data(), offsets.data(), y.data(), kTokens, kPairs, kHidden,
                                            kExperts, kDTypeOf<T>});
  });
  const Buffer<T> grad_y = TestFixture::rows(kPairs);
  expect_launches({{(kActive + kTokens) * row + indices}}, [&] {
    return MICRO_RUN(permute_backward,
                     PermuteBackwardParams{grad_y.data(), offsets.data(), inverse.data(), grad_x.data(), kTokens, kK,
                                           kHidden, kExperts, kDTypeOf<T>});
  });
}

TYPED_TEST(GatesRows, Combine) {
  using T = TypeParam;
  using Acc = accumulator_t<T>;
  const Plan plan;
  const Buffer<int32_t> experts(plan.experts), offsets(plan.offsets), inverse(plan.inverse);
  const Buffer<T> y = TestFixture::rows(kPairs), weights(random_elements<T>(kPairs, 2)), out(kTokens * kHidden);
  const double row = TestFixture::kRow, indices = TestFixture::kIndices, of_weights = TestFixture::kWeights;
  expect_launches({{(kActive + kTokens) * row + 2 * indices + of_weights}}, [&] {
    return MICRO_RUN(combine, CombineParams{y.data(), weights.data(), experts.data(), offsets.data(), inverse.data(),
                                            out.data(), kTokens, kK, kHidden, kExperts, kDTypeOf<T>});
  });
  const Buffer<T> grad = TestFixture::rows(kTokens), grad_y(kPairs * kHidden);
  const Buffer<Acc> grad_weights(kPairs);
  expect_launches({{(kTokens + kActive + kPairs) * row + indices + of_weights + kPairs * double{sizeof(Acc)}}}, [&] {
    return MICRO_RUN(combine_backward, CombineBackwardParams{grad.data(), y.data(), weights.data(), offsets.data(),
                                                             inverse.data(), grad_y.data(), grad_weights.data(),
                                                             kTokens, kK, kHidden, kExperts, kDTypeOf<T>});
  });
}

// Rows in the order of a plan; each reads the gain of its expert.
TYPED_TEST(GatesRows, RmsNorm) {
  using T = TypeParam;
  using Acc = accumulator_t<T>;
  std::vector<int32_t> of_rows;
  for (int64_t r = 0; r < kTokens; ++r) of_rows.push_back(static_cast<int32_t>(r * kExperts / kTokens));
  const Buffer<int32_t> expert(of_rows);
  const Buffer<T> x = TestFixture::rows(kTokens), gain = TestFixture::rows(kExperts), y(kTokens * kHidden);
  const Buffer<Acc> inverse_rms(kTokens);
  const double row = TestFixture::kRow, small = kTokens * (4.0 + sizeof(Acc));
  const Traffic forward{(2 * kTokens + kExperts) * row + small, (kTokens - kExperts) * row};
  expect_launches({forward}, [&] {
    return MICRO_RUN(
        rms_norm, RmsNormParams{x.data(), gain.data(), expert.data(), y.data(), inverse_rms.data(), kTokens, 1, kTokens,
                                kHidden, kExperts, 1e-5, GainRounding::kBeforeGain, kDTypeOf<T>});
  });
}

// One row of x for all experts.
TYPED_TEST(GatesRows, RmsNormOfEveryExpert) {
  using T = TypeParam;
  using Acc = accumulator_t<T>;
  const Buffer<T> x = TestFixture::rows(kTokens), gain = TestFixture::rows(kExperts);
  const Buffer<T> y(kExperts * kTokens * kHidden);
  const Buffer<Acc> inverse_rms(kTokens);
  const double row = TestFixture::kRow;
  const Traffic forward{((1 + kExperts) * kTokens + kExperts) * row + kTokens * double{sizeof(Acc)},
                        (kTokens - 1) * kExperts * row};
  expect_launches({forward}, [&] {
    return MICRO_RUN(rms_norm,
                     RmsNormParams{x.data(), gain.data(), nullptr, y.data(), inverse_rms.data(), kTokens, kExperts,
                                   kTokens, kHidden, kExperts, 1e-5, GainRounding::kBeforeGain, kDTypeOf<T>});
  });
}

TYPED_TEST(GatesRows, RmsNormBackward) {
  using T = TypeParam;
  using Acc = accumulator_t<T>;
  std::vector<int32_t> of_rows;
  for (int64_t r = 0; r < kTokens; ++r) of_rows.push_back(static_cast<int32_t>(r * kExperts / kTokens));
  const Buffer<int32_t> expert(of_rows);
  const Buffer<T> x = TestFixture::rows(kTokens), gain = TestFixture::rows(kExperts),
                  grad_y = TestFixture::rows(kTokens);
  const Buffer<T> grad_x(kTokens * kHidden);
  const Buffer<Acc> inverse_rms(std::vector<Acc>(kTokens, Acc(0.5))), grad_gain(kExperts * kHidden);
  const double row = TestFixture::kRow, small = kTokens * (4.0 + sizeof(Acc)), wide_row = kHidden * double{sizeof(Acc)};
  const Traffic to_x{(3 * kTokens + kExperts) * row + small, (kTokens - kExperts) * row};
  // Every expert's blocks look at the expert of every row, one word for a warp.
  const double looks = 32.0 * kExperts * kTokens * std::ceil(row / 512);
  const Traffic parts{2 * kTokens * row + small + kExperts * wide_row, looks};
  const Traffic sums{2 * kExperts * wide_row};
  expect_launches({to_x, parts, sums}, [&] {
    return MICRO_RUN_WITH_WORKSPACE(
        rms_norm_backward,
        RmsNormBackwardParams{grad_y.data(), x.data(), gain.data(), expert.data(), inverse_rms.data(), grad_x.data(),
                              grad_gain.data(), kTokens, 1, kTokens, kHidden, kExperts, kDTypeOf<T>});
  });
}

// One factor for all rows. It is read anew for every element of a vector, and the first cache has it.
TYPED_TEST(GatesRows, Intervene) {
  using T = TypeParam;
  const Buffer<T> x = TestFixture::rows(kTokens), y(kTokens * kHidden), factor(std::vector<T>(1, T(0.5f)));
  expect_launches(
      {{2 * kTokens * TestFixture::kRow, 32.0 * kTokens * (16 / sizeof(T)) * std::ceil(TestFixture::kRow / 512)}}, [&] {
        return MICRO_RUN(intervene, InterveneParams{x.data(), y.data(), nullptr, nullptr, nullptr, factor.data(),
                                                    nullptr, kTokens, kHidden, 1, 1, 1, Change::kScale, kDTypeOf<T>});
      });
}

TYPED_TEST(GatesRows, Moments) {
  using T = TypeParam;
  std::vector<int32_t> of_rows;
  for (int64_t r = 0; r < kTokens; ++r) of_rows.push_back(static_cast<int32_t>(r % kExperts));
  const Buffer<int32_t> expert(of_rows);
  const Buffer<T> x = TestFixture::rows(kTokens);
  const std::vector<double> zeros(kExperts * kHidden);
  const Buffer<double> count(std::vector<double>(kExperts, 0.0)), mean(zeros), m2(zeros);
  // Every block of 32 columns of an expert looks at the expert of every row, one word for a warp; sums are written
  // where they were read.
  const double looks = 32.0 * kExperts * kTokens * kHidden / 32, numbers = 8.0 * kExperts, experts = 4.0 * kTokens;
  const Traffic sums{kTokens * TestFixture::kRow + experts + numbers + 2 * kHidden * numbers,
                     looks + 2 * kHidden * numbers};
  const Traffic counts{experts + numbers, kExperts * experts};
  expect_launches({sums, counts}, [&] {
    return MICRO_RUN(moments, MomentsParams{x.data(), nullptr, expert.data(), count.data(), mean.data(), m2.data(),
                                            kTokens, kHidden, kExperts, kDTypeOf<T>});
  });
}

}  // namespace
}  // namespace micro_kernels
