#include "expert_linear/linear_panels.h"

namespace micro_kernels::cpu {

const LinearKernels& linear_kernels_plain(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return kLinear<Exact<double>>;
    case DType::kBFloat16:
      return kLinear<Exact<uint16_t>>;
    case DType::kFloat16:  // on CUDA only: refused by callers
    case DType::kFloat32:
      break;
  }
  return kLinear<Exact<float>>;
}

}  // namespace micro_kernels::cpu
