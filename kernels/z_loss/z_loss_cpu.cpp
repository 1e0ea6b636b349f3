#include <vector>

#include "common/cpu/tokens.h"
#include "micro_kernels/z_loss.h"

namespace micro_kernels::cpu {
namespace {

template <class T>
double layer_sum(const ZLossParams& p, int64_t layer) {
  double sum = 0;
  for (int64_t t = 0; t < p.tokens; ++t) {
    if (!is_real(p.mask, t)) continue;
    const double z = log_sum_exp(static_cast<const T*>(p.logits) + (layer * p.tokens + t) * p.experts, p.experts);
    sum += z * z;
  }
  return sum;
}

// d/dz[e] of lse^2 = 2 lse softmax(z)[e]
template <class T>
void backward_row(const ZLossBackwardParams& p, int64_t row, double scale) {
  const T* logits = static_cast<const T*>(p.logits) + row * p.experts;
  T* grad = static_cast<T*>(p.grad_logits) + row * p.experts;
  if (!is_real(p.mask, row % p.tokens)) {
    std::fill(grad, grad + p.experts, T(accumulator_t<T>(0)));
    return;
  }
  const double z = log_sum_exp(logits, p.experts);
  for (int64_t e = 0; e < p.experts; ++e)
    grad[e] = T(static_cast<accumulator_t<T>>(scale * 2 * z * std::exp(wide_value(logits[e]) - z)));
}

}  // namespace

Status z_loss(const ZLossParams& p, const ParallelFor& parallel_for) {
  dispatch(p.dtype, [&]<class T>() {
    std::vector<double> sums(p.layers);
    parallel_for(p.layers, 1, [&](int64_t begin, int64_t end) {
      for (int64_t layer = begin; layer < end; ++layer) sums[layer] = layer_sum<T>(p, layer);
    });
    double loss = 0;
    for (const double sum : sums) loss += sum;
    loss /= real_tokens(p.mask, p.tokens) * static_cast<double>(std::max<int64_t>(1, p.layers));
    *static_cast<accumulator_t<T>*>(p.loss) = static_cast<accumulator_t<T>>(loss);
  });
  return Status::kOk;
}

Status z_loss_backward(const ZLossBackwardParams& p, const ParallelFor& parallel_for) {
  dispatch(p.dtype, [&]<class T>() {
    const double grad_loss = static_cast<double>(*static_cast<const accumulator_t<T>*>(p.grad_loss));
    const double scale = grad_loss / (real_tokens(p.mask, p.tokens) * static_cast<double>(p.layers));
    parallel_for(p.layers, 1, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin * p.tokens; row < end * p.tokens; ++row) backward_row<T>(p, row, scale);
    });
  });
  return Status::kOk;
}

}  // namespace micro_kernels::cpu
