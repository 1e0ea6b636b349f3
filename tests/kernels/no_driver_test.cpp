// The CUDA launchers of this build on a machine without a driver: each says so, and nothing crashes. The same program
// on a machine with a device has nothing to show and skips; so does a build without CUDA kernels.

#include <gtest/gtest.h>

#include "micro_kernels/expert_linear.h"
#include "micro_kernels/rms_norm.h"
#include "micro_kernels/swiglu.h"

namespace micro_kernels {
namespace {

// Addresses that nothing reads: without a driver no kernel begins.
alignas(16) char memory[256];

Status norm() {
  return cuda::rms_norm({.x = memory,
                         .gain = memory,
                         .expert = nullptr,
                         .y = memory,
                         .inverse_rms = memory,
                         .rows = 2,
                         .copies = 1,
                         .rows_per_expert = 2,
                         .hidden = 8,
                         .experts = 1,
                         .eps = 1e-5,
                         .rounding = GainRounding::kBeforeGain,
                         .dtype = DType::kFloat32},
                        nullptr);
}

// Memory of more than 48 KB per block is asked for before the launch: the first call that meets the missing driver.
Status product() {
  cuda::LinearGroup group;
  group.x = {memory, nullptr, 16};
  group.weight = memory;
  group.y = {memory, nullptr, 16};
  group.rows = 4, group.in = 16, group.out = 16;
  return cuda::linear(&group, 1, DType::kBFloat16, nullptr);
}

Status gated() {
  return cuda::swiglu({.gate = memory, .up = memory, .y = memory, .count = 16, .dtype = DType::kFloat16}, nullptr);
}

struct Case {
  const char* name;
  Status (*run)();
};
const Case kCases[] = {{"rms_norm", norm}, {"linear", product}, {"swiglu", gated}};

TEST(NoDriver, IsAStatus) {
  if (norm() == Status::kNotBuilt) GTEST_SKIP() << "this build has no CUDA kernels";
  if (norm() == Status::kOk) GTEST_SKIP() << "this machine has a CUDA device";
  for (const Case& one : kCases) EXPECT_EQ(one.run(), Status::kNoDriver) << one.name;
  for (const Case& one : kCases) EXPECT_EQ(one.run(), Status::kNoDriver) << one.name << ", the second time";
}

TEST(NoDriver, NothingToDoNeedsNone) {
  if (norm() == Status::kNotBuilt) GTEST_SKIP() << "this build has no CUDA kernels";
  EXPECT_EQ(cuda::swiglu({.gate = nullptr, .up = nullptr, .y = nullptr, .count = 0, .dtype = DType::kFloat32}, nullptr),
            Status::kOk);
}

}  // namespace
}  // namespace micro_kernels
