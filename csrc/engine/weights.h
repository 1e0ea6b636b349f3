#pragma once
// Weights as the kernels read them: packed once, the plain copies dropped (performance.md 9.5, 9.19).

#include <ATen/core/Tensor.h>

#include <functional>
#include <map>
#include <string>
#include <vector>

#include "engine/memory.h"
#include "engine/tensors.h"
#include "micro/engine.h"
#include "micro_kernels/expert_linear.h"

namespace micro::engine {

struct LayerWeights {
  std::vector<micro_kernels::Matrix> q, k, v, o, gate, up, down;  // E entries, or 1 where the experts share it
  micro_kernels::Matrix router_in;                                // no data: folded into router_out
  micro_kernels::Matrix router_out;
  // [E, .] or [1, .]; undefined: the backbone has none, or it is folded.
  at::Tensor input_norm, post_attention_norm, post_ffn_norm, q_norm, k_norm;
};

class Weights {
 public:
  using Layers = std::function<LayerTensors(int64_t index)>;

  Weights(const ModelConfig& config, const ModelTensors& tensors, const Layers& layers, Numerics numerics,
          WeightStore store, at::ScalarType dtype);

  const at::Tensor& embedding() const { return embedding_; }    // [V, H], plain: tokens read single rows of it
  const at::Tensor& final_norm() const { return final_norm_; }  // [1, H]
  const micro_kernels::Matrix& head() const { return head_; }
  const LayerWeights& layer(int64_t index) const { return layers_[static_cast<size_t>(index)]; }
  at::ScalarType dtype() const { return dtype_; }
  int64_t bytes() const { return bytes_; }
  std::map<std::string, QuantizationError> errors() const;

 private:
  struct ErrorSum {
    double largest = 0, squares = 0, weights = 0;
  };

  void add_layer(const ModelConfig& config, LayerTensors tensors, bool fold);
  void fold_gains(const ModelConfig& config, LayerTensors& tensors);
  std::vector<micro_kernels::Matrix> pack(const char* kind, const std::vector<at::Tensor>& tensors);
  micro_kernels::Matrix pack_exact(const at::Tensor& tensor);
  micro_kernels::Matrix pack_int8(const char* kind, const at::Tensor& tensor);
  at::Tensor gains(const std::vector<at::Tensor>& tensors);
  at::Tensor typed(const at::Tensor& tensor) const;
  char* take(int64_t bytes);

  at::ScalarType dtype_;
  WeightStore store_;
  at::Tensor embedding_, final_norm_;
  micro_kernels::Matrix head_;
  std::vector<LayerWeights> layers_;
  std::vector<Mapping> memory_;
  int64_t free_ = 0;  // bytes at the end of the last mapping
  std::map<std::string, ErrorSum> errors_;
  int64_t bytes_ = 0;
};

}  // namespace micro::engine
