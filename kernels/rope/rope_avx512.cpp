#include "rope/rope_loop.h"

namespace micro_kernels::cpu {

const RopeLoops kRopeAvx512 = kLoops;

}  // namespace micro_kernels::cpu
