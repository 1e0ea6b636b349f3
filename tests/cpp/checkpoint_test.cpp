// Model folders, written by the test itself: what is read, and one clear error for everything that is broken.

#include "micro/checkpoint.h"

#include <ATen/ops/equal.h>
#include <ATen/ops/from_blob.h>
#include <c10/util/Exception.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <map>
#include <numeric>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

namespace micro {
namespace {

namespace fs = std::filesystem;

using Shape = std::vector<int64_t>;
using Tensors = std::map<std::string, std::vector<float>>;
using Shapes = std::map<std::string, Shape>;

constexpr int64_t V = 7, H = 8, F = 6, A = 2, G = 1, D = 4, E = 3, L = 2, R = 5;

const char* kConfig = R"({"model_type": "micro", "backbone": "%BACKBONE%", "block_type": "%KIND%", "vocab_size": 7,
  "hidden_size": 8, "intermediate_size": 6, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
  "head_dim": 4, "num_experts": 3, "expert_names": ["a", "\u00e9\ud83d\ude00", "c"], "num_experts_per_tok": 2,
  "router_hidden_size": 5, "rms_norm_eps": 1e-06, "weight_rule": "straight_through", "numerics": "fast",
  "tie_word_embeddings": %TIED%, "bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": null,
  "max_position_embeddings": 64, "use_router": false,
  "rope_parameters": {"rope_type": "llama3", "rope_theta": 500000, "factor": 8.0, "low_freq_factor": 1.0,
                      "high_freq_factor": 4.0, "original_max_position_embeddings": 32}})";

std::string replaced(std::string text, const std::string& from, const std::string& to) {
  const size_t at = text.find(from);
  EXPECT_NE(at, std::string::npos) << from;
  if (at != std::string::npos) text.replace(at, from.size(), to);
  return text;
}

struct Model {
  bool block = true, olmo2 = false, tied = false;
};

std::string config_text(const Model& model) {
  std::string text = replaced(kConfig, "%BACKBONE%", model.olmo2 ? "olmo2" : "llama");
  text = replaced(text, "%KIND%", model.block ? "block" : "ffn");
  return replaced(text, "%TIED%", model.tied ? "true" : "false");
}

// The tables of model.md 5.1 - 5.3, written out.
Shapes shapes_of(const Model& model) {
  Shapes out = {{"embed_tokens.weight", {V, H}}, {model.olmo2 ? "norm.weight" : "final_norm.weight", {H}}};
  if (!model.tied) out["lm_head.weight"] = {V, H};
  const auto add_attention = [&](const std::string& at) {
    out[at + "self_attn.q_proj.weight"] = {A * D, H};
    out[at + "self_attn.k_proj.weight"] = {G * D, H};
    out[at + "self_attn.v_proj.weight"] = {G * D, H};
    out[at + "self_attn.o_proj.weight"] = {H, A * D};
    out[at + "post_attention_layernorm.weight"] = {H};
    if (model.olmo2) {
      out[at + "self_attn.q_norm.weight"] = {A * D};
      out[at + "self_attn.k_norm.weight"] = {G * D};
      out[at + "post_feedforward_layernorm.weight"] = {H};
    } else {
      out[at + "input_layernorm.weight"] = {H};
    }
  };
  for (int64_t l = 0; l < L; ++l) {
    const std::string layer = "layers." + std::to_string(l) + ".";
    const std::string moe = model.block ? layer : layer + "block_sparse_moe.";
    out[moe + "gate.0.weight"] = {R, H};
    out[moe + "gate.1.weight"] = {E, R};
    if (!model.block) add_attention(layer);
    for (int64_t e = 0; e < E; ++e) {
      const std::string expert = moe + "experts." + std::to_string(e) + ".";
      if (model.block) add_attention(expert);
      const std::string ffn = model.block ? expert + "mlp." : expert;
      out[ffn + "gate_proj.weight"] = {F, H};
      out[ffn + "up_proj.weight"] = {F, H};
      out[ffn + "down_proj.weight"] = {H, F};
    }
  }
  return out;
}

