#include "checkpoint/config_file.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <set>
#include <utility>

#include "checkpoint/json.h"

namespace micro_files {
namespace {

using micro::ModelConfig;

constexpr int64_t kLargestSize = INT32_MAX;  // so that no product of two sizes overflows
constexpr int64_t kMostExperts = 65536;      // so that a broken number cannot fill the memory with names

template <class Enum, size_t n>
using Words = std::array<std::pair<Enum, const char*>, n>;

constexpr Words<micro::Backbone, 2> kBackbones = {
    {{micro::Backbone::kLlama, "llama"}, {micro::Backbone::kOlmo2, "olmo2"}}};
constexpr Words<micro::BlockKind, 2> kBlockTypes = {
    {{micro::BlockKind::kBlock, "block"}, {micro::BlockKind::kFfn, "ffn"}}};
constexpr Words<micro::WeightRule, 3> kWeightRules = {{{micro::WeightRule::kRenormalized, "renormalized"},
                                                       {micro::WeightRule::kProbability, "probability"},
                                                       {micro::WeightRule::kStraightThrough, "straight_through"}}};
constexpr Words<micro::Numerics, 2> kNumerics = {
    {{micro::Numerics::kReference, "reference"}, {micro::Numerics::kFast, "fast"}}};

template <class Enum, size_t n>
const char* word_of(const Words<Enum, n>& words, Enum value) {
  for (const auto& [known, word] : words)
    if (known == value) return word;
  TORCH_INTERNAL_ASSERT(false, "an enumerator without a word");
}

// Reads the fields of one object, each by its kind; null counts as not there.
class Fields {
 public:
  Fields(const Json& object, std::string where) : object_(object), where_(std::move(where)) {
    TORCH_CHECK_VALUE(object.as<Json::Object>(), where_, ": is ", object.kind(), ", expected an object");
  }

  bool has(const char* name) const { return find(name) != nullptr; }
  const std::string& where() const { return where_; }

  template <class T>
  T get(const char* name, const char* expected, T fallback) const {
    const Json* field = find(name);
    if (field == nullptr) return fallback;
    const T* value = field->as<T>();
    if (value == nullptr) fail(name, *field, expected);
    return *value;
  }

  bool flag(const char* name, bool fallback) const { return get(name, "true or false", fallback); }

  // A size that has to be there unless a fallback above 0 is given.
  int64_t size(const char* name, int64_t fallback = 0) const {
    const auto value = get(name, "a whole number", fallback);
    TORCH_CHECK_VALUE(has(name) || fallback > 0, where_, ": ", name, " is missing, expected a positive whole number");
    TORCH_CHECK_VALUE(value > 0 && value <= kLargestSize, where_, ": ", name, " is ", value,
                      ", expected a whole number in 1 .. ", kLargestSize);
    return value;
  }

  double positive(const char* name, double fallback) const {
    const double value = number(name, fallback);
    TORCH_CHECK_VALUE(value > 0 && std::isfinite(value), where_, ": ", name, " is ", value,
                      ", expected a positive number");
    return value;
  }

  double needed_positive(const char* name) const {
    TORCH_CHECK_VALUE(has(name), where_, ": ", name, " is missing, expected a positive number");
    return positive(name, 0.0);
  }

  double number(const char* name, double fallback) const {
    const Json* field = find(name);
    if (field == nullptr) return fallback;
    if (const auto* whole = field->as<int64_t>()) return static_cast<double>(*whole);
    const auto* value = field->as<double>();
    if (value == nullptr) fail(name, *field, "a number");
    return *value;
  }

  template <class Enum, size_t n>
  Enum word(const char* name, const Words<Enum, n>& words, const char* fallback) const {
    const std::string got = get<std::string>(name, "a string", fallback);
    std::string known;
    for (const auto& [value, word] : words) {
      if (got == word) return value;
      known += (known.empty() ? "'" : " or '") + std::string(word) + "'";
    }
    TORCH_CHECK_VALUE(false, where_, ": ", name, " is '", got, "', expected ", known);
  }

