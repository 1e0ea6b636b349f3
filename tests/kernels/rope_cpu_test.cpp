// The rotation on the CPU, bit for bit whatever the instruction set, at sizes around those of a vector.

#include <gtest/gtest.h>

#include <vector>

#include "elements.h"
#include "micro_kernels/parallel.h"
#include "micro_kernels/rope.h"

namespace micro_kernels {
namespace {

template <class T>
struct RopeBits : testing::Test {};
TYPED_TEST_SUITE(RopeBits, ElementTypes);

TYPED_TEST(RopeBits, EqualTheDefinitionInPlaceToo) {
  using T = TypeParam;
  using Acc = accumulator_t<T>;
  constexpr int64_t kRows = 5, kHeads = 2;
  for (int64_t half : {1, 4, 8, 15, 16, 17, 32, 33}) {
    SCOPED_TRACE(half);
    const std::vector<T> x = random_elements<T>(kRows * kHeads * 2 * half, 1);
    const std::vector<Acc> cos = random_elements<Acc>(kRows * half, 2), sin = random_elements<Acc>(kRows * half, 3);
    for (RopeDirection direction : {RopeDirection::kForward, RopeDirection::kBackward}) {
      const auto turn = [&](const std::vector<T>& from, std::vector<T>& to) {
        return cpu::rope({from.data(), cos.data(), sin.data(), nullptr, to.data(), kRows, kRows, kHeads, 2 * half,
                          direction, kDTypeOf<T>},
                         serial);
      };
      std::vector<T> y(x.size()), in_place = x, want(x.size());
      ASSERT_EQ(turn(x, y), Status::kOk);
      ASSERT_EQ(turn(in_place, in_place), Status::kOk);
      const Acc sign = direction == RopeDirection::kForward ? Acc(1) : Acc(-1);
      for (int64_t head = 0; head < kRows * kHeads; ++head)
        for (int64_t i = 0; i < half; ++i) {
          const int64_t at = head / kHeads * half + i, first = head * 2 * half + i;
          const Acc a = static_cast<Acc>(x[first]), b = static_cast<Acc>(x[first + half]), s = sign * sin[at];
          want[first] = T(a * cos[at] - b * s);
          want[first + half] = T(b * cos[at] + a * s);
        }
      expect_same_bits(y, want);
      expect_same_bits(in_place, want);
    }
  }
}

}  // namespace
}  // namespace micro_kernels
