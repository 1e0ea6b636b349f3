#include "rms_norm/rms_norm_loop.h"

namespace micro_kernels::cpu {

const RmsNormLoops kRmsNormAvx512 = kLoops;

}  // namespace micro_kernels::cpu
