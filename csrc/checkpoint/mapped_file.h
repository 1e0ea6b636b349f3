#pragma once

#include <span>
#include <string>

namespace micro_files {

// A file in memory, read when it is touched; not to be written to.
class MappedFile {
 public:
  explicit MappedFile(const std::string& path);  // ValueError with the system's words where it cannot be read
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  std::span<const char> content() const { return content_; }

 private:
  std::span<const char> content_;
};

}  // namespace micro_files
