#include <vector>

#include "common/cpu/tokens.h"
#include "micro_kernels/label_loss.h"

namespace micro_kernels::cpu {
namespace {

constexpr double kSmallestWeight = 1e-30;  // all layer weights 0: the loss is 0, not 0/0

template <class Params>
bool is_kept(const Params& p, int64_t token) {
  return p.labels[token] >= 0 && is_real(p.mask, token);
}

template <class Params>
bool labels_in_range(const Params& p) {
  return std::all_of(p.labels, p.labels + p.tokens, [&p](int64_t label) { return label < p.experts; });
}

// c[l] / sum c
template <class Acc, class Params>
std::vector<double> layer_shares(const Params& p) {
  std::vector<double> shares(p.layers, 1.0);
  if (const Acc* weights = static_cast<const Acc*>(p.layer_weights)) shares.assign(weights, weights + p.layers);
  double sum = 0;
  for (const double share : shares) sum += share;
  for (double& share : shares) share /= std::max(sum, kSmallestWeight);
  return shares;
}

template <class T>
double layer_sum(const LabelLossParams& p, int64_t layer) {
  double sum = 0;
  for (int64_t t = 0; t < p.tokens; ++t) {
    if (!is_kept(p, t)) continue;
    const T* z = static_cast<const T*>(p.logits) + (layer * p.tokens + t) * p.experts;
    sum += log_sum_exp(z, p.experts) - wide_value(z[p.labels[t]]);
  }
  return sum;
}

template <class T>
void backward_row(const LabelLossBackwardParams& p, int64_t row, double scale) {
  const int64_t token = row % p.tokens;
  const T* z = static_cast<const T*>(p.logits) + row * p.experts;
  T* grad = static_cast<T*>(p.grad_logits) + row * p.experts;
  if (!is_kept(p, token)) {
    std::fill(grad, grad + p.experts, T(accumulator_t<T>(0)));
    return;
  }
  const double total = log_sum_exp(z, p.experts);
  for (int64_t e = 0; e < p.experts; ++e) {
    const double wanted = e == p.labels[token] ? 1.0 : 0.0;
    grad[e] = T(static_cast<accumulator_t<T>>(scale * (std::exp(wide_value(z[e]) - total) - wanted)));
  }
}

}  // namespace

Status label_loss(const LabelLossParams& p, const ParallelFor& parallel_for) {
  if (!labels_in_range(p)) return Status::kIndexOutOfRange;
  dispatch(p.dtype, [&]<class T>() {
    using Acc = accumulator_t<T>;
    const std::vector<double> shares = layer_shares<Acc>(p);
    std::vector<double> sums(p.layers);
    parallel_for(p.layers, 1, [&](int64_t begin, int64_t end) {
      for (int64_t layer = begin; layer < end; ++layer)
        sums[layer] = shares[layer] == 0 ? 0.0 : shares[layer] * layer_sum<T>(p, layer);
    });
    double loss = 0;
    for (const double sum : sums) loss += sum;
    *static_cast<Acc*>(p.loss) = static_cast<Acc>(loss);
  });
  return Status::kOk;
}

Status label_loss_backward(const LabelLossBackwardParams& p, const ParallelFor& parallel_for) {
  if (!labels_in_range(p)) return Status::kIndexOutOfRange;
  dispatch(p.dtype, [&]<class T>() {
    using Acc = accumulator_t<T>;
    const std::vector<double> shares = layer_shares<Acc>(p);
    const double grad_loss = static_cast<double>(*static_cast<const Acc*>(p.grad_loss));
    parallel_for(p.layers, 1, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin * p.tokens; row < end * p.tokens; ++row)
        backward_row<T>(p, row, grad_loss * shares[row / p.tokens]);
    });
  });
  return Status::kOk;
}

}  // namespace micro_kernels::cpu
