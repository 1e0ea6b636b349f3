#pragma once
// Memory that an op needs for the time of a call.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace micro {

// New memory costs a fault per page; gradients of whole matrices are new in every step. Only advice; what is smaller
// than a large page is left alone.
inline void prefer_large_pages(void* memory, size_t bytes) {
#if defined(__linux__)
  constexpr size_t kLargePage = size_t{2} << 20;
  const auto first = (reinterpret_cast<uintptr_t>(memory) + kLargePage - 1) / kLargePage * kLargePage;
  const auto last = (reinterpret_cast<uintptr_t>(memory) + bytes) / kLargePage * kLargePage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  static_cast<void>(memory), static_cast<void>(bytes);
#endif
}

// Working memory of a CUDA launch, beside `tensor`: torch's allocator hands it on only to later work of the same
// stream. Kept alive by the caller until the launch has been made.
inline at::Tensor device_workspace(const at::Tensor& tensor, int64_t bytes) {
  return at::empty({bytes}, tensor.options().dtype(at::kByte));
}

// Working memory of one call on the CPU. The next layer, or a decoded token, comes back for as much, so some is kept
// per thread.
class Workspace {
 public:
  explicit Workspace(int64_t bytes) {
    Kept& kept = of_thread();
    if (bytes > kMostKept) {
      own_ = allocate(bytes);
    } else if (bytes > kept.size) {
      kept.memory.reset();
      kept.size = 0;
      kept.memory = allocate(bytes);
      kept.size = bytes;
    }
    data_ = own_ ? own_.get() : kept.memory.get();
  }
  char* data() const { return data_; }

 private:
  struct Free {
    void operator()(char* memory) const { std::free(memory); }
  };
  using Memory = std::unique_ptr<char, Free>;
  struct Kept {
    Memory memory;
    int64_t size = 0;
  };
  static constexpr int64_t kMostKept = 64 << 20;

  static Kept& of_thread() {
    static thread_local Kept kept;
    return kept;
  }

  static Memory allocate(int64_t bytes) {
    Memory memory(static_cast<char*>(std::aligned_alloc(64, static_cast<size_t>((bytes + 63) / 64 * 64 + 64))));
    if (!memory) throw std::bad_alloc();
    prefer_large_pages(memory.get(), static_cast<size_t>(bytes));
    return memory;
  }

  Memory own_;
  char* data_ = nullptr;
};

}  // namespace micro
