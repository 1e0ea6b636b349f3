#pragma once
// Memory straight from the system: pages cost nothing before they are touched, and can be given back one by one.

#include <cstddef>
#include <cstdint>
#include <utility>

namespace micro::engine {

int64_t page_bytes();

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

enum class Pages {
  kHuge,   // large pages are welcome: read as a whole, again and again
  kSmall,  // touched here and there: a large page would cost two megabytes for one row
};

// An anonymous, private mapping, zero at first. Throws RuntimeError that says how much was asked for.
class Mapping {
 public:
  Mapping() = default;
  Mapping(int64_t bytes, Pages pages);
  Mapping(Mapping&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
  Mapping& operator=(Mapping&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~Mapping();

  char* data() const { return data_; }
  int64_t bytes() const { return bytes_; }

  // Gives the pages that lie wholly inside [begin, end) back; they read as zero afterwards.
  void discard(int64_t begin, int64_t end) const;

  int64_t resident_bytes() const;  // pages in memory

 private:
  char* data_ = nullptr;
  int64_t bytes_ = 0;
};

// Pages of a file that is mapped for reading leave this process; reading them again brings them back.
void let_go(const void* data, int64_t bytes);

}  // namespace micro::engine