  // A token id, none, or several.
  std::vector<int64_t> ids(const char* name) const {
    const Json* field = find(name);
    if (field == nullptr) return {};
    const Json::Array one = {*field};
    const auto* several = field->as<Json::Array>();
    std::vector<int64_t> out;
    for (const Json& item : several ? *several : one) {
      const auto* id = item.as<int64_t>();
      if (id == nullptr) fail(name, item, several ? "an array of token ids" : "a token id or an array of them");
      TORCH_CHECK_VALUE(*id >= 0, where_, ": ", name, " is ", *id, ", expected a token id, which is not negative");
      out.push_back(*id);
    }
    return out;
  }

  std::optional<int64_t> id(const char* name) const {
    const std::vector<int64_t> found = ids(name);
    TORCH_CHECK_VALUE(found.size() <= 1, where_, ": ", name, " holds ", found.size(), " ids, expected one");
    return found.empty() ? std::nullopt : std::optional(found[0]);
  }

  const Json* find(const char* name) const {
    const Json* field = object_.find(name);
    return field == nullptr || field->is_null() ? nullptr : field;
  }

 private:
  [[noreturn]] void fail(const char* name, const Json& got, const char* expected) const {
    TORCH_CHECK_VALUE(false, where_, ": ", name, " is ", got.kind(), ", expected ", expected);
  }

