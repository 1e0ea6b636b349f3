#include "expert_attention/attention_kernels.h"

namespace micro_kernels::cpu {

const AttentionKernels& attention_kernels_avx512(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return kKernels<Exact<double>>;
    case DType::kBFloat16:
      return kKernels<Exact<uint16_t>>;
    case DType::kFloat16:  // on CUDA only: refused by callers
    case DType::kFloat32:
      break;
  }
  return kKernels<Exact<float>>;
}

}  // namespace micro_kernels::cpu
