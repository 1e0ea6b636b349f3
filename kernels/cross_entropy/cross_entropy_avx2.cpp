#include "cross_entropy/cross_entropy_row.h"

namespace micro_kernels::cpu {

const CrossEntropyRows kCrossEntropyAvx2 = kRows;

}  // namespace micro_kernels::cpu
