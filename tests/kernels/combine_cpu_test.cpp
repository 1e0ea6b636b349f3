// The gradient of the weights on the CPU: one order of additions for every instruction set.

#include <gtest/gtest.h>

#include <numeric>
#include <vector>

#include "elements.h"
#include "micro_kernels/combine.h"
#include "micro_kernels/parallel.h"

namespace micro_kernels {
namespace {

template <class T>
struct CombineDot : testing::Test {};
TYPED_TEST_SUITE(CombineDot, ElementTypes);

// 16 partial sums and their tree.
TYPED_TEST(CombineDot, HasOneOrder) {
  using T = TypeParam;
  using Acc = accumulator_t<T>;
  const auto wide = [](T value) { return static_cast<Acc>(value); };
  constexpr int64_t kTokens = 9, kK = 3, kPairs = kTokens * kK;
  std::vector<int32_t> inverse(kPairs);
  std::iota(inverse.rbegin(), inverse.rend(), 0);
  const std::vector<int32_t> offsets{0, kPairs - 5};
  for (int64_t hidden : {1, 8, 15, 16, 17, 33, 300}) {
    SCOPED_TRACE(hidden);
    const std::vector<T> y = random_elements<T>(kPairs * hidden, 1), grad = random_elements<T>(kTokens * hidden, 3);
    std::vector<Acc> grad_weights(kPairs), want(kPairs);
    ASSERT_EQ(cpu::combine_backward({grad.data(), y.data(), nullptr, offsets.data(), inverse.data(), nullptr,
                                     grad_weights.data(), kTokens, kK, hidden, 1, kDTypeOf<T>},
                                    serial),
              Status::kOk);
    for (int64_t pair = 0; pair < kPairs; ++pair) {
      if (inverse[pair] >= offsets[1]) continue;
      Acc part[16] = {};
      for (int64_t h = 0; h < hidden; ++h)
        part[h % 16] += wide(grad[pair / kK * hidden + h]) * wide(y[inverse[pair] * hidden + h]);
      for (int64_t width = 8; width > 0; width /= 2)
        for (int64_t j = 0; j < width; ++j) part[j] += part[j + width];
      want[pair] = part[0];
    }
    expect_same_bits(grad_weights, want);
  }
}

}  // namespace
}  // namespace micro_kernels
