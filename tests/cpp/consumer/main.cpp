#include <ATen/ops/full.h>
#include <ATen/ops/ones.h>
#include <micro/build_info.h>
#include <micro/checkpoint.h>
#include <micro/rms_norm.h>
#include <micro/version.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <string>

namespace {

// A row of threes, normed, is a row of ones.
bool norms() {
  const at::Tensor y = micro::rms_norm(at::full({2, 8}, 3.0), at::ones({1, 8}), std::nullopt, 0.0);
  const float* values = y.const_data_ptr<float>();
  return std::all_of(values, values + y.numel(), [](float v) { return std::abs(v - 1.0F) < 1e-6F; });
}

// A folder that Python wrote.
bool opens(const std::string& folder) {
  const micro::Checkpoint checkpoint = micro::Checkpoint::open(folder);
  const micro::ModelConfig& config = checkpoint.config();
  return checkpoint.layer(config.num_hidden_layers - 1).q_proj.size() == config.expert_names.size() &&
         checkpoint.embed_tokens().size(0) == config.vocab_size;
}

}  // namespace

// consumer [FOLDER]: uses an operator, and opens a model folder where one is given.
int main(int argc, char** argv) {
  const bool right = norms() && micro::build_info().version == MICRO_VERSION && (argc < 2 || opens(argv[1]));
  std::printf("micro %s from C++: %s\n", MICRO_VERSION, right ? "right" : "WRONG");
  return right ? 0 : 1;
}
