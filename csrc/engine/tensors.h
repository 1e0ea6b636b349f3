#pragma once
// The tensors of a model, wherever they come from, as the engine packs them.

#include <map>
#include <string>

#include "micro/checkpoint.h"

namespace micro::engine {

struct ModelTensors {
  at::Tensor embed_tokens;  // [V, H]
  at::Tensor final_norm;    // [H]
  at::Tensor lm_head;       // [V, H]
  bool mapped = false;      // they lie in mapped files; otherwise the caller may change them: what is kept is a copy
};

// Parameters by in-memory name. Throws ValueError that lists what is missing or has another shape.
class Parameters {
 public:
  Parameters(const ModelConfig& config, const std::map<std::string, at::Tensor>& parameters);

  ModelTensors tensors() const;
  LayerTensors layer(int64_t index) const;  // views
  at::ScalarType dtype() const { return find("model.embed_tokens.weight").scalar_type(); }

 private:
  at::Tensor find(const std::string& name) const;

  const ModelConfig& config_;
  const std::map<std::string, at::Tensor>& parameters_;
};

}  // namespace micro::engine
