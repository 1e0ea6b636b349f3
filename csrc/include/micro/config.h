#pragma once
// What config.json of a model folder says, as C++ reads it.

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "micro/curriculum.h"
#include "micro/rope.h"
#include "micro/route.h"

namespace micro {

// Where the norms stand: in front of attention and feed-forward part, or (OLMo-2) behind them, with norms of q and k.
enum class Backbone { kLlama, kOlmo2 };

// "reference": the rounding points of the Python model. "fast": an engine may fold gains and router maps.
enum class Numerics { kReference, kFast };

// The fields of MiCRoConfig (interface.md 2) that a forward pass needs, under the names of config.json.
struct ModelConfig {
  Backbone backbone = Backbone::kLlama;
  BlockKind block_type = BlockKind::kBlock;
  int64_t vocab_size = 0;           // V
  int64_t hidden_size = 0;          // H
  int64_t intermediate_size = 0;    // F
  int64_t num_hidden_layers = 0;    // L
  int64_t num_attention_heads = 0;  // A
  int64_t num_key_value_heads = 0;  // G
  int64_t head_dim = 0;             // D
  int64_t num_experts = 0;          // E
  int64_t num_experts_per_tok = 1;  // K
  int64_t router_hidden_size = 0;   // width of the router's first map
  int64_t max_position_embeddings = 0;
  std::vector<std::string> expert_names = {};
  double rms_norm_eps = 1e-5;
  double rope_theta = 10000.0;
  std::optional<RopeScaling> rope_scaling = {};  // Llama 3's, or none
  WeightRule weight_rule = WeightRule::kRenormalized;
  Numerics numerics = Numerics::kReference;
  bool use_router = true;            // false: stage 1, tokens are routed by labels
  bool tie_word_embeddings = false;  // the head is the embedding
  std::optional<int64_t> bos_token_id = {};
  std::optional<int64_t> pad_token_id = {};
  std::vector<int64_t> eos_token_ids = {};  // every id that ends a generation

  bool is_block() const { return block_type == BlockKind::kBlock; }
};

// The words of config.json.
const char* name(Backbone value);
const char* name(Numerics value);
const char* name(WeightRule value);

}  // namespace micro