int64_t elements(const Shape& shape) {
  return std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>());
}

// No two numbers of a model are equal, so that a tensor in the wrong place is seen.
Tensors values_of(const Shapes& shapes) {
  Tensors out;
  float next = 1;
  for (const auto& [name, shape] : shapes) {
    std::vector<float>& values = out[name];
    for (int64_t i = elements(shape); i > 0; --i) values.push_back(next++);
  }
  return out;
}

std::string entry_text(const std::string& name, const Shape& shape, int64_t begin, int64_t end) {
  std::ostringstream out;
  out << '"' << name << R"(":{"dtype":"F32","shape":[)";
  for (size_t i = 0; i < shape.size(); ++i) out << (i ? "," : "") << shape[i];
  out << R"(],"data_offsets":[)" << begin << "," << end << "]}";
  return out.str();
}

void write(const fs::path& path, const std::string& content) {
  std::ofstream file(path, std::ios::binary);
  file << content;
  ASSERT_TRUE(file.good()) << path;
}

// The header as it is given, padded to 8 bytes like that of the format's own library.
std::string file_text(std::string header, const std::string& data) {
  header.resize((header.size() + 7) / 8 * 8, ' ');
  std::string length(8, '\0');
  const uint64_t bytes = header.size();
  std::memcpy(length.data(), &bytes, sizeof bytes);
  return length + header + data;
}

std::string header_text(const Shapes& shapes) {
  std::string header = R"({"__metadata__":{"format":"pt"})";
  int64_t end = 0;
  for (const auto& [name, shape] : shapes) {
    const int64_t begin = std::exchange(end, end + 4 * elements(shape));
    header.append(",").append(entry_text(name, shape, begin, end));
  }
  return header + "}";
}

std::string data_text(const Shapes& shapes, const Tensors& values) {
  std::string data;
  for (const auto& [name, shape] : shapes)
    data.append(reinterpret_cast<const char*>(values.at(name).data()), 4 * values.at(name).size());
  return data;
}

class CheckpointTest : public testing::Test {
 protected:
  CheckpointTest() : folder_(fs::path(testing::TempDir()) / ("micro_checkpoint_test_" + std::to_string(::getpid()))) {
    fs::remove_all(folder_);
    fs::create_directories(folder_);
  }
  ~CheckpointTest() override { fs::remove_all(folder_); }

  void write_model(const Model& model) {
    shapes_ = shapes_of(model);
    values_ = values_of(shapes_);
    write(folder_ / "config.json", config_text(model));
    write_weights(header_text(shapes_));
  }
  void write_weights(const std::string& header) {
    write(folder_ / "model.safetensors", file_text(header, data_text(shapes_, values_)));
  }

  // Every other tensor in either file.
  void write_shards() {
    fs::remove(folder_ / "model.safetensors");
    Shapes parts[2];
    std::string index;
    int i = 0;
    for (const auto& [name, shape] : shapes_) {
      parts[i % 2][name] = shape;
      index += (i ? ",\"" : "\"") + name + "\":\"part-" + std::to_string(i % 2) + ".safetensors\"";
      ++i;
    }
    for (const int part : {0, 1})
      write(folder_ / ("part-" + std::to_string(part) + ".safetensors"),
            file_text(header_text(parts[part]), data_text(parts[part], values_)));
    write(folder_ / "model.safetensors.index.json", "{\"metadata\":{},\"weight_map\":{" + index + "}}");
  }

  Checkpoint open() const { return Checkpoint::open(folder_.string()); }

  at::Tensor expected(const std::string& name) {
    return at::from_blob(values_.at(name).data(), shapes_.at(name), at::kFloat);
  }

  void expect_equal(const at::Tensor& got, const std::string& name) {
    EXPECT_EQ(got.sizes(), c10::IntArrayRef(shapes_.at(name))) << name;
    EXPECT_TRUE(at::equal(got, expected(name))) << name;
  }

  void expect_error(const std::vector<std::string>& parts) {
    try {
      open();
      ADD_FAILURE() << "no error, expected one with '" << parts[0] << "'";
    } catch (const c10::ValueError& error) {
      for (const std::string& part : parts)
        EXPECT_NE(std::string(error.what_without_backtrace()).find(part), std::string::npos)
            << "expected '" << part << "' in: " << error.what_without_backtrace();
    }
  }

  fs::path folder_;
  Shapes shapes_;
  Tensors values_;
};

// ---- what is read --------------------------------------------------------------------------------------------------

TEST_F(CheckpointTest, ReadsTheConfiguration) {
  write_model({});
  const ModelConfig config = open().config();
  EXPECT_EQ(config.backbone, Backbone::kLlama);
  EXPECT_EQ(config.block_type, BlockKind::kBlock);
  const Shape sizes = {config.vocab_size,         config.hidden_size,         config.intermediate_size,
                       config.head_dim,           config.num_hidden_layers,   config.num_attention_heads,
                       config.num_experts,        config.num_key_value_heads, config.router_hidden_size,
                       config.num_experts_per_tok};
  EXPECT_EQ(sizes, (Shape{V, H, F, D, L, A, E, G, R, 2}));
  EXPECT_EQ(config.expert_names, (std::vector<std::string>{"a", "\u00e9\U0001F600", "c"}));
  EXPECT_EQ(config.rms_norm_eps, 1e-6);
  EXPECT_EQ(config.rope_theta, 500000.0);
  ASSERT_TRUE(config.rope_scaling.has_value());
  EXPECT_EQ(config.rope_scaling->factor, 8.0);
  EXPECT_EQ(config.rope_scaling->low, 1.0);
  EXPECT_EQ(config.rope_scaling->high, 4.0);
  EXPECT_EQ(config.rope_scaling->context, 32.0);
  EXPECT_EQ(config.weight_rule, WeightRule::kStraightThrough);
  EXPECT_EQ(config.numerics, Numerics::kFast);
  EXPECT_EQ(config.max_position_embeddings, 64);
  EXPECT_FALSE(config.use_router);
  EXPECT_EQ(config.bos_token_id, 1);
  EXPECT_FALSE(config.pad_token_id.has_value());
  EXPECT_EQ(config.eos_token_ids, (Shape{2, 3}));
}

TEST_F(CheckpointTest, FieldsThatAreNotThereHaveTheDefaultsOfPython) {
  write_model({});
  write(folder_ / "config.json",
        R"({"model_type":"micro","vocab_size":7,"hidden_size":8,"intermediate_size":6,"num_hidden_layers":2,
            "num_attention_heads":2,"num_key_value_heads":1,"num_experts":3,"router_hidden_size":5,
            "rope_parameters":{"rope_theta":10000.0}})");
  const ModelConfig config = open().config();
  EXPECT_EQ(config.head_dim, 4);
  EXPECT_EQ(config.num_experts_per_tok, 1);
  EXPECT_EQ(config.rms_norm_eps, 1e-5);
  EXPECT_EQ(config.expert_names, (std::vector<std::string>{"expert_0", "expert_1", "expert_2"}));
  EXPECT_FALSE(config.rope_scaling.has_value());
  EXPECT_EQ(config.weight_rule, WeightRule::kRenormalized);
  EXPECT_TRUE(config.use_router);
  EXPECT_TRUE(config.eos_token_ids.empty());
}

