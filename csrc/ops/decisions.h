#pragma once
// Checks and pointers shared by the losses over routing decisions of L layers and T tokens.

#include "ops/common.h"

namespace micro {

// rows: [L, T, E]; wide_only: probabilities are float32 or float64 (micro::route gives nothing else).
inline void check_decisions(const char* function, const char* argument, const at::Tensor& rows, bool wide_only) {
  TORCH_CHECK_VALUE(rows.dim() == 3, function, ": ", argument, " must be [L, T, E], got ", rows.sym_sizes());
  const at::ScalarType type = rows.scalar_type();
  const bool fits = wide_only ? type == at::kFloat || type == at::kDouble : try_kernel_dtype(rows).has_value();
  TORCH_CHECK_TYPE(fits, function, ": ", argument, " must be ", wide_only ? "float32 or float64" : kKernelTypes,
                   ", got ", type);
}

// mask: absent or bool [T], true for a real token.
inline void check_mask(const char* function, const OptionalTensor& mask, const at::Tensor& rows) {
  if (!mask) return;
  TORCH_CHECK_TYPE(mask->scalar_type() == at::kBool, function, ": mask must be bool, got ", mask->scalar_type());
  TORCH_CHECK_VALUE(mask->dim() == 1 && same(mask->sym_size(0), rows.sym_size(-2)), function, ": mask must be [",
                    rows.sym_size(-2), "], got ", mask->sym_sizes());
  TORCH_CHECK_VALUE(mask->device() == rows.device(), function, ": mask is on ", mask->device(), " but the rows are on ",
                    rows.device());
}

inline const bool* mask_pointer(const OptionalTensor& mask) { return mask ? mask->const_data_ptr<bool>() : nullptr; }

inline OptionalTensor optional(const at::Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

}  // namespace micro
