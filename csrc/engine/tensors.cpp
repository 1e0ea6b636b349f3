#include "engine/tensors.h"

#include <c10/util/Exception.h>

#include <vector>

namespace micro::engine {
namespace {

using Sizes = std::vector<int64_t>;
using Lists = std::vector<at::Tensor> LayerTensors::*;

struct Entry {
  const char* name;  // below "model.layers.<l>."
  Lists list;
  Sizes sizes;   // of one expert
  bool stacked;  // [E, ...]; otherwise shared by the experts
};

std::vector<Entry> entries(const ModelConfig& c) {
  const int64_t hidden = c.hidden_size, inner = c.intermediate_size;
  const int64_t queries = c.num_attention_heads * c.head_dim, keys = c.num_key_value_heads * c.head_dim;
  const bool block = c.is_block(), olmo = c.backbone == Backbone::kOlmo2;
  std::vector<Entry> out = {
      {block ? "blocks.q_proj" : "self_attn.q_proj", &LayerTensors::q_proj, {queries, hidden}, block},
      {block ? "blocks.k_proj" : "self_attn.k_proj", &LayerTensors::k_proj, {keys, hidden}, block},
      {block ? "blocks.v_proj" : "self_attn.v_proj", &LayerTensors::v_proj, {keys, hidden}, block},
      {block ? "blocks.o_proj" : "self_attn.o_proj", &LayerTensors::o_proj, {hidden, queries}, block},
      {"blocks.gate_proj", &LayerTensors::gate_proj, {inner, hidden}, true},
      {"blocks.up_proj", &LayerTensors::up_proj, {inner, hidden}, true},
      {"blocks.down_proj", &LayerTensors::down_proj, {hidden, inner}, true},
      {block ? "blocks.post_attention_norm" : "post_attention_layernorm",
       &LayerTensors::post_attention_norm,
       {hidden},
       block},
  };
  if (olmo) {
    out.push_back({block ? "blocks.q_norm" : "self_attn.q_norm", &LayerTensors::q_norm, {queries}, block});
    out.push_back({block ? "blocks.k_norm" : "self_attn.k_norm", &LayerTensors::k_norm, {keys}, block});
    out.push_back(
        {block ? "blocks.post_ffn_norm" : "post_feedforward_layernorm", &LayerTensors::post_ffn_norm, {hidden}, block});
  } else {
    out.push_back({block ? "blocks.input_norm" : "input_layernorm", &LayerTensors::input_norm, {hidden}, block});
  }
  return out;
}

std::string layer_name(int64_t layer, const std::string& name) {
  return "model.layers." + std::to_string(layer) + "." + name + ".weight";
}

std::map<std::string, Sizes> shapes(const ModelConfig& c) {
  const Sizes table = {c.vocab_size, c.hidden_size};
  std::map<std::string, Sizes> out = {{"model.embed_tokens.weight", table}, {"model.norm.weight", {c.hidden_size}}};
  if (!c.tie_word_embeddings) out["lm_head.weight"] = table;
  for (int64_t l = 0; l < c.num_hidden_layers; ++l) {
    out[layer_name(l, "router.in_proj")] = {c.router_hidden_size, c.hidden_size};
    out[layer_name(l, "router.out_proj")] = {c.num_experts, c.router_hidden_size};
    for (Entry& entry : entries(c)) {
      if (entry.stacked) entry.sizes.insert(entry.sizes.begin(), c.num_experts);
      out[layer_name(l, entry.name)] = entry.sizes;
    }
  }
  return out;
}

}  // namespace

Parameters::Parameters(const ModelConfig& config, const std::map<std::string, at::Tensor>& parameters)
    : config_(config), parameters_(parameters) {
  constexpr size_t kShown = 20;
  std::vector<std::string> problems;
  const at::ScalarType* dtype = nullptr;
  at::ScalarType first;
  for (const auto& [name, sizes] : shapes(config)) {
    const auto found = parameters.find(name);
    if (found == parameters.end()) {
      problems.push_back(name + " is missing");
      continue;
    }
    const at::Tensor& tensor = found->second;
    if (!dtype) dtype = &(first = tensor.scalar_type());
    if (tensor.sizes() != at::IntArrayRef(sizes))
      problems.push_back(c10::str(name, " has shape ", tensor.sizes(), ", expected ", at::IntArrayRef(sizes)));
    else if (tensor.scalar_type() != *dtype || !tensor.is_cpu())
      problems.push_back(c10::str(name, " is ", tensor.scalar_type(), " on ", tensor.device(), ", expected ", *dtype,
                                  " on the CPU as the others"));
  }
  if (problems.empty()) return;
  std::string list;
  for (size_t i = 0; i < problems.size() && i < kShown; ++i) list += (i ? "; " : "") + problems[i];
  TORCH_CHECK_VALUE(false, "Engine: the parameters do not fit the configuration, ", problems.size(),
                    " problems: ", list);
}

at::Tensor Parameters::find(const std::string& name) const { return parameters_.at(name).detach(); }

ModelTensors Parameters::tensors() const {
  const at::Tensor embedding = find("model.embed_tokens.weight");
  return {.embed_tokens = embedding,
          .final_norm = find("model.norm.weight"),
          .lm_head = config_.tie_word_embeddings ? embedding : find("lm_head.weight"),
          .mapped = false};
}

LayerTensors Parameters::layer(int64_t index) const {
  LayerTensors out;
  out.router_in_proj = find(layer_name(index, "router.in_proj"));
  out.router_out_proj = find(layer_name(index, "router.out_proj"));
  for (const Entry& entry : entries(config_)) {
    const at::Tensor tensor = find(layer_name(index, entry.name));
    out.*entry.list = entry.stacked ? tensor.unbind(0) : std::vector<at::Tensor>{tensor};
  }
  return out;
}

}  // namespace micro::engine
