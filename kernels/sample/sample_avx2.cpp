#include "sample/sample_loop.h"

namespace micro_kernels::cpu {

const SampleLoops kSampleAvx2 = kLoops;

}  // namespace micro_kernels::cpu
