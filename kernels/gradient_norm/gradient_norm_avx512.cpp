#include "gradient_norm/gradient_norm_loop.h"

namespace micro_kernels::cpu {

const SquareSums kSquareSumsAvx512 = kSums;

}  // namespace micro_kernels::cpu
