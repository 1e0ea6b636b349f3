#include "checkpoint/keys.h"

namespace micro_files {

using micro::LayerTensors;
using micro::ModelConfig;

namespace {

std::string layer_prefix(int64_t layer) { return "layers." + std::to_string(layer) + "."; }

}  // namespace

std::vector<LayerKey> layer_keys(const ModelConfig& config) {
  const int64_t hidden = config.hidden_size, inner = config.intermediate_size;
  const int64_t queries = config.num_attention_heads * config.head_dim;
  const int64_t keys = config.num_key_value_heads * config.head_dim;
  std::vector<LayerKey> table = {
      {&LayerTensors::post_attention_norm, "post_attention_layernorm", false, {hidden}},
      {&LayerTensors::q_proj, "self_attn.q_proj", false, {queries, hidden}},
      {&LayerTensors::k_proj, "self_attn.k_proj", false, {keys, hidden}},
      {&LayerTensors::v_proj, "self_attn.v_proj", false, {keys, hidden}},
      {&LayerTensors::o_proj, "self_attn.o_proj", false, {hidden, queries}},
      {&LayerTensors::gate_proj, config.is_block() ? "mlp.gate_proj" : "gate_proj", true, {inner, hidden}},
      {&LayerTensors::up_proj, config.is_block() ? "mlp.up_proj" : "up_proj", true, {inner, hidden}},
      {&LayerTensors::down_proj, config.is_block() ? "mlp.down_proj" : "down_proj", true, {hidden, inner}},
  };
  if (config.backbone == micro::Backbone::kOlmo2) {
    table.push_back({&LayerTensors::post_ffn_norm, "post_feedforward_layernorm", false, {hidden}});
    table.push_back({&LayerTensors::q_norm, "self_attn.q_norm", false, {queries}});
    table.push_back({&LayerTensors::k_norm, "self_attn.k_norm", false, {keys}});
  } else {
    table.push_back({&LayerTensors::input_norm, "input_layernorm", false, {hidden}});
  }
  return table;
}

int64_t count(const ModelConfig& config, const LayerKey& key) {
  return config.is_block() || key.feed_forward ? config.num_experts : 1;
}

std::string name(const ModelConfig& config, const LayerKey& key, int64_t layer, int64_t expert) {
  std::string prefix = layer_prefix(layer);
  if (config.is_block()) {
    prefix += "experts." + std::to_string(expert) + ".";
  } else if (key.feed_forward) {
    prefix += "block_sparse_moe.experts." + std::to_string(expert) + ".";
  }
  return prefix + key.name + ".weight";
}

std::string router_name(const ModelConfig& config, int64_t layer, int map) {
  return layer_prefix(layer) + (config.is_block() ? "gate." : "block_sparse_moe.gate.") + std::to_string(map) +
         ".weight";
}

std::string final_norm_name(const ModelConfig& config) {
  return config.backbone == micro::Backbone::kOlmo2 ? "norm.weight" : "final_norm.weight";
}

void each_tensor(const ModelConfig& config,
                 const std::function<bool(const std::string&, const std::vector<int64_t>&)>& visit) {
  const std::vector<int64_t> table = {config.vocab_size, config.hidden_size};
  if (!visit("embed_tokens.weight", table)) return;
  if (!config.tie_word_embeddings && !visit("lm_head.weight", table)) return;
  if (!visit(final_norm_name(config), {config.hidden_size})) return;
  const std::vector<LayerKey> keys = layer_keys(config);
  for (int64_t layer = 0; layer < config.num_hidden_layers; ++layer) {
    if (!visit(router_name(config, layer, 0), {config.router_hidden_size, config.hidden_size})) return;
    if (!visit(router_name(config, layer, 1), {config.num_experts, config.router_hidden_size})) return;
    for (const LayerKey& key : keys)
      for (int64_t expert = 0; expert < count(config, key); ++expert)
        if (!visit(name(config, key, layer, expert), key.shape)) return;
  }
}

}  // namespace micro_files
