#pragma once
// The code of one instruction set and element type. Included by the per-ISA files only.

#include "expert_linear/linear_forward.h"
#include "expert_linear/linear_gradients.h"

namespace micro_kernels::cpu {
namespace {

template <class Mode>
int64_t panel_scratch() {
  return PanelScratch<Mode>(nullptr).bytes;
}

template <class Mode>
constexpr LinearKernels kLinear{panel_scratch<Mode>, forward_panel<Mode>, grad_x_group<Mode>, grad_weight_group<Mode>};

}  // namespace
}  // namespace micro_kernels::cpu
