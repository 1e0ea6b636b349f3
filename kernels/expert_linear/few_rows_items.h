#pragma once
// Between the work list (few_rows_cpu.cpp) and the code of one instruction set (few_rows_*.cpp).

#include "micro_kernels/expert_linear.h"

namespace micro_kernels::cpu {

// Output columns [begin, end) of all rows of `part`.
using FewRowsKernel = void (*)(const LinearRows& part, int64_t in, int64_t out, int64_t begin, int64_t end);

FewRowsKernel few_rows_plain(DType);
FewRowsKernel few_rows_avx2(DType);
FewRowsKernel few_rows_avx512(DType);
FewRowsKernel few_rows_avx512_bf16(DType);

}  // namespace micro_kernels::cpu
