#include "checkpoint/safetensors.h"

#include <c10/util/ArrayRef.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <string_view>
#include <utility>

#include "checkpoint/json.h"

namespace micro_files {
namespace {

constexpr int64_t kLengthBytes = 8;
constexpr int64_t kLongestHeader = 100'000'000;  // the limit of the format's own library

c10::ScalarType parse_dtype(const Json* field, const std::string& where) {
  constexpr std::pair<std::string_view, c10::ScalarType> kDtypes[] = {{"F64", c10::ScalarType::Double},
                                                                      {"F32", c10::ScalarType::Float},
                                                                      {"BF16", c10::ScalarType::BFloat16},
                                                                      {"F16", c10::ScalarType::Half}};
  const auto* word = field ? field->as<std::string>() : nullptr;
  TORCH_CHECK_VALUE(word, where, ": dtype is ", field ? field->kind() : "missing", ", expected a string");
  for (const auto& [name, dtype] : kDtypes)
    if (*word == name) return dtype;
  TORCH_CHECK_VALUE(false, where, ": dtype is ", *word, ", expected F64, F32, BF16 or F16");
}

std::vector<int64_t> parse_sizes(const Json* field, const char* name, const std::string& where) {
  const auto* array = field ? field->as<Json::Array>() : nullptr;
  TORCH_CHECK_VALUE(array, where, ": ", name, " is ", field ? field->kind() : "missing",
                    ", expected an array of whole numbers");
  std::vector<int64_t> sizes;
  for (const Json& item : *array) {
    const auto* size = item.as<int64_t>();
    TORCH_CHECK_VALUE(size && *size >= 0, where, ": ", name, " holds ",
                      size ? std::to_string(*size) : std::string(item.kind()),
                      ", expected whole numbers that are not negative");
    sizes.push_back(*size);
  }
  return sizes;
}

// Bytes of the data; a product that no file could hold is an error.
int64_t data_bytes(const TensorEntry& entry, const std::string& where) {
  auto bytes = static_cast<int64_t>(c10::elementSize(entry.dtype));
  for (const int64_t size : entry.shape)
    TORCH_CHECK_VALUE(!__builtin_mul_overflow(bytes, size, &bytes), where, ": the shape ",
                      c10::IntArrayRef(entry.shape), " is larger than any file");
  return bytes;
}

TensorEntry parse_entry(const std::string& name, const Json& fields, int64_t start, int64_t size,
                        const std::string& file) {
  const std::string where = file + ": tensor " + name;
  TORCH_CHECK_VALUE(fields.as<Json::Object>(), where, ": is ", fields.kind(),
                    ", expected an object of dtype, shape and data_offsets");
  TensorEntry entry{.name = name,
                    .dtype = parse_dtype(fields.find("dtype"), where),
                    .shape = parse_sizes(fields.find("shape"), "shape", where),
                    .offset = 0,
                    .bytes = 0};
  const std::vector<int64_t> place = parse_sizes(fields.find("data_offsets"), "data_offsets", where);
  TORCH_CHECK_VALUE(place.size() == 2 && place[0] <= place[1], where, ": data_offsets are ", c10::IntArrayRef(place),
                    ", expected a start and an end behind it");
  TORCH_CHECK_VALUE(place[1] <= size, where, ": its data end at byte ", place[1], ", but the file holds ", size,
                    " bytes of data; is the file complete?");
  entry.offset = start + place[0];
  entry.bytes = place[1] - place[0];
  const int64_t expected = data_bytes(entry, where);
  TORCH_CHECK_VALUE(entry.bytes == expected, where, ": holds ", entry.bytes, " bytes, expected ", expected, " for ",
                    c10::IntArrayRef(entry.shape), " of ", entry.dtype);
  const auto element = static_cast<int64_t>(c10::elementSize(entry.dtype));
  TORCH_CHECK_VALUE(entry.offset % element == 0, where, ": begins at byte ", entry.offset,
                    " of the file, expected a multiple of ", element, "; write the file again with save_pretrained");
  return entry;
}

// The data of a file cover it without overlap and without gaps, as the format demands.
void check_cover(const std::vector<TensorEntry>& entries, int64_t start, int64_t size, const std::string& where) {
  int64_t end = start;
  const TensorEntry* before = nullptr;
  for (const TensorEntry& entry : entries) {
    TORCH_CHECK_VALUE(entry.offset >= end, where, ": tensor ", entry.name, " overlaps tensor ",
                      before ? before->name : "", "; expected data that follow one another");
    TORCH_CHECK_VALUE(entry.offset == end, where, ": ", entry.offset - end, " bytes before tensor ", entry.name,
                      " belong to no tensor; expected data that follow one another");
    end = entry.offset + entry.bytes;
    before = &entry;
  }
  TORCH_CHECK_VALUE(end == start + size, where, ": holds ", size, " bytes of data, its header says ", end - start,
                    "; expected a file that ends with its last tensor");
}

}  // namespace

std::vector<TensorEntry> read_safetensors_header(std::span<const char> file, const std::string& where) {
  const auto size = static_cast<int64_t>(file.size());
  TORCH_CHECK_VALUE(size >= kLengthBytes, where, ": ", size,
                    " bytes, expected a safetensors file, which begins with 8 bytes of header length; is it complete?");
  uint64_t length = 0;
  for (int i = kLengthBytes; i-- > 0;) length = length << 8 | static_cast<unsigned char>(file[static_cast<size_t>(i)]);
  TORCH_CHECK_VALUE(length <= static_cast<uint64_t>(std::min(size - kLengthBytes, kLongestHeader)), where, ": ", size,
                    " bytes hold no safetensors header of ", length, " bytes; is the file complete?");
  const int64_t start = kLengthBytes + static_cast<int64_t>(length);
  const Json header = parse_json({file.data() + kLengthBytes, length}, where + ": header");
  const auto* table = header.as<Json::Object>();
  TORCH_CHECK_VALUE(table, where, ": the header is ", header.kind(), ", expected an object");
  std::vector<TensorEntry> entries;
  for (const auto& [name, fields] : *table)
    if (name != "__metadata__") entries.push_back(parse_entry(name, fields, start, size - start, where));
  // By place; of two at one place the empty one comes first.
  std::sort(entries.begin(), entries.end(), [](const TensorEntry& a, const TensorEntry& b) {
    return std::pair(a.offset, a.bytes) < std::pair(b.offset, b.bytes);
  });
  check_cover(entries, start, size - start, where);
  return entries;
}

}  // namespace micro_files
