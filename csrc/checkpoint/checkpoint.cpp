#include "micro/checkpoint.h"

#include <ATen/ops/from_blob.h>
#include <c10/util/Exception.h>

#include <filesystem>
#include <map>
#include <set>
#include <string_view>
#include <system_error>
#include <utility>

#include "checkpoint/config_file.h"
#include "checkpoint/json.h"
#include "checkpoint/keys.h"
#include "checkpoint/mapped_file.h"
#include "checkpoint/safetensors.h"

namespace micro {

namespace fs = std::filesystem;
using micro_files::Json;
using micro_files::MappedFile;
using micro_files::TensorEntry;

namespace {

constexpr const char* kWeights = "model.safetensors";
constexpr const char* kIndex = "model.safetensors.index.json";

// A folder that may not be looked into has nothing in it, as far as this goes.
bool is_folder(const std::string& path) {
  std::error_code problem;
  return fs::is_directory(path, problem);
}
bool is_there(const std::string& path) {
  std::error_code problem;
  return fs::exists(path, problem);
}

struct Place {
  TensorEntry entry;
  const MappedFile* file;
  std::string file_name;
};
using Places = std::map<std::string, Place, std::less<>>;

std::string_view text_of(const MappedFile& file) { return {file.content().data(), file.content().size()}; }

// File of each tensor, as the index says.
std::map<std::string, std::string> read_index(const std::string& path) {
  const MappedFile file(path);
  const Json content = micro_files::parse_json(text_of(file), path);
  const Json* map = content.find("weight_map");
  TORCH_CHECK_VALUE(map && map->as<Json::Object>() && !map->as<Json::Object>()->empty(), path,
                    ": expected an object weight_map that names the file of each tensor");
  std::map<std::string, std::string> files;
  for (const auto& [tensor, value] : *map->as<Json::Object>()) {
    const auto* name = value.as<std::string>();
    TORCH_CHECK_VALUE(name, path, ": the file of tensor ", tensor, " is ", value.kind(), ", expected its name");
    // Of this folder only, whoever wrote the index.
    TORCH_CHECK_VALUE(!name->empty() && *name != "." && *name != ".." && name->find('/') == std::string::npos &&
                          name->find('\0') == std::string::npos,
                      path, ": the file of tensor ", tensor, " is '", *name,
                      "', expected a file name without a folder");
    files.emplace(tensor, *name);
  }
  return files;
}

// Collects what does not fit; one error tells all of it.
class Problems {
 public:
  void add(const std::string& problem) {
    if (++count_ > kShown) return;
    text_ += (count_ > 1 ? "; " : "") + problem;
  }
  bool too_many() const { return count_ >= kMost; }
  void raise(const std::string& folder) const {
    TORCH_CHECK_VALUE(count_ == 0, folder, ": the weights do not fit the config, ", too_many() ? "at least " : "",
                      count_, count_ == 1 ? " problem: " : " problems: ", text_,
                      count_ > kShown ? "; and " + std::to_string(count_ - kShown) + " more" : "");
  }

 private:
  static constexpr int64_t kShown = 40;
  static constexpr int64_t kMost = 1000;  // ends the search where a config names absurdly many layers

  std::string text_;
  int64_t count_ = 0;
};

std::string shape_text(at::IntArrayRef shape) { return c10::str(shape); }

void check_against(const ModelConfig& config, const Places& places, const std::string& folder) {
  Problems problems;
  std::set<std::string_view> expected;  // names of the table that are there
  micro_files::each_tensor(config, [&](const std::string& name, const std::vector<int64_t>& shape) {
    const auto found = places.find(name);
    if (found == places.end()) {
      problems.add("missing " + name + " " + shape_text(shape));
    } else {
      expected.insert(found->first);
      if (found->second.entry.shape != shape)
        problems.add(name + " (" + found->second.file_name + ") has shape " + shape_text(found->second.entry.shape) +
                     ", expected " + shape_text(shape));
    }
    return !problems.too_many();
  });
  if (!problems.too_many())
    for (const auto& [name, place] : places)
      if (!expected.contains(name))
        problems.add(config.tie_word_embeddings && name == "lm_head.weight"
                         ? "config.json ties the head, but lm_head.weight is in " + place.file_name +
                               ": set tie_word_embeddings to false"
                         : "unexpected " + name + " " + shape_text(place.entry.shape) + " in " + place.file_name);
  problems.raise(folder);
}

void check_dtypes(const Places& places, const std::string& folder) {
  const auto& [first_name, first] = *places.begin();
  for (const auto& [name, place] : places)
    TORCH_CHECK_VALUE(place.entry.dtype == first.entry.dtype, folder, "/", place.file_name, ": tensor ", name, " is ",
                      place.entry.dtype, " and tensor ", first_name, " (", first.file_name, ") ", first.entry.dtype,
                      "; expected one type for all");
}

}  // namespace

struct Checkpoint::Content {
  std::string folder;
  ModelConfig config;
  std::map<std::string, MappedFile> files;  // by file name
  Places places;
  int64_t bytes = 0;

