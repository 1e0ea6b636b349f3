#include <vector>

#include "common/cpu/tokens.h"
#include "micro_kernels/load_balancing_loss.h"

namespace micro_kernels::cpu {
namespace {

struct LayerMeans {
  std::vector<double> chosen;       // [layers, experts]: f summed over choices
  std::vector<double> probability;  // [layers, experts]: P

  explicit LayerMeans(int64_t size) : chosen(size, 0.0), probability(size, 0.0) {}
};

// One layer, its tokens in order: the sums do not depend on the number of threads.
template <class T>
void sum_layer(const LoadBalancingLossParams& p, int64_t layer, LayerMeans& means) {
  const T* probs = static_cast<const T*>(p.probs) + layer * p.tokens * p.experts;
  const int32_t* ids = p.ids + layer * p.tokens * p.choices;
  double* chosen = means.chosen.data() + layer * p.experts;
  double* probability = means.probability.data() + layer * p.experts;
  for (int64_t t = 0; t < p.tokens; ++t) {
    if (!is_real(p.mask, t)) continue;
    for (int64_t k = 0; k < p.choices; ++k) chosen[ids[t * p.choices + k]] += 1;
    for (int64_t e = 0; e < p.experts; ++e) probability[e] += wide_value(probs[t * p.experts + e]);
  }
  const double count = real_tokens(p.mask, p.tokens);
  for (int64_t e = 0; e < p.experts; ++e) chosen[e] /= count, probability[e] /= count;
}

void average_over_layers(std::vector<double>& values, int64_t layers, int64_t experts) {
  for (int64_t e = 0; e < experts; ++e) {
    double sum = 0;
    for (int64_t l = 0; l < layers; ++l) sum += values[l * experts + e];
    for (int64_t l = 0; l < layers; ++l) values[l * experts + e] = sum / static_cast<double>(layers);
  }
}

}  // namespace

Status load_balancing_loss(const LoadBalancingLossParams& p, const ParallelFor& parallel_for) {
  const bool in_range = std::all_of(p.ids, p.ids + p.layers * p.tokens * p.choices,
                                    [&p](int32_t id) { return id >= 0 && id < p.experts; });
  if (!in_range) return Status::kIndexOutOfRange;
  dispatch(p.dtype, [&]<class T>() {
    LayerMeans means(p.layers * p.experts);
    parallel_for(p.layers, 1, [&](int64_t begin, int64_t end) {
      for (int64_t layer = begin; layer < end; ++layer) sum_layer<T>(p, layer, means);
    });
    // With both means pooled over layers, the sum below is L times the pooled product: the division is the same.
    if (p.pooled) {
      average_over_layers(means.chosen, p.layers, p.experts);
      average_over_layers(means.probability, p.layers, p.experts);
    }
    const double scale = static_cast<double>(p.experts) / static_cast<double>(std::max<int64_t>(1, p.layers));
    double loss = 0;
    for (int64_t i = 0; i < p.layers * p.experts; ++i) {
      loss += scale * means.chosen[i] * means.probability[i];
      const double slope = scale * means.chosen[i] / real_tokens(p.mask, p.tokens);
      static_cast<accumulator_t<T>*>(p.slope)[i] = static_cast<accumulator_t<T>>(slope);
    }
    *static_cast<accumulator_t<T>*>(p.loss) = static_cast<accumulator_t<T>>(loss);
  });
  return Status::kOk;
}

Status load_balancing_loss_backward(const LoadBalancingLossBackwardParams& p, const ParallelFor& parallel_for) {
  dispatch(p.dtype, [&]<class T>() {
    using Acc = accumulator_t<T>;
    const Acc grad_loss = *static_cast<const Acc*>(p.grad_loss);
    parallel_for(p.layers, 1, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin * p.tokens; row < end * p.tokens; ++row) {
        const Acc* slope = static_cast<const Acc*>(p.slope) + row / p.tokens * p.experts;
        T* grad = static_cast<T*>(p.grad_probs) + row * p.experts;
        const bool real = is_real(p.mask, row % p.tokens);
        for (int64_t e = 0; e < p.experts; ++e) grad[e] = real ? T(grad_loss * slope[e]) : T(Acc(0));
      }
    });
  });
  return Status::kOk;
}

}  // namespace micro_kernels::cpu
