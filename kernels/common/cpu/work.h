#pragma once
// Uneven work over the injected threads: whoever is free takes the next item (performance.md 9.18).

#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>

#include "micro_kernels/parallel.h"

namespace micro_kernels::cpu {

struct AlignedDelete {
  void operator()(char* memory) const { std::free(memory); }
};
using Scratch = std::unique_ptr<char, AlignedDelete>;

// Uninitialised memory, aligned for vectors.
inline Scratch allocate_scratch(int64_t bytes) {
  const int64_t size = (bytes + 63) / 64 * 64 + 64;
  Scratch memory(static_cast<char*>(std::aligned_alloc(64, static_cast<size_t>(size))));
  if (!memory) throw std::bad_alloc();
  return memory;
}

// Scratch that the calling thread keeps from one call to the next: it only ever grows, so that work of a steady size
// allocates nothing. One piece per thread: who holds it must not ask for another.
inline char* thread_scratch(int64_t bytes) {
  thread_local Scratch memory;
  thread_local int64_t size = -1;
  if (bytes > size) {
    size = -1;
    memory.reset();
    memory = allocate_scratch(bytes);
    size = bytes;
  }
  return memory.get();
}

// Calls body(item, scratch) once for each item in [0, count), in this order where there is one thread. The body must
// not call for_each_item itself.
template <class Body>
void for_each_item(const ParallelFor& parallel_for, int64_t count, int64_t scratch_bytes, const Body& body) {
  if (count == 0) return;
  std::atomic<int64_t> next{0};
  parallel_for(count, 1, [&](int64_t, int64_t) {
    int64_t item = next.fetch_add(1, std::memory_order_relaxed);
    if (item >= count) return;
    char* const scratch = thread_scratch(scratch_bytes);
    for (; item < count; item = next.fetch_add(1, std::memory_order_relaxed)) body(item, scratch);
  });
}

}  // namespace micro_kernels::cpu
