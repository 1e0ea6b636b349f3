#include "rope/rope_loop.h"

namespace micro_kernels::cpu {

const RopeLoops kRopeAvx2 = kLoops;

}  // namespace micro_kernels::cpu