  const Json& object_;
  std::string where_;
};

// What only has one supported value, and a folder of another library or version.
void check_kind(const Fields& fields) {
  const auto type = fields.get<std::string>("model_type", "a string", "");
  TORCH_CHECK_VALUE(type == "micro", fields.where(), ": model_type is '", type,
                    "', expected 'micro'; write the model with micro.load(folder).save_pretrained(other), or make a "
                    "mixture of a dense model with `micro upcycle`");
  const auto version = fields.get<int64_t>("format_version", "a whole number", 1);
  TORCH_CHECK_VALUE(version == 1, fields.where(), ": format_version is ", version, ", expected 1");
  const auto act = fields.get<std::string>("hidden_act", "a string", "silu");
  TORCH_CHECK_VALUE(act == "silu", fields.where(), ": hidden_act is '", act, "', expected 'silu'");
  for (const char* name : {"attention_bias", "mlp_bias"})
    TORCH_CHECK_VALUE(!fields.flag(name, false), fields.where(), ": ", name, " is true, expected false");
}

void read_sizes(const Fields& fields, ModelConfig& config) {
  config.vocab_size = fields.size("vocab_size");
  config.hidden_size = fields.size("hidden_size");
  config.intermediate_size = fields.size("intermediate_size");
  config.num_hidden_layers = fields.size("num_hidden_layers");
  config.num_attention_heads = fields.size("num_attention_heads");
  config.num_key_value_heads = fields.size("num_key_value_heads", config.num_attention_heads);
  config.head_dim = fields.size("head_dim", config.hidden_size / config.num_attention_heads);
  config.num_experts = fields.size("num_experts", 4);
  TORCH_CHECK_VALUE(config.num_experts <= kMostExperts, fields.where(), ": num_experts is ", config.num_experts,
                    ", expected at most ", kMostExperts);
  config.num_experts_per_tok = fields.size("num_experts_per_tok", 1);
  config.router_hidden_size = fields.size("router_hidden_size", config.hidden_size);
  config.max_position_embeddings = fields.size("max_position_embeddings", 2048);
  TORCH_CHECK_VALUE(config.num_attention_heads % config.num_key_value_heads == 0, fields.where(),
                    ": num_attention_heads ", config.num_attention_heads, " is no multiple of num_key_value_heads ",
                    config.num_key_value_heads);
  TORCH_CHECK_VALUE(config.head_dim % 2 == 0, fields.where(), ": head_dim is ", config.head_dim,
                    ", expected an even number: rotary positions turn pairs");
  TORCH_CHECK_VALUE(config.num_experts_per_tok <= config.num_experts, fields.where(), ": num_experts_per_tok is ",
                    config.num_experts_per_tok, ", expected 1 .. ", config.num_experts);
}

void read_rope(const Fields& fields, ModelConfig& config) {
  const Json* given = fields.find("rope_parameters");
  TORCH_CHECK_VALUE(given, fields.where(), ": rope_parameters is missing, expected rope_type and rope_theta");
  const Fields rope(*given, fields.where() + ": rope_parameters");
  config.rope_theta = rope.needed_positive("rope_theta");
  constexpr Words<bool, 2> kTypes = {{{false, "default"}, {true, "llama3"}}};
  if (!rope.word("rope_type", kTypes, "default")) return;
  config.rope_scaling = micro::RopeScaling{.factor = rope.needed_positive("factor"),
                                           .low = rope.needed_positive("low_freq_factor"),
                                           .high = rope.needed_positive("high_freq_factor"),
                                           .context = rope.needed_positive("original_max_position_embeddings")};
}

std::vector<std::string> default_names(int64_t experts) {
  if (experts == 4) return {"logic", "social", "world", "language"};
  std::vector<std::string> names;
  for (int64_t e = 0; e < experts; ++e) names.push_back("expert_" + std::to_string(e));
  return names;
}

std::vector<std::string> read_expert_names(const Fields& fields, int64_t experts) {
  const Json* field = fields.find("expert_names");
  if (field == nullptr) return default_names(experts);
  const auto* array = field->as<Json::Array>();
  TORCH_CHECK_VALUE(array, fields.where(), ": expert_names is ", field->kind(), ", expected an array of names");
  std::vector<std::string> names;
  for (const Json& item : *array) {
    const auto* name = item.as<std::string>();
    TORCH_CHECK_VALUE(name, fields.where(), ": expert_names holds ", item.kind(), ", expected names");
    names.push_back(*name);
  }
  const auto count = static_cast<int64_t>(std::set<std::string>(names.begin(), names.end()).size());
  TORCH_CHECK_VALUE(count == experts && names.size() == static_cast<size_t>(experts), fields.where(),
                    ": expert_names holds ", names.size(), " names, ", count, " of them different, expected ", experts);
  return names;
}

}  // namespace

ModelConfig parse_config(std::string_view text, const std::string& where) {
  const Json content = parse_json(text, where);
  const Fields fields(content, where);
  check_kind(fields);
  ModelConfig config;
  config.backbone = fields.word("backbone", kBackbones, "llama");
  config.block_type = fields.word("block_type", kBlockTypes, "block");
  config.weight_rule = fields.word("weight_rule", kWeightRules, "renormalized");
  config.numerics = fields.word("numerics", kNumerics, "reference");
  read_sizes(fields, config);
  read_rope(fields, config);
  config.rms_norm_eps = fields.positive("rms_norm_eps", config.backbone == micro::Backbone::kOlmo2 ? 1e-6 : 1e-5);
  config.expert_names = read_expert_names(fields, config.num_experts);
  config.use_router = fields.flag("use_router", true);
  config.tie_word_embeddings = fields.flag("tie_word_embeddings", false);
  config.bos_token_id = fields.id("bos_token_id");
  config.pad_token_id = fields.id("pad_token_id");
  config.eos_token_ids = fields.ids("eos_token_id");
  return config;
}

std::vector<int64_t> parse_eos_token_ids(std::string_view text, const std::string& where) {
  const Json content = parse_json(text, where);
  return Fields(content, where).ids("eos_token_id");
}

}  // namespace micro_files

namespace micro {

const char* name(Backbone value) { return micro_files::word_of(micro_files::kBackbones, value); }

const char* name(Numerics value) { return micro_files::word_of(micro_files::kNumerics, value); }

const char* name(WeightRule value) { return micro_files::word_of(micro_files::kWeightRules, value); }

}  // namespace micro
