#pragma once
// Works the scalars of a step out, once and in double. Apart from their struct: the loops of the instruction sets
// include nothing of the standard library.

#include <cmath>

#include "adamw_step/adamw_factors.h"
#include "micro_kernels/adamw_step.h"

namespace micro_kernels {

template <class Acc>
AdamWFactors<Acc> adamw_factors(const AdamWStepParams& p) {
  const double step = static_cast<double>(p.step);
  const double correction1 = 1 - std::pow(p.beta1, step), correction2 = 1 - std::pow(p.beta2, step);
  return {
      .gradient_scale = static_cast<Acc>(p.gradient_scale),
      .beta1 = static_cast<Acc>(p.beta1),
      .other1 = static_cast<Acc>(1 - p.beta1),
      .beta2 = static_cast<Acc>(p.beta2),
      .other2 = static_cast<Acc>(1 - p.beta2),
      .decay = static_cast<Acc>(1 - p.learning_rate * p.weight_decay),
      .step_size = static_cast<Acc>(p.learning_rate / correction1),
      .inverse_root = static_cast<Acc>(1 / std::sqrt(correction2)),
      .eps = static_cast<Acc>(p.eps),
  };
}

}  // namespace micro_kernels
