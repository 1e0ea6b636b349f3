#pragma once
// The code of one instruction set and storage mode. Included by the per-ISA files only.

#include "expert_attention/attention_backward.h"
#include "expert_attention/attention_forward.h"

namespace micro_kernels::cpu {
namespace {

template <class Mode>
constexpr AttentionKernels kKernels{forward_scratch<Mode>, forward_item<Mode>, backward_scratch<Mode>,
                                    backward_item<Mode>};

}  // namespace
}  // namespace micro_kernels::cpu
