#include <algorithm>
#include <vector>

#include "micro_kernels/combine.h"

namespace micro_kernels::cpu {
namespace {

constexpr int64_t kGrainElements = 16 * 1024;  // below this, handing work to another thread costs more than it saves
constexpr int kPartialSums = 16;  // of a dot product: a fixed number, so that every instruction set adds alike

bool in_range(const int32_t* values, int64_t count, int64_t end) {
  return std::all_of(values, values + count, [end](int32_t v) { return v >= 0 && v < end; });
}

// Ranks of the token's active pairs, by expert; ranks of one expert (only a replay can hold it twice) stay in order.
void active_ranks(const CombineParams& p, const int32_t* rows, std::vector<int32_t>& ranks) {
  ranks.clear();
  for (int32_t i = 0; i < p.k; ++i) {
    if (rows[i] >= p.offsets[p.expert_count]) continue;
    auto at = ranks.end();
    while (at != ranks.begin() && p.experts[rows[*(at - 1)]] > p.experts[rows[i]]) --at;
    ranks.insert(at, i);
  }
}

template <class T>
void combine_token(const CombineParams& p, int64_t token, std::vector<int32_t>& ranks) {
  using Acc = accumulator_t<T>;
  const int32_t* rows = p.inverse + token * p.k;
  active_ranks(p, rows, ranks);
  T* __restrict__ out = static_cast<T*>(p.out) + token * p.hidden;
  if (ranks.empty()) std::fill(out, out + p.hidden, T(Acc(0)));
  for (size_t i = 0; i < ranks.size(); ++i) {
    const Acc weight = static_cast<Acc>(static_cast<const T*>(p.weights)[token * p.k + ranks[i]]);
    const T* __restrict__ y = static_cast<const T*>(p.y) + rows[ranks[i]] * p.hidden;
    if (i == 0)
      for (int64_t h = 0; h < p.hidden; ++h) out[h] = T(Acc(0) + static_cast<Acc>(T(static_cast<Acc>(y[h]) * weight)));
    else
      for (int64_t h = 0; h < p.hidden; ++h)
        out[h] = T(static_cast<Acc>(out[h]) + static_cast<Acc>(T(static_cast<Acc>(y[h]) * weight)));
  }
}

template <class T>
accumulator_t<T> dot(const T* __restrict__ a, const T* __restrict__ b, int64_t count) {
  using Acc = accumulator_t<T>;
  Acc sum[kPartialSums] = {};
  int64_t h = 0;
  for (; h + kPartialSums <= count; h += kPartialSums)
    for (int i = 0; i < kPartialSums; ++i) sum[i] += static_cast<Acc>(a[h + i]) * static_cast<Acc>(b[h + i]);
  for (int i = 0; h < count; ++h, ++i) sum[i] += static_cast<Acc>(a[h]) * static_cast<Acc>(b[h]);
  Acc total = 0;
  for (const Acc part : sum) total += part;
  return total;
}

template <class T>
void backward_pair(const CombineBackwardParams& p, int64_t token, int64_t pair) {
  using Acc = accumulator_t<T>;
  const int64_t row = p.inverse[pair];
  const bool active = row < p.offsets[p.expert_count];
  const T* __restrict__ grad = static_cast<const T*>(p.grad) + token * p.hidden;
  if (p.grad_weights) {
    const T* y = static_cast<const T*>(p.y) + row * p.hidden;
    static_cast<Acc*>(p.grad_weights)[pair] = active ? dot(grad, y, p.hidden) : Acc(0);
  }
  if (!p.grad_y) return;
  T* __restrict__ grad_y = static_cast<T*>(p.grad_y) + row * p.hidden;
  if (!active) {
    std::fill(grad_y, grad_y + p.hidden, T(Acc(0)));
    return;
  }
  const Acc weight = static_cast<Acc>(static_cast<const T*>(p.weights)[pair]);
  for (int64_t h = 0; h < p.hidden; ++h) grad_y[h] = T(static_cast<Acc>(grad[h]) * weight);
}

}  // namespace

Status combine(const CombineParams& p, const ParallelFor& parallel_for) {
  if (!in_range(p.inverse, p.token_count * p.k, p.token_count * p.k)) return Status::kIndexOutOfRange;
  dispatch(p.dtype, [&]<class T>() {
    parallel_for(p.token_count, kGrainElements / std::max<int64_t>(1, p.hidden * p.k) + 1,
                 [&](int64_t begin, int64_t end) {
                   std::vector<int32_t> ranks;
                   ranks.reserve(p.k);
                   for (int64_t token = begin; token < end; ++token) combine_token<T>(p, token, ranks);
                 });
  });
  return Status::kOk;
}

Status combine_backward(const CombineBackwardParams& p, const ParallelFor& parallel_for) {
  if (!in_range(p.inverse, p.token_count * p.k, p.token_count * p.k)) return Status::kIndexOutOfRange;
  dispatch(p.dtype, [&]<class T>() {
    const int64_t pairs = p.token_count * p.k;
    parallel_for(pairs, kGrainElements / std::max<int64_t>(1, p.hidden) + 1, [&](int64_t begin, int64_t end) {
      for (int64_t pair = begin; pair < end; ++pair) backward_pair<T>(p, pair / p.k, pair);
    });
  });
  return Status::kOk;
}

}  // namespace micro_kernels::cpu
