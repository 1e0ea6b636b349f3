#include "micro/rope.h"

#include <ATen/Functions.h>
#include <gtest/gtest.h>

#include <cmath>

namespace {

TEST(Rope, ATurnKeepsLengthsAndItsGradientTurnsBack) {
  const micro::RopeTable table = micro::rope_table(at::arange(5), micro::rope_frequencies(8, 10000.0));
  const at::Tensor x = at::randn({2, 5, 3, 8}).requires_grad_();
  const at::Tensor y = micro::rope(x, table.cos, table.sin);
  EXPECT_TRUE(at::allclose(y.norm(2, -1), x.norm(2, -1), 1e-5, 1e-5));
  y.backward(y.detach());
  EXPECT_TRUE(at::allclose(x.grad(), x, 1e-5, 1e-5));
}

TEST(Rope, TokensChooseTheRowOfTheTable) {
  const micro::RopeTable table = micro::rope_table(at::arange(5), micro::rope_frequencies(8, 10000.0));
  const at::Tensor x = at::randn({3, 2, 8}), tokens = at::tensor({4, 0, 2}, at::kInt);
  const at::Tensor chosen = tokens.to(at::kLong);
  EXPECT_TRUE(at::equal(micro::rope(x, table.cos, table.sin, tokens),
                        micro::rope(x, table.cos.index_select(0, chosen), table.sin.index_select(0, chosen))));
}

TEST(Rope, FrequenciesAreWorkedOutInFloat32) {
  const at::Tensor f = micro::rope_frequencies(64, 500000.0);
  for (int64_t i = 0; i < 32; ++i) EXPECT_NEAR(f[i].item<double>() * std::pow(500000.0, double(2 * i) / 64), 1.0, 3e-6);
  const at::Tensor scaled = micro::rope_frequencies(64, 500000.0, micro::RopeScaling{32, 1, 4, 8192});
  EXPECT_EQ(scaled[0].item<float>(), f[0].item<float>());
  EXPECT_EQ(scaled[31].item<float>(), f[31].item<float>() / 32);
}

TEST(Rope, MistakesAreNamed) {
  EXPECT_THROW(micro::rope_frequencies(7, 10000.0), c10::ValueError);
  EXPECT_THROW(micro::rope(at::randn({5, 1, 8}), at::ones({5, 3}), at::ones({5, 4})), c10::ValueError);
}

}  // namespace
