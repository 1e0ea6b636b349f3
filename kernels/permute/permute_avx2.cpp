#include "permute/permute_loop.h"

namespace micro_kernels::cpu {

const PermuteLoops kPermuteAvx2 = kLoops;

}  // namespace micro_kernels::cpu
