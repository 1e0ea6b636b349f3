#include <algorithm>
#include <vector>

#include "cross_entropy/cross_entropy_row.h"
#include "micro_kernels/cross_entropy.h"
#include "micro_kernels/isa.h"

namespace micro_kernels::cpu {

const CrossEntropyRows kCrossEntropyPlain = kRows;

namespace {

const CrossEntropyRows& rows_for_this_cpu() {
#if defined(__x86_64__)
  if (isa() >= Isa::kAvx512) return kCrossEntropyAvx512;
  if (isa() >= Isa::kAvx2) return kCrossEntropyAvx2;
#endif
  return kCrossEntropyPlain;
}

// Stored: the element as the row functions see it, plain bits for bfloat16.
template <class Stored, class Acc>
void all_rows(const CrossEntropyParams& p, const ParallelFor& parallel_for,
              Acc (*row_loss)(Stored*, int64_t, int64_t, bool, Acc*)) {
  parallel_for(p.rows, 1, [&](int64_t begin, int64_t end) {
    std::vector<Acc> wide(cross_entropy_scratch(p.vocabulary));
    for (int64_t row = begin; row < end; ++row) {
      Stored* logits = static_cast<Stored*>(p.logits) + row * p.vocabulary;
      static_cast<Acc*>(p.losses)[row] = row_loss(logits, p.vocabulary, p.targets[row], p.write_gradient, wide.data());
    }
  });
}

}  // namespace

Status cross_entropy(const CrossEntropyParams& p, const ParallelFor& parallel_for) {
  const bool in_range =
      std::all_of(p.targets, p.targets + p.rows, [&p](int64_t target) { return target >= 0 && target < p.vocabulary; });
  if (!in_range) return Status::kIndexOutOfRange;
  const CrossEntropyRows& functions = rows_for_this_cpu();
  switch (p.dtype) {
    case DType::kFloat32:
      all_rows(p, parallel_for, functions.float32);
      break;
    case DType::kFloat64:
      all_rows(p, parallel_for, functions.float64);
      break;
    case DType::kBFloat16:
      all_rows(p, parallel_for, functions.bfloat16);
      break;
    case DType::kFloat16:  // on CUDA only: refused by callers
      break;
  }
  return Status::kOk;
}

}  // namespace micro_kernels::cpu
