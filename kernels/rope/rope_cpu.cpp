#include <algorithm>

#include "micro_kernels/rope.h"

namespace micro_kernels::cpu {
namespace {

constexpr int64_t kGrainElements = 16 * 1024;  // below this, handing work to another thread costs more than it saves

template <class T>
void rotate_row(const RopeParams& p, int64_t row) {
  using Acc = accumulator_t<T>;
  const int64_t half = p.head_dim / 2;
  const int64_t position = p.tokens ? p.tokens[row] : row % p.positions;
  const Acc* __restrict__ cos = static_cast<const Acc*>(p.cos) + position * half;
  const Acc* __restrict__ sin = static_cast<const Acc*>(p.sin) + position * half;
  const Acc sign = p.direction == RopeDirection::kForward ? Acc(1) : Acc(-1);
  for (int64_t head = row * p.heads; head < (row + 1) * p.heads; ++head) {
    const T* __restrict__ x = static_cast<const T*>(p.x) + head * p.head_dim;
    T* __restrict__ y = static_cast<T*>(p.y) + head * p.head_dim;
    for (int64_t i = 0; i < half; ++i) {
      const Acc a = static_cast<Acc>(x[i]), b = static_cast<Acc>(x[half + i]), s = sign * sin[i];
      y[i] = T(a * cos[i] - b * s);
      y[half + i] = T(b * cos[i] + a * s);
    }
  }
}

}  // namespace

Status rope(const RopeParams& p, const ParallelFor& parallel_for) {
  const auto outside = [&p](int32_t t) { return t < 0 || t >= p.positions; };
  if (p.tokens && std::any_of(p.tokens, p.tokens + p.rows, outside)) return Status::kIndexOutOfRange;
  dispatch(p.dtype, [&]<class T>() {
    parallel_for(p.rows, kGrainElements / std::max<int64_t>(1, p.heads * p.head_dim) + 1,
                 [&](int64_t begin, int64_t end) {
                   for (int64_t row = begin; row < end; ++row) rotate_row<T>(p, row);
                 });
  });
  return Status::kOk;
}

}  // namespace micro_kernels::cpu