TEST_F(CheckpointTest, TheGenerationConfigNamesTheIdsThatEnd) {
  write_model({});
  write(folder_ / "generation_config.json", R"({"eos_token_id": 6})");
  EXPECT_EQ(open().config().eos_token_ids, Shape{6});
  write(folder_ / "generation_config.json", R"({"eos_token_id": "end"})");
  expect_error({"generation_config.json: eos_token_id is a string, expected a token id or an array of them"});
}

class CheckpointKinds : public CheckpointTest, public testing::WithParamInterface<Model> {};

TEST_P(CheckpointKinds, EveryTensorIsWhereItBelongs) {
  const Model model = GetParam();
  write_model(model);
  for (const bool sharded : {false, true}) {
    if (sharded) write_shards();
    const Checkpoint checkpoint = open();
    EXPECT_EQ(checkpoint.dtype(), at::kFloat);
    std::vector<std::string> names;
    int64_t bytes = 0;
    for (const auto& [name, shape] : shapes_) {
      names.push_back(name);
      bytes += 4 * elements(shape);
      EXPECT_TRUE(checkpoint.contains(name));
      expect_equal(checkpoint.tensor(name), name);
    }
    EXPECT_EQ(checkpoint.names(), names);
    EXPECT_EQ(checkpoint.bytes(), bytes);
    expect_equal(checkpoint.embed_tokens(), "embed_tokens.weight");
    expect_equal(checkpoint.lm_head(), model.tied ? "embed_tokens.weight" : "lm_head.weight");
    expect_equal(checkpoint.final_norm(), model.olmo2 ? "norm.weight" : "final_norm.weight");
  }
}

