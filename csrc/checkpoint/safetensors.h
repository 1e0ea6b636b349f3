#pragma once
// One safetensors file: a header of names, types, shapes and places, then the data without gaps.

#include <c10/core/ScalarType.h>

#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace micro_files {

struct TensorEntry {
  std::string name;
  c10::ScalarType dtype;
  std::vector<int64_t> shape;
  int64_t offset;  // of the first byte, from the start of the file; a multiple of the element size
  int64_t bytes;
};

// The tensors of a file, in the order of their data. `file` is the whole of it; nothing behind the header is read.
// Throws ValueError that names the file (`where`), the tensor and what was expected, where the file is cut short or too
// long, where data overlap or leave gaps, and where sizes do not fit shapes and types.
std::vector<TensorEntry> read_safetensors_header(std::span<const char> file, const std::string& where);

}  // namespace micro_files
