#include "swiglu/swiglu_loop.h"

namespace micro_kernels::cpu {

const SwigluLoops kSwigluAvx2 = kLoops;

}  // namespace micro_kernels::cpu
