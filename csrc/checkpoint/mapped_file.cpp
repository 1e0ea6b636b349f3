#include "checkpoint/mapped_file.h"

#include <c10/util/Exception.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>

namespace micro_files {
namespace {

// The descriptor is needed only until the mapping stands.
struct Descriptor {
  int number;
  ~Descriptor() {
    if (number >= 0) ::close(number);
  }
};

}  // namespace

MappedFile::MappedFile(const std::string& path) {
  const auto check = [&path](bool done) {
    TORCH_CHECK_VALUE(done, path, ": cannot be read (", std::generic_category().message(errno), ")");
  };
  const Descriptor file{::open(path.c_str(), O_RDONLY | O_CLOEXEC)};
  check(file.number >= 0);
  struct stat status = {};
  check(::fstat(file.number, &status) == 0);
  TORCH_CHECK_VALUE(S_ISREG(status.st_mode), path, ": is no plain file");
  const auto size = static_cast<size_t>(status.st_size);
  if (size == 0) return;  // nothing to map, and a map of nothing is an error
  void* data = ::mmap(nullptr, size, PROT_READ, MAP_PRIVATE, file.number, 0);
  check(data != MAP_FAILED);
  content_ = {static_cast<const char*>(data), size};
}

MappedFile::~MappedFile() {
  if (!content_.empty()) ::munmap(const_cast<char*>(content_.data()), content_.size());
}

}  // namespace micro_files
