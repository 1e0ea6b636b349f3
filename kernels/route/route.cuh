#pragma once
// Device code of routing: one thread per token. There are few experts, so that a token's work is a handful of
// instructions behind its loads; nothing is shared between tokens.

#include <cmath>

#include "common/cuda/arch/trap.cuh"
#include "common/cuda/score_row.cuh"
#include "micro_kernels/route.h"

namespace micro_kernels::cuda {

inline constexpr int kRouteThreads = 64;
inline constexpr double kRouteEpsilon = 1e-9;  // of the renormalisation (model.md 2.3)

// Operands of a kernel, and whether the choices are two for each token, which then move by one instruction.
template <class Params>
struct RouteLaunch {
  Params op;
  bool two;
};

__device__ inline int32_t forced_expert(const int32_t* force, int64_t stride, int64_t token) {
  return force ? load(force + token * stride) : -1;
}

// z' of one token: the logits after steering.
template <class T, int kWidth>
__device__ void steer(const RouteParams& p, int64_t token, NewScoreRow<accumulator_t<T>, kWidth>& effective) {
  using Acc = accumulator_t<T>;
  const Acc nothing = static_cast<Acc>(-INFINITY);
  const int32_t forced = forced_expert(p.force, p.force_stride, token);
  require(forced >= -1 && forced < p.experts);
  if (forced >= 0) {
#pragma unroll
    for (int e = 0; e < effective.size(); ++e) effective.set(e, e == forced ? Acc(0) : nothing);
    return;
  }
  const ScoreRow<T, kWidth> logits(static_cast<const T*>(p.logits) + token * p.experts, p.experts);
#pragma unroll
  for (int e = 0; e < effective.size(); ++e) effective.set(e, logits[e]);
  if (p.bias) {
    const ScoreRow<Acc, kWidth> bias(static_cast<const Acc*>(p.bias) + token * p.bias_stride, p.experts);
#pragma unroll
    for (int e = 0; e < effective.size(); ++e) effective.set(e, effective[e] + bias[e]);
  }
  if (p.ablate) {
    const bool* ablate = p.ablate + token * p.ablate_stride;
#pragma unroll
    for (int e = 0; e < effective.size(); ++e)
      if (load(ablate + e)) effective.set(e, nothing);
  }
}

// A NaN or a positive infinity among the scores, or nothing but -inf, gives NaN throughout: the loss will show it.
template <class Acc, int kWidth>
__device__ void softmax(const NewScoreRow<Acc, kWidth>& z, NewScoreRow<Acc, kWidth>& p) {
  Acc top = static_cast<Acc>(-INFINITY);
#pragma unroll
  for (int e = 0; e < z.size(); ++e) top = z[e] > top ? z[e] : top;
  Acc sum = 0;
#pragma unroll
  for (int e = 0; e < z.size(); ++e) {
    const Acc value = exp(z[e] - top);
    p.set(e, value);
    sum += value;
  }
#pragma unroll
  for (int e = 0; e < z.size(); ++e) p.set(e, p[e] / sum);
}

// The order of choice: larger values first, NaN behind -inf, of equal values the lower id.
template <class Acc>
struct Choice {
  Acc value;
  int32_t id;
};

template <class Acc>
__device__ bool comes_before(const Choice<Acc>& a, const Choice<Acc>& b) {
  const bool a_nan = a.value != a.value, b_nan = b.value != b.value;
  if (a_nan != b_nan) return b_nan;
  if (!a_nan && a.value != b.value) return a.value > b.value;
  return a.id < b.id;
}

// The first expert in the order of choice that stands behind `last`; last.id = -1 asks for the very first.
template <class Acc, int kWidth>
__device__ Choice<Acc> next_choice(const NewScoreRow<Acc, kWidth>& p, const Choice<Acc>& last) {
  Choice<Acc> best{0, -1};
#pragma unroll
  for (int e = 0; e < p.size(); ++e) {
    const Choice<Acc> candidate{p[e], e};
    const bool open = last.id < 0 || comes_before(last, candidate);
    if (open && (best.id < 0 || comes_before(candidate, best))) best = candidate;
  }
  return best;
}

// Choice number i: the id to replay, or the one after `last`.
template <class Acc, int kWidth>
__device__ Choice<Acc> choose(const RouteParams& params, int64_t token, int64_t i, const NewScoreRow<Acc, kWidth>& p,
                              const Choice<Acc>& last) {
  if (!params.replay) return next_choice(p, last);
  const int32_t id = load(params.replay + token * params.k + i);
  require(id >= 0 && id < params.experts);
  return {p.at(id), id};
}

template <class T, int kWidth>
__device__ void store_two_choices(const RouteParams& p, int64_t token,
                                  const NewScoreRow<accumulator_t<T>, kWidth>& probs) {
  using Acc = accumulator_t<T>;
  const Choice<Acc> first = choose(p, token, 0, probs, {0, -1}), second = choose(p, token, 1, probs, first);
  const Acc sum = first.value + second.value + static_cast<Acc>(kRouteEpsilon);
  const Acc scale = p.rule == WeightRule::kProbability ? Acc(1) : sum;
  store_vec<2>(p.ids + token * 2, Vec<int32_t, 2>{{first.id, second.id}});
  store_vec<2>(static_cast<T*>(p.weights) + token * 2, Vec<T, 2>{{T(first.value / scale), T(second.value / scale)}});
}

// The choices are found twice, once for their sum: cheaper than keeping a list whose length is not known here.
template <class T, int kWidth>
__device__ void store_choices(const RouteParams& p, int64_t token, const NewScoreRow<accumulator_t<T>, kWidth>& probs) {
  using Acc = accumulator_t<T>;
  Acc scale = 1;
  if (p.rule != WeightRule::kProbability) {
    Acc sum = 0;
    Choice<Acc> choice{0, -1};
    for (int64_t i = 0; i < p.k; ++i) {
      choice = choose(p, token, i, probs, choice);
      sum += choice.value;
    }
    scale = sum + static_cast<Acc>(kRouteEpsilon);
  }
  Choice<Acc> choice{0, -1};
  for (int64_t i = 0; i < p.k; ++i) {
    choice = choose(p, token, i, probs, choice);
    store(p.ids + token * p.k + i, choice.id);
    store(static_cast<T*>(p.weights) + token * p.k + i, T(choice.value / scale));
  }
}

// One token's decision, by one thread. Logit: the type of the logits. two: RouteLaunch::two.
template <class T, int kWidth, class Logit = T>
__device__ void route_token(const RouteParams& p, int64_t token, bool two = false) {
  using Acc = accumulator_t<T>;
  NewScoreRow<Acc, kWidth> effective(static_cast<Acc*>(p.effective) + token * p.experts, p.experts);
  NewScoreRow<Acc, kWidth> probs(static_cast<Acc*>(p.probs) + token * p.experts, p.experts);
  if (p.rows) {
    const ScoreRow<Acc, kWidth> rows(static_cast<const Acc*>(p.rows) + token * p.experts, p.experts);
#pragma unroll
    for (int e = 0; e < rows.size(); ++e) {
      effective.set(e, rows[e]);
      probs.set(e, rows[e]);
    }
  } else {
    steer<Logit>(p, token, effective);
    softmax(effective, probs);
  }
  effective.finish();
  probs.finish();
  if (two)
    store_two_choices<T>(p, token, probs);
  else
    store_choices<T>(p, token, probs);
}

template <class T, int kWidth>
__global__ void __launch_bounds__(kRouteThreads, 1) route_kernel(RouteLaunch<RouteParams> launch) {
  const int64_t token = int64_t{blockIdx.x} * kRouteThreads + threadIdx.x;
  if (token < launch.op.tokens) route_token<T, kWidth>(launch.op, token, launch.two);
}

// Adds dL/dq_i to dp at two chosen ids (model.md 2.10.4).
template <class T, int kWidth>
__device__ void add_two_weight_gradients(const RouteBackwardParams& p, int64_t token,
                                         const ScoreRow<accumulator_t<T>, kWidth>& probs,
                                         NewScoreRow<accumulator_t<T>, kWidth>& dp) {
  using Acc = accumulator_t<T>;
  const Vec<int32_t, 2> ids = load_vec<2>(p.ids + token * 2);
  const Vec<T, 2> delta = load_vec<2>(static_cast<const T*>(p.grad_weights) + token * 2);
  const Acc first = static_cast<Acc>(delta[0]), second = static_cast<Acc>(delta[1]);
  Acc scale = 1, mean = 0;  // sum_j w_j delta_j
  if (p.rule == WeightRule::kRenormalized) {
    const Acc first_q = probs.at(ids[0]), second_q = probs.at(ids[1]);
    scale = first_q + second_q + static_cast<Acc>(kRouteEpsilon);
    mean = first_q / scale * first + second_q / scale * second;
  }
  dp.add(ids[0], (first - mean) / scale);
  dp.add(ids[1], (second - mean) / scale);
}

// The same for any number of them.
template <class T, int kWidth>
__device__ void add_weight_gradients(const RouteBackwardParams& p, int64_t token,
                                     const ScoreRow<accumulator_t<T>, kWidth>& probs,
                                     NewScoreRow<accumulator_t<T>, kWidth>& dp) {
  using Acc = accumulator_t<T>;
  const T* delta = static_cast<const T*>(p.grad_weights) + token * p.k;
  const int32_t* ids = p.ids + token * p.k;
  Acc scale = 1, mean = 0;
  if (p.rule == WeightRule::kRenormalized) {
    Acc sum = 0;
    for (int64_t i = 0; i < p.k; ++i) sum += probs.at(load(ids + i));
    scale = sum + static_cast<Acc>(kRouteEpsilon);
    for (int64_t i = 0; i < p.k; ++i) mean += probs.at(load(ids + i)) / scale * static_cast<Acc>(load(delta + i));
  }
  for (int64_t i = 0; i < p.k; ++i) dp.add(load(ids + i), (static_cast<Acc>(load(delta + i)) - mean) / scale);
}

__device__ inline bool ids_inside(const RouteLaunch<RouteBackwardParams>& launch, int64_t token) {
  const RouteBackwardParams& p = launch.op;
  const auto inside = [&p](int32_t id) { return id >= 0 && id < p.experts; };
  if (launch.two) {
    const Vec<int32_t, 2> ids = load_vec<2>(p.ids + token * 2);
    return inside(ids[0]) && inside(ids[1]);
  }
  for (int64_t i = 0; i < p.k; ++i)
    if (!inside(load(p.ids + token * p.k + i))) return false;
  return true;
}

template <class T, int kWidth>
__global__ void __launch_bounds__(kRouteThreads, 1) route_backward_kernel(RouteLaunch<RouteBackwardParams> launch) {
  using Acc = accumulator_t<T>;
  const RouteBackwardParams& p = launch.op;
  const int64_t token = int64_t{blockIdx.x} * kRouteThreads + threadIdx.x;
  if (token >= p.tokens) return;
  // Before anything else, because an assertion is a call, and would push what is alive out of the registers.
  require(ids_inside(launch, token));
  const int64_t row = token * p.experts;
  NewScoreRow<Acc, kWidth> grad_z(static_cast<Acc*>(p.grad_z) + row, p.experts);  // dL/dp, then dL/dz
  fill_zero(grad_z);
  if (forced_expert(p.force, p.force_stride, token) >= 0) {
    grad_z.finish();
    return;
  }
  const ScoreRow<Acc, kWidth> probs(static_cast<const Acc*>(p.probs) + row, p.experts);
  if (p.grad_probs) {
    const ScoreRow<Acc, kWidth> grad_probs(static_cast<const Acc*>(p.grad_probs) + row, p.experts);
#pragma unroll
    for (int e = 0; e < grad_z.size(); ++e) grad_z.set(e, grad_probs[e]);
  }
  if (p.grad_weights && launch.two) add_two_weight_gradients<T>(p, token, probs, grad_z);
  if (p.grad_weights && !launch.two) add_weight_gradients<T>(p, token, probs, grad_z);

  Acc mean = 0;  // sum_e p_e dp_e; where p is 0, an infinite dp must not turn it into NaN
#pragma unroll
  for (int e = 0; e < probs.size(); ++e)
    if (probs[e] != 0) mean += probs[e] * grad_z[e];
#pragma unroll
  for (int e = 0; e < probs.size(); ++e) grad_z.set(e, probs[e] == 0 ? Acc(0) : probs[e] * (grad_z[e] - mean));
  if (p.grad_effective) {
    const ScoreRow<Acc, kWidth> direct(static_cast<const Acc*>(p.grad_effective) + row, p.experts);
#pragma unroll
    for (int e = 0; e < probs.size(); ++e) grad_z.set(e, grad_z[e] + direct[e]);
  }
  const ScoreRow<Acc, kWidth> effective(static_cast<const Acc*>(p.effective) + row, p.experts);
#pragma unroll
  for (int e = 0; e < probs.size(); ++e)
    if (effective[e] == static_cast<Acc>(-INFINITY)) grad_z.set(e, 0);
  grad_z.finish();
}

}  // namespace micro_kernels::cuda
