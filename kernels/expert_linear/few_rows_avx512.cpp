#include "expert_linear/few_rows.h"

namespace micro_kernels::cpu {

FewRowsKernel few_rows_avx512(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return few_rows<Exact<double>>;
    case DType::kBFloat16:
      return few_rows<Exact<uint16_t>>;
    case DType::kFloat32:
      break;
  }
  return few_rows<Exact<float>>;
}

}  // namespace micro_kernels::cpu
