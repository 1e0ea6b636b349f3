// What concerns the gradient norm on the CPU alone: threads do not change a bit.

#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "elements.h"
#include "micro_kernels/gradient_norm.h"

namespace micro_kernels {
namespace {

TEST(GradientNormOnCpu, AnyOrderOfWork) {
  const std::vector<float> values = random_elements<float>(70'000, 9);
  const GradientTensor tensor{values.data(), 70'000, DType::kFloat32};
  const ParallelFor backwards = [](int64_t count, int64_t, const auto& body) {
    for (int64_t i = count; i-- > 0;) body(i, i + 1);
  };
  double norm = NAN, again = NAN;
  ASSERT_EQ(cpu::gradient_norm({&tensor, 1, &norm}, serial), Status::kOk);
  ASSERT_EQ(cpu::gradient_norm({&tensor, 1, &again}, backwards), Status::kOk);
  EXPECT_EQ(norm, again);
}

}  // namespace
}  // namespace micro_kernels
