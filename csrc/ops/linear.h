#pragma once
// What expert_linear and stacked_linear share on the CPU.

#include <ATen/autocast_mode.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/mm.h>

#include <vector>

#include "micro_kernels/expert_linear.h"
#include "ops/common.h"

namespace micro {

inline void check_offsets(const char* function, const at::Tensor& offsets, const c10::SymInt& experts,
                          const at::Tensor& x) {
  TORCH_CHECK_TYPE(offsets.scalar_type() == at::kInt, function, ": offsets must be int32, got ", offsets.scalar_type());
  TORCH_CHECK_VALUE(offsets.dim() == 1 && same(offsets.sym_size(0), experts + 1), function, ": offsets must be [",
                    experts + 1, "] (one more than experts), got ", offsets.sym_sizes());
  TORCH_CHECK_VALUE(offsets.device() == x.device(), function, ": offsets is on ", offsets.device(), " but x is on ",
                    x.device());
}

inline void check_weight(const char* function, const at::Tensor& weight, const at::Tensor& x) {
  TORCH_CHECK_VALUE(weight.dim() == 3 && same(weight.sym_size(2), x.sym_size(-1)), function,
                    ": weight must be [E, out, ", x.sym_size(-1), "], got ", weight.sym_sizes());
  TORCH_CHECK_TYPE(weight.scalar_type() == x.scalar_type(), function, ": weight is ", weight.scalar_type(),
                   " but x is ", x.scalar_type());
  TORCH_CHECK_VALUE(weight.device() == x.device(), function, ": weight is on ", weight.device(), " but x is on ",
                    x.device());
}

// The first row of each expert and, last, of the idle rows. `rows` is the number of rows, or -1 where it is not known.
inline std::vector<int64_t> expert_bounds(const char* function, const at::Tensor& offsets_, int64_t rows) {
  const at::Tensor offsets = offsets_.contiguous();
  const int32_t* first = offsets.const_data_ptr<int32_t>();
  const std::vector<int64_t> bounds(first, first + offsets.numel());
  bool ascending = bounds.front() == 0 && (rows < 0 || bounds.back() <= rows);
  for (size_t e = 1; e < bounds.size(); ++e) ascending = ascending && bounds[e - 1] <= bounds[e];
  TORCH_CHECK_VALUE(ascending, function, ": offsets must ascend from 0 to at most the number of rows, ", rows, ", got ",
                    bounds);
  return bounds;
}

// y = x weight^T for one matrix: few rows are collected for one pass of the kernel, many go to BLAS at once.
class LinearBatch {
 public:
  LinearBatch(const char* function, const at::Tensor& x, const at::Tensor& weight)
      : function_(function), in_(weight.size(-1)), out_(weight.size(-2)), dtype_(kernel_dtype(function, x)) {}

  // All three contiguous: [rows, in], [out, in], [rows, out].
  void add(const at::Tensor& x, const at::Tensor& weight, at::Tensor y) {
    if (x.size(0) > micro_kernels::cpu::kFewRows) {
      at::mm_out(y, x, weight.t());
    } else if (x.size(0) > 0) {
      parts_.push_back({x.const_data_ptr(), weight.const_data_ptr(), y.mutable_data_ptr(), x.size(0)});
    }
  }

  void run() {
    check(function_, micro_kernels::cpu::few_rows_linear(parts_.data(), static_cast<int64_t>(parts_.size()), in_, out_,
                                                         dtype_, parallel_for));
  }

 private:
  const char* function_;
  int64_t in_, out_;
  micro_kernels::DType dtype_;
  std::vector<micro_kernels::LinearRows> parts_;
};

// As torch's own linear: both sides in the type of the autocast region.
inline at::Tensor lower_precision(const at::Tensor& tensor) {
  const c10::DeviceType device = tensor.device().type();
  return at::autocast::cached_cast(at::autocast::get_autocast_dtype(device), tensor, device);
}

}  // namespace micro
