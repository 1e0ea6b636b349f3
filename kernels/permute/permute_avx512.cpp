#include "permute/permute_loop.h"

namespace micro_kernels::cpu {

const PermuteLoops kPermuteAvx512 = kLoops;

}  // namespace micro_kernels::cpu
