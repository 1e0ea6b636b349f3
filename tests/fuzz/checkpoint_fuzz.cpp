// The readers of model folders under mutated files: a ValueError, or a result that keeps what it promises.
//
//   checkpoint_fuzz CORPUS [ROUNDS] [SEED]
//
// A file of the corpus is the text of a config.json, or of a safetensors header in front of 64 bytes of data. The
// readers are compiled into this program with the sanitizers.

#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "checkpoint/config_file.h"
#include "checkpoint/json.h"
#include "checkpoint/safetensors.h"

namespace {

using micro_files::Json;

constexpr int64_t kData = 64;

void require(bool holds, const char* what) {
  if (!holds) {
    std::fprintf(stderr, "checkpoint_fuzz: %s\n", what);
    std::abort();
  }
}

void mutate(std::string& text, std::mt19937& random) {
  const auto below = [&random](size_t n) { return std::uniform_int_distribution<size_t>(0, n - 1)(random); };
  constexpr const char* kOdd[] = {"{",
                                  "}",
                                  "[",
                                  "]",
                                  ",",
                                  ":",
                                  "\"",
                                  "\\",
                                  "\\u00",
                                  "\\ud800",
                                  "\\u0",
                                  "null",
                                  "true",
                                  "-",
                                  "0",
                                  "-0",
                                  "1e999",
                                  "1.",
                                  ".5",
                                  "01",
                                  "1e-400",
                                  "NaN",
                                  "64",
                                  "65",
                                  "65536",
                                  "1e3",
                                  "9223372036854775808",
                                  "18446744073709551615",
                                  "\xff",
                                  "\xc3",
                                  "\xed\xa0\x80",
                                  "\xf4\x90\x80\x80"};
  for (size_t times = 1 + below(2); times > 0; --times) {
    const size_t at = below(text.size() + 1), length = std::min(1 + below(6), text.size() - at);
    switch (below(6)) {
      case 0:
        text.erase(at, length);
        break;
      case 1:
        text.insert(at, kOdd[below(std::size(kOdd))]);
        break;
      case 2:
        text.replace(at, length, kOdd[below(std::size(kOdd))]);
        break;
      case 3:
        text.insert(at, text.substr(below(text.size() + 1), below(40)));
        break;
      case 4:
        text.insert(at, std::string(below(100), "[{ "[below(3)]));
        break;
      default:
        if (at < text.size()) text[at] = static_cast<char>(below(256));
    }
  }
}

// ---- JSON ----------------------------------------------------------------------------------------------------------

void put_string(std::ostringstream& out, const std::string& text) {
  out << '"';
  for (const char c : text) {
    char escape[8];
    std::snprintf(escape, sizeof escape, "\\u%04x", static_cast<unsigned char>(c));
    if (c == '"' || c == '\\' || (c >= 0 && c < 0x20)) {
      out << escape;
    } else {
      out << c;
    }
  }
  out << '"';
}

void put(std::ostringstream& out, const Json& json) {
  if (json.is_null()) out << "null";
  if (const auto* flag = json.as<bool>()) out << (*flag ? "true" : "false");
  if (const auto* whole = json.as<int64_t>()) out << *whole;
  if (const auto* number = json.as<double>()) out << std::scientific << *number;
  if (const auto* text = json.as<std::string>()) put_string(out, *text);
  const char* before = "";
  if (const auto* array = json.as<Json::Array>()) {
    out << '[';
    for (const Json& item : *array) {
      out << std::exchange(before, ",");
      put(out, item);
    }
    out << ']';
  }
  if (const auto* object = json.as<Json::Object>()) {
    out << '{';
    for (const auto& [key, item] : *object) {
      out << std::exchange(before, ",");
      put_string(out, key);
      out << ':';
      put(out, item);
    }
    out << '}';
  }
}

std::string written(const Json& json) {
  std::ostringstream out;
  out.precision(17);
  put(out, json);
  return out.str();
}

bool check_json(const std::string& text) {
  try {
    const std::string once = written(micro_files::parse_json(text, "fuzz"));
    require(once == written(micro_files::parse_json(once, "fuzz")), "a value is not what it is when written and read");
    return true;
  } catch (const c10::ValueError&) {
    return false;
  }
}

// ---- the files -----------------------------------------------------------------------------------------------------

bool check_config(const std::string& text) {
  try {
    const micro::ModelConfig config = micro_files::parse_config(text, "fuzz");
    for (const int64_t size : {config.vocab_size, config.hidden_size, config.intermediate_size, config.head_dim,
                               config.num_hidden_layers, config.num_experts_per_tok, config.router_hidden_size})
      require(size > 0 && size <= INT32_MAX, "a size is out of range");
    require(config.num_attention_heads % config.num_key_value_heads == 0, "heads do not fall into groups");
    require(config.expert_names.size() == static_cast<size_t>(config.num_experts), "an expert has no name");
    require(config.rms_norm_eps > 0 && config.rope_theta > 0, "a number is not positive");
    return true;
  } catch (const c10::ValueError&) {
    return false;
  }
}

bool check_header(std::string text) {
  text.resize((text.size() + 7) / 8 * 8, ' ');
  std::string file(8, '\0');
  const uint64_t length = text.size();
  std::memcpy(file.data(), &length, sizeof length);
  file += text;
  const auto start = static_cast<int64_t>(file.size());
  file.append(kData, 'x');
  try {
    int64_t end = start;
    for (const micro_files::TensorEntry& entry : micro_files::read_safetensors_header(file, "fuzz")) {
      auto bytes = static_cast<int64_t>(c10::elementSize(entry.dtype));
      require(entry.offset % bytes == 0, "data of a tensor are not aligned to its element");
      for (const int64_t size : entry.shape) bytes *= size;
      require(entry.offset == end && entry.bytes == bytes, "data do not follow one another");
      end += bytes;
    }
    require(end == start + kData, "data do not end with the file");
    return true;
  } catch (const c10::ValueError&) {
    return false;
  }
}

std::string read(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) {
    std::fprintf(stderr, "usage: checkpoint_fuzz CORPUS [ROUNDS] [SEED]\n");
    return 2;
  }
  const int rounds = argc > 2 ? std::atoi(argv[2]) : 20000;
  std::mt19937 random(argc > 3 ? static_cast<unsigned>(std::atoi(argv[3])) : 0);
  std::vector<std::string> corpus;
  std::vector<std::filesystem::path> files;
  for (const auto& entry : std::filesystem::directory_iterator(argv[1])) files.push_back(entry.path());
  std::sort(files.begin(), files.end());
  for (const auto& file : files) corpus.push_back(read(file));
  require(!corpus.empty(), "the corpus is empty");
  int json = 0, configs = 0, headers = 0;
  for (int round = 0; round < rounds; ++round) {
    std::string text = corpus[static_cast<size_t>(round) % corpus.size()];
    const bool mutated = round >= static_cast<int>(corpus.size());
    if (mutated) mutate(text, random);
    const int before = configs + headers;
    json += check_json(text);
    configs += check_config(text);
    headers += check_header(text);
    require(mutated || configs + headers > before, "a file of the corpus is refused");
  }
  std::printf("checkpoint_fuzz: %d inputs; accepted: %d as JSON, %d as configuration, %d as header\n", rounds, json,
              configs, headers);
  std::fflush(stdout);
  require(rounds < 1000 || (json > rounds / 20 && json < rounds && configs > rounds / 100 && headers > rounds / 100),
          "the mutations are too mild or too wild to test anything");
  return 0;
}
