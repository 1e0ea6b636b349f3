#include "sample/sample_loop.h"

namespace micro_kernels::cpu {

const SampleLoops kSampleAvx512 = kLoops;

}  // namespace micro_kernels::cpu
