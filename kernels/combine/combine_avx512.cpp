#include "combine/combine_loop.h"

namespace micro_kernels::cpu {

const CombineLoops kCombineAvx512 = kLoops;

}  // namespace micro_kernels::cpu
