// The gated unit's loops against double, for each instruction set that this CPU has.

#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

#include "micro_kernels/dtype.h"
#include "micro_kernels/isa.h"
#include "swiglu/swiglu_isa.h"

namespace micro_kernels {
namespace {

struct Backend {
  const char* name;
  cpu::Isa isa;
  const cpu::SwigluLoops& loops;
};

std::vector<Backend> backends() {
  std::vector<Backend> all{{"plain", cpu::Isa::kPlain, cpu::kSwigluPlain}};
#if defined(__x86_64__)
  if (cpu::isa_choice().best >= cpu::Isa::kAvx2) all.push_back({"avx2", cpu::Isa::kAvx2, cpu::kSwigluAvx2});
  if (cpu::isa_choice().best >= cpu::Isa::kAvx512) all.push_back({"avx512", cpu::Isa::kAvx512, cpu::kSwigluAvx512});
#endif
  return all;
}

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

class SwigluLoopsTest : public testing::TestWithParam<std::tuple<Backend, int64_t>> {
 protected:
  SwigluLoopsTest() {
    std::mt19937 random(7);
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < std::get<1>(GetParam()); ++i) {
      gate_.push_back(normal(random) * (i % 5 == 0 ? 40.0f : 2.0f));
      up_.push_back(normal(random));
      grad_.push_back(normal(random));
    }
  }
  int64_t count() const { return static_cast<int64_t>(gate_.size()); }
  const cpu::SwigluLoops& loops_ = std::get<0>(GetParam()).loops;
  std::vector<float> gate_, up_, grad_;
};

TEST_P(SwigluLoopsTest, ForwardEqualsTheDefinition) {
  std::vector<float> y(gate_.size(), NAN);
  loops_.float32.forward(gate_.data(), up_.data(), y.data(), count());
  for (size_t i = 0; i < y.size(); ++i) {
    const double want = double(gate_[i]) * sigmoid(gate_[i]) * up_[i];
    EXPECT_NEAR(y[i], want, 1e-6 * std::abs(want) + 1e-30) << gate_[i];
  }
}

TEST_P(SwigluLoopsTest, BackwardEqualsTheDefinition) {
  std::vector<float> grad_gate(gate_.size(), NAN), grad_up(gate_.size(), NAN);
  loops_.float32.backward(grad_.data(), gate_.data(), up_.data(), grad_gate.data(), grad_up.data(), count());
  for (size_t i = 0; i < gate_.size(); ++i) {
    const double g = gate_[i], s = sigmoid(g), d = grad_[i];
    EXPECT_NEAR(grad_gate[i], d * up_[i] * s * (1 + g * (1 - s)), 4e-6 * std::abs(d * up_[i]));
    EXPECT_NEAR(grad_up[i], d * g * s, 1e-6 * std::abs(d * g));
  }
}

TEST_P(SwigluLoopsTest, DoubleAndBFloat16AgreeWithFloat) {
  std::vector<double> gate(gate_.begin(), gate_.end()), up(up_.begin(), up_.end()), y(gate_.size(), NAN);
  loops_.float64.forward(gate.data(), up.data(), y.data(), count());
  std::vector<uint16_t> low_gate, low_up, low_y(gate_.size());
  for (size_t i = 0; i < gate_.size(); ++i) {
    low_gate.push_back(BFloat16(gate_[i]).bits);
    low_up.push_back(BFloat16(up_[i]).bits);
  }
  loops_.bfloat16.forward(low_gate.data(), low_up.data(), low_y.data(), count());
  for (size_t i = 0; i < y.size(); ++i) {
    EXPECT_NEAR(y[i], gate[i] * sigmoid(gate[i]) * up[i], 1e-14 * std::abs(gate[i] * up[i]));
    const double g = __builtin_bit_cast(float, uint32_t{low_gate[i]} << 16);
    const double want = g * sigmoid(g) * __builtin_bit_cast(float, uint32_t{low_up[i]} << 16);
    EXPECT_NEAR(__builtin_bit_cast(float, uint32_t{low_y[i]} << 16), want, 0.0041 * std::abs(want) + 1e-30);
  }
}

INSTANTIATE_TEST_SUITE_P(Sizes, SwigluLoopsTest,
                         testing::Combine(testing::ValuesIn(backends()), testing::Values(0, 1, 15, 16, 17, 33, 1000)),
                         [](const auto& info) {
                           return std::string(std::get<0>(info.param).name) + "_" +
                                  std::to_string(std::get<1>(info.param));
                         });

}  // namespace
}  // namespace micro_kernels
