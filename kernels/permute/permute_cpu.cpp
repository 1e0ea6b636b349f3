#include <algorithm>

#include "micro_kernels/permute.h"

namespace micro_kernels::cpu {
namespace {

constexpr int64_t kGrainElements = 16 * 1024;  // below this, handing work to another thread costs more than it saves
constexpr int64_t kBlock = 256;                // columns whose sums stay in the first cache

bool in_range(const int32_t* values, int64_t count, int64_t end) {
  return std::all_of(values, values + count, [end](int32_t v) { return v >= 0 && v < end; });
}

template <class T>
void copy_row(const PermuteParams& p, int64_t row) {
  T* y = static_cast<T*>(p.y) + row * p.hidden;
  const T* x = static_cast<const T*>(p.x) + p.tokens[row] * p.hidden;
  if (row < p.offsets[p.experts])
    std::copy(x, x + p.hidden, y);
  else
    std::fill(y, y + p.hidden, T(accumulator_t<T>(0)));
}

// The k rows of a token are added by rank, in the accumulator type, and rounded once.
template <class T>
void gather_sum(const PermuteBackwardParams& p, int64_t token) {
  using Acc = accumulator_t<T>;
  const int32_t* rows = p.inverse + token * p.k;
  T* __restrict__ grad_x = static_cast<T*>(p.grad_x) + token * p.hidden;
  for (int64_t from = 0; from < p.hidden; from += kBlock) {
    const int64_t width = std::min(kBlock, p.hidden - from);
    Acc sum[kBlock] = {};
    for (int64_t i = 0; i < p.k; ++i) {
      if (rows[i] >= p.offsets[p.experts]) continue;
      const T* __restrict__ grad_y = static_cast<const T*>(p.grad_y) + rows[i] * p.hidden + from;
      for (int64_t h = 0; h < width; ++h) sum[h] += static_cast<Acc>(grad_y[h]);
    }
    for (int64_t h = 0; h < width; ++h) grad_x[from + h] = T(sum[h]);
  }
}

}  // namespace

Status permute(const PermuteParams& p, const ParallelFor& parallel_for) {
  if (!in_range(p.tokens, p.rows, p.token_count)) return Status::kIndexOutOfRange;
  dispatch(p.dtype, [&]<class T>() {
    parallel_for(p.rows, kGrainElements / std::max<int64_t>(1, p.hidden) + 1, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) copy_row<T>(p, row);
    });
  });
  return Status::kOk;
}

Status permute_backward(const PermuteBackwardParams& p, const ParallelFor& parallel_for) {
  if (!in_range(p.inverse, p.token_count * p.k, p.token_count * p.k)) return Status::kIndexOutOfRange;
  dispatch(p.dtype, [&]<class T>() {
    parallel_for(p.token_count, kGrainElements / std::max<int64_t>(1, p.hidden * p.k) + 1,
                 [&](int64_t begin, int64_t end) {
                   for (int64_t token = begin; token < end; ++token) gather_sum<T>(p, token);
                 });
  });
  return Status::kOk;
}

}  // namespace micro_kernels::cpu
