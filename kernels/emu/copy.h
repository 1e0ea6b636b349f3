#pragma once
// The emulator's side of common/cuda/arch/copy.cuh. The bytes arrive at the wait, never earlier.

#include "cuda_runtime.h"
#include "emu/machine.h"

namespace micro_kernels::cuda {

inline void copy_async16(void* to, const void* from, bool wanted = true, MICRO_EMU_SITE) {
  emu::copy_async(to, from, wanted, MICRO_EMU_HERE);
}
inline void copy_commit() { emu::copy_commit(); }
template <int Open>
void copy_wait(MICRO_EMU_SITE) {
  emu::copy_wait(Open, MICRO_EMU_HERE);
}

}  // namespace micro_kernels::cuda
