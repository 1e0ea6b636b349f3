#include <algorithm>

#include "micro_kernels/isa.h"
#include "micro_kernels/rope.h"
#include "rope/rope_loop.h"

namespace micro_kernels::cpu {

const RopeLoops kRopePlain = kLoops;

namespace {

constexpr int64_t kGrainElements = 16 * 1024;  // below this, handing work to another thread costs more than it saves

const RopeLoops& loops_for_this_cpu() {
#if defined(__x86_64__)
  if (isa() >= Isa::kAvx512) return kRopeAvx512;
  if (isa() >= Isa::kAvx2) return kRopeAvx2;
#endif
  return kRopePlain;
}

// Stored: the element as the loops see it, plain bits for bfloat16.
template <class Stored, class Acc>
void all_rows(const RopeParams& p, const ParallelFor& parallel_for, RopeLoop<Stored, Acc> turn) {
  const int64_t row_size = p.heads * p.head_dim, half = p.head_dim / 2;
  const Acc sign = p.direction == RopeDirection::kForward ? Acc(1) : Acc(-1);
  parallel_for(p.rows, kGrainElements / std::max<int64_t>(1, row_size) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t position = p.tokens ? p.tokens[row] : row % p.positions;
      turn(static_cast<const Stored*>(p.x) + row * row_size, static_cast<const Acc*>(p.cos) + position * half,
           static_cast<const Acc*>(p.sin) + position * half, sign, static_cast<Stored*>(p.y) + row * row_size, p.heads,
           half);
    }
  });
}

}  // namespace

Status rope(const RopeParams& p, const ParallelFor& parallel_for) {
  const auto outside = [&p](int32_t t) { return t < 0 || t >= p.positions; };
  if (p.tokens && std::any_of(p.tokens, p.tokens + p.rows, outside)) return Status::kIndexOutOfRange;
  const RopeLoops& loops = loops_for_this_cpu();
  switch (p.dtype) {
    case DType::kFloat32:
      all_rows(p, parallel_for, loops.float32);
      break;
    case DType::kFloat64:
      all_rows(p, parallel_for, loops.float64);
      break;
    case DType::kBFloat16:
      all_rows(p, parallel_for, loops.bfloat16);
      break;
    case DType::kFloat16:  // on CUDA only: refused by callers
      break;
  }
  return Status::kOk;
}

}  // namespace micro_kernels::cpu
