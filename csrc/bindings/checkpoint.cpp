#include "micro/checkpoint.h"

#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>

#include <filesystem>
#include <string>

#include "bindings/module.h"
#include "bindings/tensors.h"

namespace {

using micro::Checkpoint;
using micro::ModelConfig;

py::object rope_scaling(const ModelConfig& config) {
  if (!config.rope_scaling) return py::none();
  const auto& [factor, low, high, context] = *config.rope_scaling;
  return py::make_tuple(factor, low, high, context);
}

// Under the names of config.json, as far as they are the same.
py::dict config_dict(const Checkpoint& checkpoint) {
  using namespace py::literals;
  const ModelConfig& c = checkpoint.config();
  return py::dict(
      "backbone"_a = micro::name(c.backbone), "block_type"_a = micro::name(c.block_type), "vocab_size"_a = c.vocab_size,
      "hidden_size"_a = c.hidden_size, "intermediate_size"_a = c.intermediate_size,
      "num_hidden_layers"_a = c.num_hidden_layers, "num_attention_heads"_a = c.num_attention_heads,
      "num_key_value_heads"_a = c.num_key_value_heads, "head_dim"_a = c.head_dim, "num_experts"_a = c.num_experts,
      "num_experts_per_tok"_a = c.num_experts_per_tok, "router_hidden_size"_a = c.router_hidden_size,
      "max_position_embeddings"_a = c.max_position_embeddings, "expert_names"_a = c.expert_names,
      "rms_norm_eps"_a = c.rms_norm_eps, "rope_theta"_a = c.rope_theta, "rope_scaling"_a = rope_scaling(c),
      "weight_rule"_a = micro::name(c.weight_rule), "numerics"_a = micro::name(c.numerics),
      "use_router"_a = c.use_router, "tie_word_embeddings"_a = c.tie_word_embeddings, "bos_token_id"_a = c.bos_token_id,
      "pad_token_id"_a = c.pad_token_id, "eos_token_ids"_a = c.eos_token_ids);
}

// Python code may write into any tensor, the mapped files may not be written to: hence copies.
py::object copied(const at::Tensor& tensor) { return to_python(tensor.clone()); }

py::list copied(const std::vector<at::Tensor>& tensors) {
  py::list out;
  for (const at::Tensor& tensor : tensors) out.append(copied(tensor));
  return out;
}

py::dict layer_dict(const Checkpoint& checkpoint, int64_t index) {
  using namespace py::literals;
  const micro::LayerTensors t = checkpoint.layer(index);
  return py::dict("router_in_proj"_a = copied(t.router_in_proj), "router_out_proj"_a = copied(t.router_out_proj),
                  "input_norm"_a = copied(t.input_norm), "post_attention_norm"_a = copied(t.post_attention_norm),
                  "post_ffn_norm"_a = copied(t.post_ffn_norm), "q_norm"_a = copied(t.q_norm),
                  "k_norm"_a = copied(t.k_norm), "q_proj"_a = copied(t.q_proj), "k_proj"_a = copied(t.k_proj),
                  "v_proj"_a = copied(t.v_proj), "o_proj"_a = copied(t.o_proj), "gate_proj"_a = copied(t.gate_proj),
                  "up_proj"_a = copied(t.up_proj), "down_proj"_a = copied(t.down_proj));
}

}  // namespace

void bind_checkpoint(py::module_& m) {
  py::class_<Checkpoint>(m, "Checkpoint", "A model folder as C++ programs read it, for inspection. Read-only.")
      .def_static(
          "open", [](const std::filesystem::path& folder) { return Checkpoint::open(folder.string()); },
          py::arg("folder"),
          "Map a folder that save_pretrained wrote; ValueError names file, tensor and what was expected.")
      .def_property_readonly("folder", &Checkpoint::folder)
      .def_property_readonly("config", &config_dict, "The fields that a forward pass needs, by their names.")
      .def_property_readonly("bytes", &Checkpoint::bytes, "Of all tensors.")
      .def("names", &Checkpoint::names, "The official names of all tensors, sorted.")
      .def("contains", &Checkpoint::contains, py::arg("name"))
      .def(
          "tensor", [](const Checkpoint& c, const std::string& name) { return copied(c.tensor(name)); },
          py::arg("name"), "A copy of one tensor, by its official name.")
      .def("embed_tokens", [](const Checkpoint& c) { return copied(c.embed_tokens()); })
      .def("final_norm", [](const Checkpoint& c) { return copied(c.final_norm()); })
      .def(
          "lm_head", [](const Checkpoint& c) { return copied(c.lm_head()); }, "The embedding where the head is tied.")
      .def("layer", &layer_dict, py::arg("index"), "Copies of one layer's tensors, by their names in memory.")
      .def("__repr__", [](const Checkpoint& c) {
        return "Checkpoint('" + c.folder() + "', " + std::to_string(c.names().size()) + " tensors, " +
               std::to_string(c.bytes()) + " bytes)";
      });
}