TEST_P(CheckpointKinds, ALayerHasOneTensorPerExpertOrOneForAll) {
  const Model model = GetParam();
  write_model(model);
  const Checkpoint checkpoint = open();
  for (int64_t l = 0; l < L; ++l) {
    const LayerTensors layer = checkpoint.layer(l);
    const std::string at = "layers." + std::to_string(l) + ".", moe = model.block ? at : at + "block_sparse_moe.";
    expect_equal(layer.router_in_proj, moe + "gate.0.weight");
    expect_equal(layer.router_out_proj, moe + "gate.1.weight");
    const auto expect_list = [&](const std::vector<at::Tensor>& list, const std::string& name, bool ffn, bool exists) {
      const bool shared = !model.block && !ffn;
      ASSERT_EQ(list.size(), !exists ? 0u : shared ? 1u : static_cast<size_t>(E)) << name;
      for (size_t e = 0; e < list.size(); ++e)
        expect_equal(list[e], (shared ? at : moe + "experts." + std::to_string(e) + ".") +
                                  (ffn && model.block ? "mlp." : "") + name + ".weight");
    };
    expect_list(layer.input_norm, "input_layernorm", false, !model.olmo2);
    expect_list(layer.post_attention_norm, "post_attention_layernorm", false, true);
    expect_list(layer.post_ffn_norm, "post_feedforward_layernorm", false, model.olmo2);
    expect_list(layer.q_norm, "self_attn.q_norm", false, model.olmo2);
    expect_list(layer.k_norm, "self_attn.k_norm", false, model.olmo2);
    expect_list(layer.q_proj, "self_attn.q_proj", false, true);
    expect_list(layer.k_proj, "self_attn.k_proj", false, true);
    expect_list(layer.v_proj, "self_attn.v_proj", false, true);
    expect_list(layer.o_proj, "self_attn.o_proj", false, true);
    expect_list(layer.gate_proj, "gate_proj", true, true);
    expect_list(layer.up_proj, "up_proj", true, true);
    expect_list(layer.down_proj, "down_proj", true, true);
  }
  EXPECT_THROW(checkpoint.layer(L), c10::IndexError);
  EXPECT_THROW(checkpoint.layer(-1), c10::IndexError);
}

INSTANTIATE_TEST_SUITE_P(All, CheckpointKinds,
                         testing::Values(Model{true, false, false}, Model{true, true, false},
                                         Model{false, false, false}, Model{false, true, true},
                                         Model{true, false, true}));

