#pragma once
// Copies from global to shared memory that run beside the arithmetic (cp.async, sm_80 on).

#ifdef MICRO_EMULATED
#include "emu/copy.h"
#else

#include <cstdint>

namespace micro_kernels::cuda {

// 16 bytes, both addresses aligned to 16. wanted == false: 16 zero bytes instead, `from` is not read.
// What was copied may be read by its own thread after copy_wait, by others after copy_wait and a barrier.
__device__ __forceinline__ void copy_async16(void* to, const void* from, bool wanted = true) {
  const auto target = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  const int bytes = wanted ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(from), "r"(bytes) : "memory");
}

// Closes a group of copies.
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `Open` groups of this thread are still under way.
template <int Open>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Open) : "memory");
}

}  // namespace micro_kernels::cuda

#endif
