#pragma once
// Between the work list (linear_cpu.cpp) and the code of one instruction set (linear_*.cpp).

#include "micro_kernels/expert_linear.h"

namespace micro_kernels::cpu {

constexpr int64_t kPanel = 64;          // columns of the product that one item owns: four vectors of 16 floats
constexpr int64_t kRowBlock = 384;      // rows whose sums lie in scratch memory at a time: 96 KiB, well inside L2
constexpr int64_t kOutputBlock = 96;    // the same for gradients of weights, whose rows are outputs ...
constexpr int64_t kGradientPanels = 3;  // ... and which take this many panels of columns to an item

// One panel at a time, in scratch memory of the size asked for, aligned to 64 bytes.
struct LinearKernels {
  int64_t (*scratch)();
  // `then` is the part whose panels come next, or nullptr: its first weights are fetched while the last panel runs.
  void (*forward)(const LinearPart&, int64_t panel, const LinearPart* then, char* scratch);
  void (*grad_x)(const LinearGradXPart&, int64_t group, char* scratch);
  void (*grad_weight)(const LinearGradWeightPart&, int64_t group, char* scratch);
};

const LinearKernels& linear_kernels_plain(DType);
const LinearKernels& linear_kernels_avx2(DType);
const LinearKernels& linear_kernels_avx512(DType);
const LinearKernels& linear_kernels_avx512_bf16(DType);

}  // namespace micro_kernels::cpu