TEST_F(CheckpointTest, TensorsAreViewsThatOutliveTheCheckpoint) {
  write_model({});
  at::Tensor table;
  {
    const Checkpoint checkpoint = open();
    table = checkpoint.embed_tokens();
    EXPECT_EQ(table.data_ptr(), checkpoint.tensor("embed_tokens.weight").data_ptr());
    EXPECT_EQ(table.data_ptr(), Checkpoint(checkpoint).embed_tokens().data_ptr());
  }
  fs::remove(folder_ / "model.safetensors");
  expect_equal(table, "embed_tokens.weight");
}

TEST_F(CheckpointTest, AnUnknownNameIsAnError) {
  write_model({});
  const Checkpoint checkpoint = open();
  EXPECT_FALSE(checkpoint.contains("model.embed_tokens.weight"));
  EXPECT_THROW(checkpoint.tensor("model.embed_tokens.weight"), c10::ValueError);
}

// ---- broken folders ------------------------------------------------------------------------------------------------

TEST_F(CheckpointTest, MissingFilesAreNamed) {
  const std::string nowhere = (folder_ / "nowhere").string();
  EXPECT_THROW(Checkpoint::open(nowhere), c10::ValueError);
  expect_error({"config.json: cannot be read (No such file or directory)"});
  write_model({});
  fs::remove(folder_ / "model.safetensors");
  expect_error({"neither model.safetensors nor model.safetensors.index.json is there"});
}

TEST_F(CheckpointTest, BrokenConfigurationsAreNamed) {
  write_model({});
  const std::string good = config_text({});
  const std::vector<std::array<std::string, 3>> changes = {
      {"\"micro\"", "\"llama\"", "config.json: model_type is 'llama', expected 'micro'"},
      {"\"llama\"", "\"gpt\"", "backbone is 'gpt', expected 'llama' or 'olmo2'"},
      {"\"block\"", "7", "block_type is a whole number, expected a string"},
      {"\"vocab_size\": 7", "\"vocab_size\": 7.0", "vocab_size is a number with a fraction, expected a whole number"},
      {"\"vocab_size\": 7", "\"vocab_size\": -7", "vocab_size is -7, expected a whole number in 1 .."},
      {"\"vocab_size\": 7,", "", "vocab_size is missing"},
      {"\"num_attention_heads\": 2", "\"num_attention_heads\": 3", "the weights do not fit the config, 12 problems"},
      {"\"num_key_value_heads\": 1", "\"num_key_value_heads\": 4", "is no multiple of num_key_value_heads 4"},
      {"\"head_dim\": 4", "\"head_dim\": 3", "head_dim is 3, expected an even number"},
      {"\"num_experts_per_tok\": 2", "\"num_experts_per_tok\": 4", "num_experts_per_tok is 4, expected 1 .. 3"},
      {"\"num_experts\": 3", "\"num_experts\": 99999999", "num_experts is 99999999, expected at most"},
      {"[\"a\",", "[\"c\",", "expert_names holds 3 names, 2 of them different, expected 3"},
      {"1e-06", "-1", "rms_norm_eps is -1, expected a positive number"},
      {"\"fast\"", "\"quick\"", "numerics is 'quick', expected 'reference' or 'fast'"},
      {"\"llama3\"", "\"yarn\"", "rope_parameters: rope_type is 'yarn', expected 'default' or 'llama3'"},
      {"\"factor\": 8.0,", "", "rope_parameters: factor is missing"},
      {"\"eos_token_id\": [2, 3]", "\"eos_token_id\": [2, -3]", "eos_token_id is -3, expected a token id"},
      {"\"bos_token_id\": 1", "\"bos_token_id\": [1, 2]", "bos_token_id holds 2 ids, expected one"},
      {"\"use_router\": false", "\"use_router\": 0", "use_router is a whole number, expected true or false"},
      {"\"head_dim\": 4,", "\"head_dim\": 4 ", "config.json: not valid JSON at byte"},
      {"\"head_dim\": 4,", "\"head_dim\": 4, \"head_dim\": 4,", "the key \"head_dim\" comes twice"},
  };
  for (const auto& [from, to, message] : changes) {
    write(folder_ / "config.json", replaced(good, from, to));
    expect_error({message});
  }
}

