#include <algorithm>
#include <vector>

#include "micro_kernels/isa.h"
#include "micro_kernels/permute.h"
#include "permute/permute_loop.h"

namespace micro_kernels::cpu {

const PermuteLoops kPermutePlain = kLoops;

namespace {

constexpr int64_t kGrainElements = 16 * 1024;  // below this, handing work to another thread costs more than it saves

const PermuteLoops& loops_for_this_cpu() {
#if defined(__x86_64__)
  if (isa() >= Isa::kAvx512) return kPermuteAvx512;
  if (isa() >= Isa::kAvx2) return kPermuteAvx2;
#endif
  return kPermutePlain;
}

bool in_range(const int32_t* values, int64_t count, int64_t end) {
  return std::all_of(values, values + count, [end](int32_t v) { return v >= 0 && v < end; });
}

// Zero is all bits zero in every element type.
void copy_row(const PermuteParams& p, int64_t row, int64_t bytes) {
  char* y = static_cast<char*>(p.y) + row * bytes;
  if (row < p.offsets[p.experts])
    std::copy_n(static_cast<const char*>(p.x) + p.tokens[row] * bytes, bytes, y);
  else
    std::fill_n(y, bytes, char(0));
}

// Stored: the element as the loops see it, plain bits for bfloat16.
template <class Stored>
void all_sums(const PermuteBackwardParams& p, const ParallelFor& parallel_for, RowSum<Stored> sum) {
  const int64_t grain = kGrainElements / std::max<int64_t>(1, p.hidden * p.k) + 1;
  parallel_for(p.token_count, grain, [&](int64_t begin, int64_t end) {
    std::vector<const Stored*> rows;
    rows.reserve(p.k);
    for (int64_t token = begin; token < end; ++token) {
      rows.clear();
      for (int64_t pair = token * p.k; pair < (token + 1) * p.k; ++pair)
        if (p.inverse[pair] < p.offsets[p.experts])
          rows.push_back(static_cast<const Stored*>(p.grad_y) + p.inverse[pair] * p.hidden);
      sum(rows.data(), static_cast<int64_t>(rows.size()), static_cast<Stored*>(p.grad_x) + token * p.hidden, p.hidden);
    }
  });
}

}  // namespace

Status permute(const PermuteParams& p, const ParallelFor& parallel_for) {
  if (!in_range(p.tokens, p.rows, p.token_count)) return Status::kIndexOutOfRange;
  const int64_t bytes = p.hidden * dispatch(p.dtype, []<class T>() { return int64_t{sizeof(T)}; });
  parallel_for(p.rows, kGrainElements / std::max<int64_t>(1, p.hidden) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) copy_row(p, row, bytes);
  });
  return Status::kOk;
}

Status permute_backward(const PermuteBackwardParams& p, const ParallelFor& parallel_for) {
  if (!in_range(p.inverse, p.token_count * p.k, p.token_count * p.k)) return Status::kIndexOutOfRange;
  const PermuteLoops& loops = loops_for_this_cpu();
  switch (p.dtype) {
    case DType::kFloat32:
      all_sums(p, parallel_for, loops.float32);
      break;
    case DType::kFloat64:
      all_sums(p, parallel_for, loops.float64);
      break;
    case DType::kBFloat16:
      all_sums(p, parallel_for, loops.bfloat16);
      break;
    case DType::kFloat16:  // on CUDA only: refused by callers
      break;
  }
  return Status::kOk;
}

}  // namespace micro_kernels::cpu
