#pragma once
// What a caller got wrong and only the device can see: an index outside its range.

#ifdef MICRO_EMULATED
#include "emu/trap.h"
#else

namespace micro_kernels::cuda {

// Ends the launch, in every build, before a wrong index is used: nothing behind it could be believed. assert() is for
// what only a fault of ours can break: its call costs registers, and release builds leave it out.
__device__ __forceinline__ void require(bool holds) {
  if (!holds) asm volatile("trap;");
}

}  // namespace micro_kernels::cuda

#endif