TEST_F(CheckpointTest, TensorsThatDoNotFitTheConfigurationAreListedTogether) {
  write_model({});
  write(folder_ / "config.json", replaced(config_text({}), "\"vocab_size\": 7", "\"vocab_size\": 9"));
  expect_error({"2 problems", "embed_tokens.weight (model.safetensors) has shape [7, 8], expected [9, 8]",
                "lm_head.weight (model.safetensors) has shape [7, 8], expected [9, 8]"});
  write(folder_ / "config.json", replaced(config_text({}), "\"num_hidden_layers\": 2", "\"num_hidden_layers\": 1"));
  expect_error({"unexpected layers.1.experts.0.input_layernorm.weight [8] in model.safetensors"});
  write(folder_ / "config.json", replaced(config_text({}), "\"num_hidden_layers\": 2", "\"num_hidden_layers\": 3"));
  expect_error({"29 problems", "missing layers.2.experts.2.mlp.down_proj.weight [8, 6]"});
  write(folder_ / "config.json",
        replaced(config_text({}), "\"num_hidden_layers\": 2", "\"num_hidden_layers\": 2000000000"));
  expect_error({"at least 1000 problems", "and 960 more"});
  write(folder_ / "config.json", config_text({.tied = true}));
  expect_error({"config.json ties the head, but lm_head.weight is in model.safetensors"});
}

TEST_F(CheckpointTest, BrokenHeadersAreNamed) {
  write_model({});
  const std::string good = header_text(shapes_);
  const std::string name = "embed_tokens.weight";
  const std::string entry = entry_text(name, {V, H}, 0, 4 * V * H);
  const std::vector<std::array<std::string, 3>> changes = {
      {entry, entry_text(name, {V, H}, 0, 4 * V * H - 4), "embed_tokens.weight: holds 220 bytes, expected 224"},
      {entry, entry_text(name, {V, H}, 4 * V * H, 0), "data_offsets are [224, 0], expected a start and an end"},
      {entry, entry_text(name, {V, H}, 32, 32 + 4 * V * H), "bytes before tensor embed_tokens.weight belong to no"},
      {entry, entry_text(name, {V, H}, 4'000'000, 4'000'224), "embed_tokens.weight: its data end at byte 4000224"},
      {entry, entry_text(name, {V, -H}, 0, 4 * V * H), "shape holds -8, expected whole numbers"},
      {entry, entry_text(name, {int64_t{1} << 40, int64_t{1} << 40}, 0, 224), "is larger than any file"},
      {entry, replaced(entry, "F32", "I32"), "embed_tokens.weight: dtype is I32, expected F64, F32, BF16 or F16"},
      {entry, replaced(entry, "\"dtype\":\"F32\",", ""), "embed_tokens.weight: dtype is missing"},
      {entry, "\"" + name + "\":3", "embed_tokens.weight: is a whole number, expected an object"},
      {entry, entry + "," + entry, "header: not valid JSON at byte"},
      {"," + entry, "", "model.safetensors: 224 bytes before tensor final_norm.weight belong to no tensor"},
      {"{", "[", "model.safetensors: header: not valid JSON at byte"},
  };
  for (const auto& [from, to, message] : changes) {
    write_weights(replaced(good, from, to));
    expect_error({"model.safetensors", message});
  }
}

TEST_F(CheckpointTest, AllTensorsHaveOneType) {
  write_model({});
  shapes_["embed_tokens.weight"] = {V, H / 2};  // half the bytes, for numbers of half the size
  values_ = values_of(shapes_);
  write_weights(replaced(header_text(shapes_), R"("F32","shape":[7,4])", R"("F16","shape":[7,8])"));
  expect_error({"tensor final_norm.weight is Float and tensor embed_tokens.weight (model.safetensors) Half",
                "expected one type for all"});
}

