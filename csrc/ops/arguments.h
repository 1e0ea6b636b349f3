#pragma once
// Checks of tensor arguments: function, argument, what was expected, what came. Sizes stay symbolic under tracing.

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>

#include "ops/common.h"

namespace micro {

// Where an argument stands: "micro::plan: mask".
struct Argument {
  const char* function;
  const char* name;
  const at::Tensor& tensor;

  void is(at::ScalarType type) const {
    TORCH_CHECK_TYPE(tensor.scalar_type() == type, function, ": ", name, " must be ", type, ", got ",
                     tensor.scalar_type());
  }
  void is_floating() const {
    TORCH_CHECK_TYPE(at::isFloatingType(tensor.scalar_type()), function, ": ", name,
                     " must be a floating-point tensor, got ", tensor.scalar_type());
  }
  void has_dims(int64_t dims, const char* shape) const {
    TORCH_CHECK_VALUE(tensor.dim() == dims, function, ": ", name, " must be ", shape, ", got ", tensor.sym_sizes());
  }
  void has_sizes(c10::SymIntArrayRef sizes) const {
    TORCH_CHECK_VALUE(same(tensor.sym_sizes(), sizes), function, ": ", name, " must be ", sizes, ", got ",
                      tensor.sym_sizes());
  }
  void is_offsets() const {
    has_dims(1, "[E + 1]");
    TORCH_CHECK_VALUE(tensor.sym_size(0).sym_ge(2).expect_true(__FILE__, __LINE__), function, ": ", name,
                      " must be [E + 1] for at least one expert, got ", tensor.sym_sizes());
  }
  void is_beside(const char* other_name, const at::Tensor& other) const {
    TORCH_CHECK_VALUE(tensor.device() == other.device(), function, ": ", name, " is on ", tensor.device(), " but ",
                      other_name, " is on ", other.device());
  }
};

// Whether a call must be recorded: a gradient is wanted, or a forward-mode tangent would be lost (recording refuses
// it).
template <class... Tensors>
bool must_record(const Tensors&... tensors) {
  const auto traced = [](const at::Tensor& t) {
    return t.defined() && ((at::GradMode::is_enabled() && t.requires_grad()) || t._fw_grad(0).defined());
  };
  return (traced(tensors) || ...);
}

}  // namespace micro
