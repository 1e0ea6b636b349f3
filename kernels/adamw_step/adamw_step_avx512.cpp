#include "adamw_step/adamw_step_loop.h"

namespace micro_kernels::cpu {

const AdamWLoops kAdamWAvx512 = kLoops;

}  // namespace micro_kernels::cpu
