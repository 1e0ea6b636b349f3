#pragma once
// The emulator's side of common/cuda/arch/trap.cuh.

#include "cuda_runtime.h"
#include "emu/machine.h"

namespace micro_kernels::cuda {

inline void require(bool holds, MICRO_EMU_SITE) {
  if (!holds) emu::fault(MICRO_EMU_HERE, "device assertion failed");
}

}  // namespace micro_kernels::cuda
