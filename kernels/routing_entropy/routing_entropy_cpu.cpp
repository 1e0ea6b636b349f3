#include "common/cpu/tokens.h"
#include "micro_kernels/routing_entropy.h"

namespace micro_kernels::cpu {
namespace {

template <class T>
double layer_mean(const RoutingEntropyParams& p, int64_t layer) {
  double sum = 0;
  for (int64_t t = 0; t < p.tokens; ++t) {
    if (!is_real(p.mask, t)) continue;
    const T* probs = static_cast<const T*>(p.probs) + (layer * p.tokens + t) * p.experts;
    for (int64_t e = 0; e < p.experts; ++e) {
      const double value = wide_value(probs[e]);
      sum -= value == 0 ? 0.0 : value * std::log(value);
    }
  }
  return sum / real_tokens(p.mask, p.tokens);
}

template <class T>
void backward_row(const RoutingEntropyBackwardParams& p, int64_t row, double scale) {
  const T* probs = static_cast<const T*>(p.probs) + row * p.experts;
  T* grad = static_cast<T*>(p.grad_probs) + row * p.experts;
  const bool real = is_real(p.mask, row % p.tokens);
  for (int64_t e = 0; e < p.experts; ++e) {
    const double value = wide_value(probs[e]);
    const double slope = real && value != 0 ? -scale * (std::log(value) + 1) : 0.0;
    grad[e] = T(static_cast<accumulator_t<T>>(slope));
  }
}

}  // namespace

Status routing_entropy(const RoutingEntropyParams& p, const ParallelFor& parallel_for) {
  dispatch(p.dtype, [&]<class T>() {
    using Acc = accumulator_t<T>;
    parallel_for(p.layers, 1, [&](int64_t begin, int64_t end) {
      for (int64_t layer = begin; layer < end; ++layer)
        static_cast<Acc*>(p.entropy)[layer] = static_cast<Acc>(layer_mean<T>(p, layer));
    });
  });
  return Status::kOk;
}

Status routing_entropy_backward(const RoutingEntropyBackwardParams& p, const ParallelFor& parallel_for) {
  dispatch(p.dtype, [&]<class T>() {
    const auto* grad_entropy = static_cast<const accumulator_t<T>*>(p.grad_entropy);
    const double count = real_tokens(p.mask, p.tokens);
    parallel_for(p.layers, 1, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin * p.tokens; row < end * p.tokens; ++row)
        backward_row<T>(p, row, static_cast<double>(grad_entropy[row / p.tokens]) / count);
    });
  });
  return Status::kOk;
}

}  // namespace micro_kernels::cpu
