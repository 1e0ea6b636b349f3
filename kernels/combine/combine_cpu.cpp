#include <algorithm>
#include <vector>

#include "combine/combine_loop.h"
#include "micro_kernels/combine.h"
#include "micro_kernels/isa.h"

namespace micro_kernels::cpu {

const CombineLoops kCombinePlain = kLoops;

namespace {

constexpr int64_t kGrainElements = 16 * 1024;  // below this, handing work to another thread costs more than it saves

const CombineLoops& loops_for_this_cpu() {
#if defined(__x86_64__)
  if (isa() >= Isa::kAvx512) return kCombineAvx512;
  if (isa() >= Isa::kAvx2) return kCombineAvx2;
#endif
  return kCombinePlain;
}

// Calls body.operator()<T>(loop): T is the element type, and the loop sees bfloat16 as its bits.
template <class Body>
void with_loop(DType dtype, const Body& body) {
  const CombineLoops& loops = loops_for_this_cpu();
  switch (dtype) {
    case DType::kFloat32:
      return body.template operator()<float>(loops.float32);
    case DType::kFloat64:
      return body.template operator()<double>(loops.float64);
    case DType::kBFloat16:
      return body.template operator()<BFloat16>(loops.bfloat16);
    case DType::kFloat16:  // on CUDA only: refused by callers
      return;
  }
}

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

template <class T, class Acc>
Acc weight_of(const void* weights, int64_t pair) {
  return static_cast<Acc>(static_cast<const T*>(weights)[pair]);
}

template <class T, class Stored, class Acc>
void combine_tokens(const CombineParams& p, const CombineLoop<Stored, Acc>& loop, int64_t begin, int64_t end) {
  std::vector<int32_t> ranks;
  std::vector<WeightedRow<Stored, Acc>> rows;
  ranks.reserve(p.k);
  rows.reserve(p.k);
  for (int64_t token = begin; token < end; ++token) {
    const int32_t* inverse = p.inverse + token * p.k;
    active_ranks(p, inverse, ranks);
    rows.clear();
    for (int32_t rank : ranks)
      rows.push_back({static_cast<const Stored*>(p.y) + inverse[rank] * p.hidden,
                      weight_of<T, Acc>(p.weights, token * p.k + rank)});
    loop.sum(rows.data(), static_cast<int64_t>(rows.size()), static_cast<Stored*>(p.out) + token * p.hidden, p.hidden);
  }
}

template <class T, class Stored, class Acc>
void backward_pair(const CombineBackwardParams& p, const CombineLoop<Stored, Acc>& loop, int64_t pair) {
  const int64_t row = p.inverse[pair];
  const bool active = row < p.offsets[p.expert_count];
  const Stored* grad = static_cast<const Stored*>(p.grad) + pair / p.k * p.hidden;
  if (p.grad_weights)
    static_cast<Acc*>(p.grad_weights)[pair] =
        active ? loop.dot(grad, static_cast<const Stored*>(p.y) + row * p.hidden, p.hidden) : Acc(0);
  if (!p.grad_y) return;
  Stored* grad_y = static_cast<Stored*>(p.grad_y) + row * p.hidden;
  if (active)
    loop.scale(grad, weight_of<T, Acc>(p.weights, pair), grad_y, p.hidden);
  else
    std::fill(grad_y, grad_y + p.hidden, Stored(0));
}

}  // namespace

Status combine(const CombineParams& p, const ParallelFor& parallel_for) {
  if (!in_range(p.inverse, p.token_count * p.k, p.token_count * p.k)) return Status::kIndexOutOfRange;
  const int64_t grain = kGrainElements / std::max<int64_t>(1, p.hidden * p.k) + 1;
  with_loop(p.dtype, [&]<class T>(const auto& loop) {
    parallel_for(p.token_count, grain, [&](int64_t begin, int64_t end) { combine_tokens<T>(p, loop, begin, end); });
  });
  return Status::kOk;
}

Status combine_backward(const CombineBackwardParams& p, const ParallelFor& parallel_for) {
  if (!in_range(p.inverse, p.token_count * p.k, p.token_count * p.k)) return Status::kIndexOutOfRange;
  const int64_t pairs = p.token_count * p.k, grain = kGrainElements / std::max<int64_t>(1, p.hidden) + 1;
  with_loop(p.dtype, [&]<class T>(const auto& loop) {
    parallel_for(pairs, grain, [&](int64_t begin, int64_t end) {
      for (int64_t pair = begin; pair < end; ++pair) backward_pair<T>(p, loop, pair);
    });
  });
  return Status::kOk;
}

}  // namespace micro_kernels::cpu
