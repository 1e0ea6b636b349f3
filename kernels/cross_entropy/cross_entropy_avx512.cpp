#include "cross_entropy/cross_entropy_row.h"

namespace micro_kernels::cpu {

const CrossEntropyRows kCrossEntropyAvx512 = kRows;

}  // namespace micro_kernels::cpu
