#include "swiglu/swiglu_loop.h"

namespace micro_kernels::cpu {

const SwigluLoops kSwigluAvx512 = kLoops;

}  // namespace micro_kernels::cpu
