#include <cmath>

#include "common/cpu/blocks.h"
#include "gradient_norm/gradient_norm_loop.h"
#include "micro_kernels/gradient_norm.h"
#include "micro_kernels/isa.h"

namespace micro_kernels::cpu {

const SquareSums kSquareSumsPlain = kSums;

namespace {

const SquareSums& sums_for_this_cpu() {
#if defined(__x86_64__)
  if (isa() >= Isa::kAvx512) return kSquareSumsAvx512;
  if (isa() >= Isa::kAvx2) return kSquareSumsAvx2;
#endif
  return kSquareSumsPlain;
}

double block_sum(const GradientTensor& tensor, int64_t begin, int64_t size) {
  const SquareSums& sums = sums_for_this_cpu();
  switch (tensor.dtype) {
    case DType::kFloat64:
      return sums.float64(static_cast<const double*>(tensor.gradient) + begin, size);
    case DType::kBFloat16:
      return sums.bfloat16(static_cast<const uint16_t*>(tensor.gradient) + begin, size);
    case DType::kFloat16:  // on CUDA only: refused by callers
    case DType::kFloat32:
      break;
  }
  return sums.float32(static_cast<const float*>(tensor.gradient) + begin, size);
}

}  // namespace

Status gradient_norm(const GradientNormParams& p, const ParallelFor& parallel_for) {
  const std::vector<Block> blocks = blocks_of(p.tensors, p.count);
  std::vector<double> parts(blocks.size());
  parallel_for(static_cast<int64_t>(blocks.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      parts[b] = block_sum(p.tensors[blocks[b].tensor], blocks[b].begin, blocks[b].end - blocks[b].begin);
  });
  double total = 0;
  for (const double part : parts) total += part;
  *p.norm = std::sqrt(total);
  return Status::kOk;
}

}  // namespace micro_kernels::cpu
