#include "combine/combine_loop.h"

namespace micro_kernels::cpu {

const CombineLoops kCombineAvx2 = kLoops;

}  // namespace micro_kernels::cpu
