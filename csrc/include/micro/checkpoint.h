#pragma once
// A model folder without Python: its configuration, and its tensors where they lie in the mapped files.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "micro/config.h"

namespace micro {

// The tensors of one layer in the naming of the Python model (interface.md 2), zero copies of the mapped files.
//
// Whole-block experts: every list has E entries. FFN experts: gate_proj, up_proj and down_proj have E, the lists of the
// attention and the norms that they share have one. Lists that the backbone does not know are empty.
struct LayerTensors {
  at::Tensor router_in_proj;           // [R, H], R = router_hidden_size
  at::Tensor router_out_proj;          // [E, R]
  std::vector<at::Tensor> input_norm;  // [H]; Llama only
  std::vector<at::Tensor>
      post_attention_norm;                // [H]; Llama: in front of the feed-forward part, OLMo-2: behind attention
  std::vector<at::Tensor> post_ffn_norm;  // [H]; OLMo-2 only
  std::vector<at::Tensor> q_norm;         // [A * D]; OLMo-2 only
  std::vector<at::Tensor> k_norm;         // [G * D]; OLMo-2 only
  std::vector<at::Tensor> q_proj;         // [A * D, H]
  std::vector<at::Tensor> k_proj;         // [G * D, H]
  std::vector<at::Tensor> v_proj;         // [G * D, H]
  std::vector<at::Tensor> o_proj;         // [H, A * D]
  std::vector<at::Tensor> gate_proj;      // [F, H]
  std::vector<at::Tensor> up_proj;        // [F, H]
  std::vector<at::Tensor> down_proj;      // [H, F]
};

// A folder that MiCRoForCausalLM.save_pretrained wrote, or micro.upcycle: config.json, generation_config.json where
// there is one, and model.safetensors or the shards of model.safetensors.index.json.
//
//   const micro::Checkpoint checkpoint = micro::Checkpoint::open("micro-135m");
//   at::Tensor table = checkpoint.embed_tokens();                   // [V, H]
//   at::Tensor query = checkpoint.layer(0).q_proj[2];               // expert 2 of layer 0, [A * D, H]
//
// The files are mapped for reading only: nothing is read before it is used, and nothing is copied. Tensors keep the
// mapping alive after the Checkpoint is gone. They are not to be written to, and the files must not change meanwhile;
// a folder that is replaced by a rename does no harm. Data begin at multiples of the element size, and no more.
// A copy of a Checkpoint shares everything; all functions may be called by several threads at once.
class Checkpoint {
 public:
  // Checks everything but the values before it returns. Throws ValueError that names the file, the field or tensor, and
  // what was expected; of tensors that do not fit the configuration it lists all.
  static Checkpoint open(const std::string& folder);

  const std::string& folder() const;
  const ModelConfig& config() const;
  at::ScalarType dtype() const;  // of all tensors; the files decide, not config.json
  int64_t bytes() const;         // of all tensors

  // By official names ("layers.0.experts.2.self_attn.q_proj.weight"; model.md 5.1 - 5.3), sorted.
  std::vector<std::string> names() const;
  bool contains(const std::string& name) const;
  at::Tensor tensor(const std::string& name) const;  // ValueError for a name that is not there

  at::Tensor embed_tokens() const;          // [V, H]
  at::Tensor final_norm() const;            // [H]
  at::Tensor lm_head() const;               // [V, H]; the embedding where the head is tied
  LayerTensors layer(int64_t index) const;  // IndexError outside 0 .. L - 1

 private:
  struct Content;
  explicit Checkpoint(std::shared_ptr<const Content> content);

  std::shared_ptr<const Content> content_;
};

}  // namespace micro
