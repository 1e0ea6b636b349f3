#include <algorithm>
#include <cmath>

#include "micro_kernels/route.h"

namespace micro_kernels::cpu {
namespace {

constexpr int64_t kGrainElements = 4 * 1024;  // an exponential each: below this, a second thread does not pay
constexpr double kEpsilon = 1e-9;             // of the renormalisation (model.md 2.3)

bool in_range(const int32_t* ids, int64_t count, int64_t lowest, int64_t end) {
  return !ids || std::all_of(ids, ids + count, [=](int32_t id) { return id >= lowest && id < end; });
}

int32_t forced_expert(const int32_t* force, int64_t stride, int64_t token) {
  return force ? force[token * stride] : -1;
}

// z' of one token: the logits after steering.
template <class T>
void steer(const RouteParams& p, int64_t token, accumulator_t<T>* effective) {
  using Acc = accumulator_t<T>;
  const int32_t forced = forced_expert(p.force, p.force_stride, token);
  if (forced >= 0) {
    std::fill(effective, effective + p.experts, -INFINITY);
    effective[forced] = 0;
    return;
  }
  const T* logits = static_cast<const T*>(p.logits) + token * p.experts;
  for (int64_t e = 0; e < p.experts; ++e) effective[e] = static_cast<Acc>(logits[e]);
  if (p.bias) {
    const Acc* bias = static_cast<const Acc*>(p.bias) + token * p.bias_stride;
    for (int64_t e = 0; e < p.experts; ++e) effective[e] += bias[e];
  }
  if (p.ablate) {
    const bool* ablate = p.ablate + token * p.ablate_stride;
    for (int64_t e = 0; e < p.experts; ++e)
      if (ablate[e]) effective[e] = -INFINITY;
  }
}

// A NaN or a positive infinity among the scores, or nothing but -inf, gives NaN throughout: the loss will show it.
template <class Acc>
void softmax(const Acc* z, Acc* p, int64_t experts) {
  Acc top = -INFINITY;
  for (int64_t e = 0; e < experts; ++e) top = z[e] > top ? z[e] : top;
  Acc sum = 0;
  for (int64_t e = 0; e < experts; ++e) sum += p[e] = std::exp(z[e] - top);
  for (int64_t e = 0; e < experts; ++e) p[e] /= sum;
}

// Strict, so that of equal values the lower id stays in front; NaN ranks below -inf.
template <class Acc>
bool ranks_above(Acc a, Acc b) {
  return a > b || (std::isnan(b) && !std::isnan(a));
}

// The k largest, by insertion into a list that is never longer than k: no id can come out that did not go in.
template <class Acc>
void largest(const Acc* p, int64_t experts, int64_t k, int32_t* ids) {
  int64_t held = 0;
  for (int64_t e = 0; e < experts; ++e) {
    int64_t at = held;
    while (at > 0 && ranks_above(p[e], p[ids[at - 1]])) --at;
    if (at == k) continue;
    held = std::min(held + 1, k);
    for (int64_t i = held - 1; i > at; --i) ids[i] = ids[i - 1];
    ids[at] = static_cast<int32_t>(e);
  }
}

template <class Acc>
Acc chosen_sum(const Acc* p, const int32_t* ids, int64_t k) {
  Acc sum = 0;
  for (int64_t i = 0; i < k; ++i) sum += p[ids[i]];
  return sum + static_cast<Acc>(kEpsilon);
}

template <class T>
void route_token(const RouteParams& p, int64_t token) {
  using Acc = accumulator_t<T>;
  Acc* effective = static_cast<Acc*>(p.effective) + token * p.experts;
  Acc* probs = static_cast<Acc*>(p.probs) + token * p.experts;
  int32_t* ids = p.ids + token * p.k;
  T* weights = static_cast<T*>(p.weights) + token * p.k;

  if (p.rows) {
    const Acc* rows = static_cast<const Acc*>(p.rows) + token * p.experts;
    std::copy(rows, rows + p.experts, effective);
    std::copy(rows, rows + p.experts, probs);
  } else {
    steer<T>(p, token, effective);
    softmax(effective, probs, p.experts);
  }
  if (p.replay)
    std::copy(p.replay + token * p.k, p.replay + (token + 1) * p.k, ids);
  else
    largest(probs, p.experts, p.k, ids);

  const Acc scale = p.rule == WeightRule::kProbability ? Acc(1) : chosen_sum(probs, ids, p.k);
  for (int64_t i = 0; i < p.k; ++i) weights[i] = T(probs[ids[i]] / scale);
}

// Adds dL/dq_i to dp at the chosen ids (model.md 2.10.4).
template <class T>
void add_weight_gradient(const RouteBackwardParams& p, int64_t token, accumulator_t<T>* dp) {
  using Acc = accumulator_t<T>;
  const T* delta = static_cast<const T*>(p.grad_weights) + token * p.k;
  const int32_t* ids = p.ids + token * p.k;
  if (p.rule != WeightRule::kRenormalized) {
    for (int64_t i = 0; i < p.k; ++i) dp[ids[i]] += static_cast<Acc>(delta[i]);
    return;
  }
  const Acc* probs = static_cast<const Acc*>(p.probs) + token * p.experts;
  const Acc sum = chosen_sum(probs, ids, p.k);
  Acc mean = 0;  // sum_j w_j delta_j
  for (int64_t i = 0; i < p.k; ++i) mean += probs[ids[i]] / sum * static_cast<Acc>(delta[i]);
  for (int64_t i = 0; i < p.k; ++i) dp[ids[i]] += (static_cast<Acc>(delta[i]) - mean) / sum;
}

template <class T>
void backward_token(const RouteBackwardParams& p, int64_t token) {
  using Acc = accumulator_t<T>;
  Acc* grad_z = static_cast<Acc*>(p.grad_z) + token * p.experts;
  if (forced_expert(p.force, p.force_stride, token) >= 0) {
    std::fill(grad_z, grad_z + p.experts, Acc(0));
    return;
  }
  const Acc* probs = static_cast<const Acc*>(p.probs) + token * p.experts;
  const Acc* effective = static_cast<const Acc*>(p.effective) + token * p.experts;
  const Acc* grad_probs = p.grad_probs ? static_cast<const Acc*>(p.grad_probs) + token * p.experts : nullptr;
  const Acc* grad_effective =
      p.grad_effective ? static_cast<const Acc*>(p.grad_effective) + token * p.experts : nullptr;

  Acc* dp = grad_z;  // dL/dp, then dL/dz, in the same place
  for (int64_t e = 0; e < p.experts; ++e) dp[e] = grad_probs ? grad_probs[e] : Acc(0);
  if (p.grad_weights) add_weight_gradient<T>(p, token, dp);
  Acc mean = 0;  // sum_e p_e dp_e; where p is 0, an infinite dp must not turn it into NaN
  for (int64_t e = 0; e < p.experts; ++e) mean += probs[e] == 0 ? Acc(0) : probs[e] * dp[e];
  for (int64_t e = 0; e < p.experts; ++e) {
    const Acc through_softmax = probs[e] == 0 ? Acc(0) : probs[e] * (dp[e] - mean);
    const Acc direct = grad_effective ? grad_effective[e] : Acc(0);
    grad_z[e] = effective[e] == -INFINITY ? Acc(0) : through_softmax + direct;
  }
}

}  // namespace

Status route(const RouteParams& p, const ParallelFor& parallel_for) {
  const int64_t forced_rows = p.force_stride == 0 ? std::min<int64_t>(p.tokens, 1) : p.tokens;
  if (!p.rows && !in_range(p.force, forced_rows, -1, p.experts)) return Status::kIndexOutOfRange;
  if (!in_range(p.replay, p.tokens * p.k, 0, p.experts)) return Status::kIndexOutOfRange;
  dispatch(p.dtype, [&]<class T>() {
    parallel_for(p.tokens, kGrainElements / p.experts + 1, [&](int64_t begin, int64_t end) {
      for (int64_t token = begin; token < end; ++token) route_token<T>(p, token);
    });
  });
  return Status::kOk;
}

Status route_backward(const RouteBackwardParams& p, const ParallelFor& parallel_for) {
  if (!in_range(p.ids, p.tokens * p.k, 0, p.experts)) return Status::kIndexOutOfRange;
  dispatch(p.dtype, [&]<class T>() {
    parallel_for(p.tokens, kGrainElements / p.experts + 1, [&](int64_t begin, int64_t end) {
      for (int64_t token = begin; token < end; ++token) backward_token<T>(p, token);
    });
  });
  return Status::kOk;
}

}  // namespace micro_kernels::cpu
