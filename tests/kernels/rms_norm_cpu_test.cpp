// What only the CPU's norm promises: sums that no number of threads changes, and the same bits in every instruction
// set.

#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

#include "elements.h"
#include "micro_kernels/rms_norm.h"

namespace micro_kernels {
namespace {

// The order of the work must not show in the sums.
TEST(RmsNorm, GainGradientDoesNotDependOnThreads) {
  constexpr int64_t kRows = 40, kHidden = 300, kExperts = 3;
  const auto x = random_elements<float>(kRows * kHidden, 1), gain = random_elements<float>(kExperts * kHidden, 2);
  const auto grad_y = random_elements<float>(kRows * kHidden, 3);
  std::vector<int32_t> expert;
  for (int32_t row = 0; row < kRows; ++row) expert.push_back(row * 7 % 2);  // the last expert gets no row
  const std::vector<float> inverse_rms(kRows, 0.5f);
  std::vector<float> grad_x(x.size());
  auto grad_gain_with = [&](const ParallelFor& parallel_for) {
    std::vector<float> grad_gain(gain.size(), NAN);
    EXPECT_EQ(
        cpu::rms_norm_backward({grad_y.data(), x.data(), gain.data(), expert.data(), inverse_rms.data(), grad_x.data(),
                                grad_gain.data(), kRows, 1, kRows, kHidden, kExperts, DType::kFloat32},
                               parallel_for),
        Status::kOk);
    return grad_gain;
  };
  const ParallelFor backwards = [](int64_t count, int64_t, const auto& body) {
    for (int64_t i = count; i-- > 0;) body(i, i + 1);
  };
  EXPECT_EQ(grad_gain_with(serial), grad_gain_with(backwards));
}

// ---- bit for bit, in every element type and at sizes around those of a vector --------------------------------------

template <class T>
struct RmsNormBits : testing::Test {
  using Acc = accumulator_t<T>;

  // 16 partial sums and their tree, whatever the instruction set.
  template <class Term>
  static Acc sum(int64_t count, const Term& term) {
    Acc part[16] = {};
    for (int64_t i = 0; i < count; ++i) part[i % 16] += term(i);
    for (int64_t width = 8; width > 0; width /= 2)
      for (int64_t j = 0; j < width; ++j) part[j] += part[j + width];
    return part[0];
  }
  static Acc wide(T value) { return static_cast<Acc>(value); }
};
TYPED_TEST_SUITE(RmsNormBits, ElementTypes);

// More copies than one pass over a row makes.
TYPED_TEST(RmsNormBits, EqualTheDefinition) {
  using T = TypeParam;
  using Acc = accumulator_t<T>;
  constexpr int64_t kRows = 3, kExperts = 11;
  const auto wide = TestFixture::wide;
  for (int64_t hidden : {1, 2, 7, 8, 15, 16, 17, 33, 100, 576}) {
    SCOPED_TRACE(hidden);
    const std::vector<T> x = random_elements<T>(kRows * hidden, 1), gain = random_elements<T>(kExperts * hidden, 2);
    const std::vector<T> grad_y = random_elements<T>(kExperts * kRows * hidden, 3);
    for (GainRounding rounding : {GainRounding::kBeforeGain, GainRounding::kAfterGain}) {
      std::vector<T> y(grad_y.size()), want;
      std::vector<Acc> scale(kRows), want_scale;
      ASSERT_EQ(cpu::rms_norm({x.data(), gain.data(), nullptr, y.data(), scale.data(), kRows, kExperts, kRows, hidden,
                               kExperts, 1e-5, rounding, kDTypeOf<T>},
                              serial),
                Status::kOk);
      for (int64_t r = 0; r < kRows; ++r) {
        const T* row = x.data() + r * hidden;
        const Acc square = TestFixture::sum(hidden, [&](int64_t h) { return wide(row[h]) * wide(row[h]); });
        want_scale.push_back(Acc(1) / std::sqrt(square / static_cast<Acc>(hidden) + Acc(1e-5)));
      }
      expect_same_bits(scale, want_scale);
      for (int64_t o = 0; o < kExperts * kRows; ++o)
        for (int64_t h = 0; h < hidden; ++h) {
          const Acc norm = wide(x[o % kRows * hidden + h]) * scale[o % kRows];
          const Acc g = wide(gain[o / kRows * hidden + h]);
          want.push_back(T((rounding == GainRounding::kBeforeGain ? wide(T(norm)) : norm) * g));
        }
      expect_same_bits(y, want);
    }
  }
}

TYPED_TEST(RmsNormBits, BackwardEqualsTheDefinition) {
  using T = TypeParam;
  using Acc = accumulator_t<T>;
  constexpr int64_t kRows = 3, kExperts = 11;
  const auto wide = TestFixture::wide;
  for (int64_t hidden : {1, 2, 7, 8, 15, 16, 17, 33, 100, 576}) {
    SCOPED_TRACE(hidden);
    const std::vector<T> x = random_elements<T>(kRows * hidden, 1), gain = random_elements<T>(kExperts * hidden, 2);
    const std::vector<T> grad_y = random_elements<T>(kExperts * kRows * hidden, 3);
    const std::vector<Acc> scale{Acc(0.5), Acc(0.3), Acc(1.7)};
    std::vector<T> grad_x(x.size()), want_x;
    std::vector<Acc> grad_gain(gain.size()), want_gain(gain.size());
    ASSERT_EQ(cpu::rms_norm_backward({grad_y.data(), x.data(), gain.data(), nullptr, scale.data(), grad_x.data(),
                                      grad_gain.data(), kRows, kExperts, kRows, hidden, kExperts, kDTypeOf<T>},
                                     serial),
              Status::kOk);
    for (int64_t r = 0; r < kRows; ++r) {
      const T* row = x.data() + r * hidden;
      std::vector<Acc> g(hidden);
      for (int64_t e = 0; e < kExperts; ++e)
        for (int64_t h = 0; h < hidden; ++h) {
          const Acc upstream = wide(grad_y[(e * kRows + r) * hidden + h]);
          g[h] += upstream * wide(gain[e * hidden + h]);
          want_gain[e * hidden + h] += upstream * wide(row[h]) * scale[r];
        }
      const Acc dot = TestFixture::sum(hidden, [&](int64_t h) { return g[h] * wide(row[h]); });
      const Acc pull = dot * scale[r] * scale[r] / static_cast<Acc>(hidden);
      for (int64_t h = 0; h < hidden; ++h) want_x.push_back(T(scale[r] * (g[h] - wide(row[h]) * pull)));
    }
    expect_same_bits(grad_x, want_x);
    expect_same_bits(grad_gain, want_gain);
  }
}

}  // namespace
}  // namespace micro_kernels
