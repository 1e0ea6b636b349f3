#pragma once
// What expert_linear and stacked_linear share.

#include <ATen/Context.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/Tensor.h>

#include <deque>
#include <utility>
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

// Whether CUDA may round factors of float32 to TF32: torch's own flag (torch.backends.cuda.matmul).
inline bool tf32_allowed() {
  return at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL) ==
         at::Float32Precision::TF32;
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

// Products of one element type on the CPU, collected and worked off together. All tensors are matrices, contiguous, and
// must outlive run().
class LinearBatch {
 public:
  LinearBatch(const char* function, const at::Tensor& x) : function_(function), dtype_(kernel_dtype(function, x)) {}

  // y = x weight^T: [rows, in], [out, in], [rows, out].
  void product(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& y) {
    micro_kernels::LinearPart part;
    part.x = rows_of(x);
    part.matrix.data = weight.const_data_ptr();
    part.y = {y.mutable_data_ptr(), nullptr, y.size(1)};
    part.rows = x.size(0), part.in = x.size(1), part.out = weight.size(0);
    products_.push_back(part);
  }

  // grad_x = sum over the sources (grad_y, weight) of grad_y weight.
  void grad_x(const std::vector<std::pair<at::Tensor, at::Tensor>>& sources, const at::Tensor& grad_x) {
    std::vector<micro_kernels::LinearSource>& list = sources_.emplace_back();
    for (const auto& [grad_y, weight] : sources) list.push_back({rows_of(grad_y), weight.const_data_ptr()});
    grad_x_.push_back({list.data(),
                       static_cast<int64_t>(list.size()),
                       {grad_x.mutable_data_ptr(), nullptr, grad_x.size(1)},
                       grad_x.size(0),
                       grad_x.size(1),
                       sources.empty() ? 0 : sources.front().first.size(1)});
  }

  // grad_weight = grad_y^T x, or, where `grad_weight` is to be accumulated (in the accumulator type), added to it.
  void grad_weight(const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& grad_weight, bool accumulate) {
    grad_weight_.push_back({rows_of(grad_y), rows_of(x), grad_weight.mutable_data_ptr(), x.size(0), x.size(1),
                            grad_y.size(1), accumulate});
  }

  void run() {
    using namespace micro_kernels::cpu;
    const auto count = [](const auto& parts) { return static_cast<int64_t>(parts.size()); };
    check(function_, linear(products_.data(), count(products_), dtype_, parallel_for));
    check(function_, linear_grad_x(grad_x_.data(), count(grad_x_), dtype_, parallel_for));
    check(function_, linear_grad_weight(grad_weight_.data(), count(grad_weight_), dtype_, parallel_for));
  }

 private:
  static micro_kernels::ConstRows rows_of(const at::Tensor& t) { return {t.const_data_ptr(), nullptr, t.size(1)}; }

  const char* function_;
  micro_kernels::DType dtype_;
  std::vector<micro_kernels::LinearPart> products_;
  std::deque<std::vector<micro_kernels::LinearSource>> sources_;
  std::vector<micro_kernels::LinearGradXPart> grad_x_;
  std::vector<micro_kernels::LinearGradWeightPart> grad_weight_;
};

// As torch's own linear: both sides in the type of the autocast region.
inline at::Tensor lower_precision(const at::Tensor& tensor) {
  const c10::DeviceType device = tensor.device().type();
  return at::autocast::cached_cast(at::autocast::get_autocast_dtype(device), tensor, device);
}

}  // namespace micro
