#pragma once
// The scalars of a step of AdamW, as the loops of every device use them.

namespace micro_kernels {

template <class Acc>
struct AdamWFactors {
  Acc gradient_scale, beta1, other1, beta2, other2, decay, step_size, inverse_root, eps;
};

}  // namespace micro_kernels
