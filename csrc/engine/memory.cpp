#include "engine/memory.h"

#include <c10/util/Exception.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <vector>

namespace micro::engine {

int64_t page_bytes() {
  static const int64_t bytes = sysconf(_SC_PAGESIZE);
  return bytes;
}

Mapping::Mapping(int64_t bytes, Pages pages) : bytes_(round_up(std::max<int64_t>(bytes, 1), page_bytes())) {
  void* memory = mmap(nullptr, static_cast<size_t>(bytes_), PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  TORCH_CHECK(memory != MAP_FAILED, "Engine: the system refuses to reserve ", bytes_ >> 20,
              " MB of address space: ", std::strerror(errno), "; use fewer rows or a smaller max_length");
  data_ = static_cast<char*>(memory);
  // A hint: systems without large pages refuse it and nothing is lost.
  madvise(memory, static_cast<size_t>(bytes_), pages == Pages::kHuge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
}

Mapping::~Mapping() {
  if (data_) munmap(data_, static_cast<size_t>(bytes_));
}

void Mapping::discard(int64_t begin, int64_t end) const {
  const int64_t page = page_bytes(), first = round_up(begin, page), last = end / page * page;
  if (first < last) madvise(data_ + first, static_cast<size_t>(last - first), MADV_DONTNEED);
}

int64_t Mapping::resident_bytes() const {
  constexpr int64_t kPagesAtOnce = 1 << 16;
  std::vector<unsigned char> there(kPagesAtOnce);
  int64_t pages = 0;
  for (int64_t at = 0; at < bytes_; at += kPagesAtOnce * page_bytes()) {
    const int64_t size = std::min(bytes_ - at, kPagesAtOnce * page_bytes());
    if (mincore(data_ + at, static_cast<size_t>(size), there.data()) != 0) continue;
    pages += std::count_if(there.begin(), there.begin() + size / page_bytes(), [](unsigned char p) { return p & 1; });
  }
  return pages * page_bytes();
}

void let_go(const void* data, int64_t bytes) {
  const auto begin = reinterpret_cast<uintptr_t>(data), page = static_cast<uintptr_t>(page_bytes());
  const uintptr_t first = begin / page * page, last = begin + static_cast<uintptr_t>(bytes);
  madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED);
}

}  // namespace micro::engine
