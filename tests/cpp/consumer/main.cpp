#include <ATen/ops/full.h>
#include <ATen/ops/ones.h>
#include <micro/build_info.h>
#include <micro/rms_norm.h>
#include <micro/version.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <string>

// A row of threes, normed, is a row of ones.
int main() {
  const at::Tensor y = micro::rms_norm(at::full({2, 8}, 3.0), at::ones({1, 8}), std::nullopt, 0.0);
  const float* values = y.const_data_ptr<float>();
  const bool ones = std::all_of(values, values + y.numel(), [](float v) { return std::abs(v - 1.0F) < 1e-6F; });
  const bool right = ones && micro::build_info().version == MICRO_VERSION;
  std::printf("micro %s from C++: %s\n", MICRO_VERSION, right ? "right" : "WRONG");
  return right ? 0 : 1;
}
