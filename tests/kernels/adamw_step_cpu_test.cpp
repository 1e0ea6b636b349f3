// What concerns AdamW on the CPU alone: threads and instruction sets do not change a bit.

#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "adamw_step/adamw_step_isa.h"
#include "adamw_tensors.h"
#include "micro_kernels/isa.h"

namespace micro_kernels {
namespace {

const ParallelFor kBackwards = [](int64_t count, int64_t, const auto& body) {
  for (int64_t i = count; i-- > 0;) body(i, i + 1);
};

TEST(AdamWStepOnCpu, AnyOrderOfWork) {
  std::vector<std::vector<float>> results;
  for (const ParallelFor& parallel_for : {ParallelFor(serial), kBackwards}) {
    Tensors<float> a(50'000, 1), c(3, 3);
    Tensors<BFloat16> b(40'001, 2);
    Tensors<double> d(5, 4);
    const OnDevice<float> da(a), dc(c);
    const OnDevice<BFloat16> db(b);
    const OnDevice<double> dd(d);
    const AdamWTensor views[] = {da.view(), db.view(), dc.view(), dd.view()};
    AdamWStepParams params = kSettings;
    params.tensors = views;
    params.count = 4;
    ASSERT_EQ(cpu::adamw_step(params, parallel_for), Status::kOk);
    std::vector<float> values = da.parameter.read();
    for (const auto& more : {db.master.read(), dc.parameter.read()})
      values.insert(values.end(), more.begin(), more.end());
    for (const double value : dd.parameter.read()) values.push_back(static_cast<float>(value));
    results.push_back(values);
  }
  EXPECT_EQ(results[0], results[1]);
}

#if defined(__x86_64__)
TEST(AdamWStepOnCpu, InstructionSetsGiveTheSameBits) {
  const auto run = [](const cpu::AdamWLoops& loops) {
    Tensors<BFloat16> t(1001, 9);
    const AdamWFactors<float> factors{0.5f, 0.8f, 0.2f, 0.95f, 0.05f, 0.999f, 0.01f, 2.0f, 1e-8f};
    auto* parameter = reinterpret_cast<uint16_t*>(t.parameter.data());
    loops.bfloat16(reinterpret_cast<uint16_t*>(t.gradient.data()), t.first.data(), t.second.data(), t.master.data(),
                   parameter, 1001, factors);
    t.master.insert(t.master.end(), parameter, parameter + 1001);
    return t.master;
  };
  if (cpu::isa_choice().best < cpu::Isa::kAvx2) GTEST_SKIP() << "this CPU has the plain instruction set only";
  EXPECT_EQ(run(cpu::kAdamWPlain), run(cpu::kAdamWAvx2));
  if (cpu::isa_choice().best >= cpu::Isa::kAvx512) {
    EXPECT_EQ(run(cpu::kAdamWPlain), run(cpu::kAdamWAvx512));
  }
}
#endif

}  // namespace
}  // namespace micro_kernels
