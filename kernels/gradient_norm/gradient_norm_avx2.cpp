#include "gradient_norm/gradient_norm_loop.h"

namespace micro_kernels::cpu {

const SquareSums kSquareSumsAvx2 = kSums;

}  // namespace micro_kernels::cpu