  explicit Content(std::string path) : folder(std::move(path)) {
    TORCH_CHECK_VALUE(is_folder(folder), folder, ": no such folder; expected one with config.json and ", kWeights,
                      " or ", kIndex);
    read_config();
    if (is_there(inside(kWeights))) {
      add_file(kWeights);
    } else {
      add_shards();
    }
    check_against(config, places, folder);
    check_dtypes(places, folder);
    for (const auto& [name, place] : places) bytes += place.entry.bytes;
  }

  std::string inside(const std::string& name) const { return (fs::path(folder) / name).string(); }

  void read_config() {
    const MappedFile file(inside("config.json"));
    config = micro_files::parse_config(text_of(file), inside("config.json"));
    const std::string generation = inside("generation_config.json");
    if (!is_there(generation)) return;
    const MappedFile more(generation);
    config.eos_token_ids = micro_files::parse_eos_token_ids(text_of(more), generation);
  }

  void add_file(const std::string& name) {
    const MappedFile& file = files.try_emplace(name, inside(name)).first->second;
    for (TensorEntry& entry : micro_files::read_safetensors_header(file.content(), inside(name))) {
      const std::string tensor = entry.name;
      const auto [place, added] = places.try_emplace(tensor, Place{std::move(entry), &file, name});
      TORCH_CHECK_VALUE(added, inside(name), ": tensor ", tensor, " is in ", place->second.file_name,
                        " too, expected each tensor once");
    }
  }

  // Index and shards name the same tensors: what only one of them has would be lost silently.
  void add_shards() {
    const std::string path = inside(kIndex);
    TORCH_CHECK_VALUE(is_there(path), folder, ": neither ", kWeights, " nor ", kIndex, " is there");
    const std::map<std::string, std::string> index = read_index(path);
    for (const auto& [tensor, name] : index)
      if (!files.contains(name)) add_file(name);
    for (const auto& [tensor, name] : index) {
      const auto found = places.find(tensor);
      TORCH_CHECK_VALUE(found != places.end() && found->second.file_name == name, path, ": tensor ", tensor,
                        " is not in ", name, ", as the index says");
    }
    for (const auto& [tensor, place] : places)
      TORCH_CHECK_VALUE(index.contains(tensor), path, ": does not name tensor ", tensor, ", which is in ",
                        place.file_name);
  }
};

Checkpoint::Checkpoint(std::shared_ptr<const Content> content) : content_(std::move(content)) {}

Checkpoint Checkpoint::open(const std::string& folder) { return Checkpoint(std::make_shared<const Content>(folder)); }

const std::string& Checkpoint::folder() const { return content_->folder; }

const ModelConfig& Checkpoint::config() const { return content_->config; }

at::ScalarType Checkpoint::dtype() const { return content_->places.begin()->second.entry.dtype; }

int64_t Checkpoint::bytes() const { return content_->bytes; }

std::vector<std::string> Checkpoint::names() const {
  std::vector<std::string> names;
  for (const auto& [name, place] : content_->places) names.push_back(name);
  return names;
}

bool Checkpoint::contains(const std::string& name) const { return content_->places.contains(name); }

at::Tensor Checkpoint::tensor(const std::string& name) const {
  const auto found = content_->places.find(name);
  TORCH_CHECK_VALUE(found != content_->places.end(), content_->folder, ": there is no tensor '", name,
                    "'; expected an official name such as embed_tokens.weight or ",
                    micro_files::router_name(content_->config, 0, 0));
  const auto& [entry, file, file_name] = found->second;
  // at::Tensor knows no constant data; the pages are protected against writing.
  char* data = const_cast<char*>(file->content().data()) + entry.offset;
  return at::from_blob(
      data, entry.shape, [keep = content_](void*) {}, at::TensorOptions().dtype(entry.dtype));
}

at::Tensor Checkpoint::embed_tokens() const { return tensor("embed_tokens.weight"); }

at::Tensor Checkpoint::final_norm() const { return tensor(micro_files::final_norm_name(content_->config)); }

at::Tensor Checkpoint::lm_head() const {
  return tensor(content_->config.tie_word_embeddings ? "embed_tokens.weight" : "lm_head.weight");
}

LayerTensors Checkpoint::layer(int64_t index) const {
  const ModelConfig& config = content_->config;
  TORCH_CHECK_INDEX(0 <= index && index < config.num_hidden_layers, "layer: expected 0 .. ",
                    config.num_hidden_layers - 1, ", got ", index);
  LayerTensors layer;
  layer.router_in_proj = tensor(micro_files::router_name(config, index, 0));
  layer.router_out_proj = tensor(micro_files::router_name(config, index, 1));
  for (const micro_files::LayerKey& key : micro_files::layer_keys(config))
    for (int64_t expert = 0; expert < micro_files::count(config, key); ++expert)
      (layer.*key.list).push_back(tensor(micro_files::name(config, key, index, expert)));
  return layer;
}

}  // namespace micro
