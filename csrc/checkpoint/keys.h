#pragma once
// Official names and shapes of the tensors of a folder (model.md 5.1 - 5.3): the table that micro/modeling/keys.py has.

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "micro/checkpoint.h"

namespace micro_files {

// One list of LayerTensors on disk.
struct LayerKey {
  std::vector<at::Tensor> micro::LayerTensors::*list;
  const char* name;  // below an expert, or below the layer where experts share it; without ".weight"
  bool feed_forward;
  std::vector<int64_t> shape;
};

// The lists that a layer of this model has.
std::vector<LayerKey> layer_keys(const micro::ModelConfig& config);

// How many tensors a list holds: one per expert, or one that all share.
int64_t count(const micro::ModelConfig& config, const LayerKey& key);
std::string name(const micro::ModelConfig& config, const LayerKey& key, int64_t layer, int64_t expert);

std::string router_name(const micro::ModelConfig& config, int64_t layer, int map);  // map 0, then 1
std::string final_norm_name(const micro::ModelConfig& config);

// Calls visit(name, shape) for every tensor of a folder, until it returns false.
void each_tensor(const micro::ModelConfig& config,
                 const std::function<bool(const std::string&, const std::vector<int64_t>&)>& visit);

}  // namespace micro_files