TEST_F(CheckpointTest, OverlappingDataAreNamed) {
  write_model({});
  shapes_.erase("lm_head.weight");  // the data of the embedding a second time
  const std::string entry = entry_text("lm_head.weight", {V, H}, 0, 4 * V * H);
  write_weights(replaced(header_text(shapes_), "{\"format\":\"pt\"}", "{\"format\":\"pt\"}," + entry));
  expect_error({"model.safetensors: tensor", "overlaps tensor", "embed_tokens.weight", "lm_head.weight"});
}

TEST_F(CheckpointTest, FilesThatAreCutShortAreNamed) {
  write_model({});
  const fs::path file = folder_ / "model.safetensors";
  const auto size = static_cast<int64_t>(fs::file_size(file));
  std::string content(static_cast<size_t>(size), '\0');
  std::ifstream(file, std::ios::binary).read(content.data(), size);
  for (const int64_t length : {size - 1, size - 4 * H, size / 2, int64_t{100}, int64_t{8}, int64_t{7}, int64_t{0}}) {
    write(file, content.substr(0, static_cast<size_t>(length)));
    expect_error({"model.safetensors"});
  }
  write(file, content + "more");
  expect_error({"its header says", "expected a file that ends with its last tensor"});
  write(file, std::string(8, '\xff') + content);
  expect_error({"hold no safetensors header of 18446744073709551615 bytes"});
}

TEST_F(CheckpointTest, DataBeginAtMultiplesOfTheElement) {
  write_model({});
  std::string header = header_text(shapes_);
  for (int spaces = 0; spaces < 8; ++spaces) {  // no padding of the header: its length is any number
    header += ' ';
    std::string length(8, '\0');
    const uint64_t bytes = header.size();
    std::memcpy(length.data(), &bytes, sizeof bytes);
    write(folder_ / "model.safetensors", length + header + data_text(shapes_, values_));
    if (bytes % 4 == 0) {
      expect_equal(open().embed_tokens(), "embed_tokens.weight");
    } else {
      expect_error({"expected a multiple of 4; write the file again with save_pretrained"});
    }
  }
}

TEST_F(CheckpointTest, BrokenShardsAreNamed) {
  write_model({});
  write_shards();
  const fs::path index = folder_ / "model.safetensors.index.json";
  std::ostringstream text;
  text << std::ifstream(index).rdbuf();
  const std::string good = text.str(), first = "\"embed_tokens.weight\":\"part-0.safetensors\"";
  const std::vector<std::array<std::string, 3>> changes = {
      {first, "\"embed_tokens.weight\":\"part-1.safetensors\"", "embed_tokens.weight is not in part-1.safetensors"},
      {first, "\"embed_tokens.weight\":\"part-2.safetensors\"", "part-2.safetensors: cannot be read"},
      {first, "\"embed_tokens.weight\":\"../part-0.safetensors\"", "expected a file name without a folder"},
      {first, "\"embed_tokens.weight\":5", "the file of tensor embed_tokens.weight is a whole number"},
      {first + ",", "", "does not name tensor embed_tokens.weight, which is in part-0.safetensors"},
      {"weight_map", "weights", "expected an object weight_map"},
      {"{", "", "model.safetensors.index.json: not valid JSON at byte"},
  };
  for (const auto& [from, to, message] : changes) {
    write(index, replaced(good, from, to));
    expect_error({message});
  }
  write(index, good);
  fs::copy_file(folder_ / "part-0.safetensors", folder_ / "part-1.safetensors", fs::copy_options::overwrite_existing);
  expect_error({"part-1.safetensors: tensor", "is in part-0.safetensors too, expected each tensor once"});
}

}  // namespace
}  // namespace micro
