#pragma once
// Routed pairs (token, rank) sorted by expert with a stable counting sort: tokens of one expert stay in slot order, so
// the result has one right answer, whatever the number of threads. Pairs of weight 0 and pairs of padded tokens are
// idle: they stand behind the rows of the last expert.

#include <cstdint>

#include "micro_kernels/dtype.h"
#include "micro_kernels/parallel.h"
#include "micro_kernels/status.h"

namespace micro_kernels {

struct PlanParams {
  const int32_t* ids;   // [token_count, k], values in [0, expert_count)
  const void* weights;  // [token_count, k], or nullptr: no pair is idle for its weight
  const bool* mask;     // [token_count], false is padded; or nullptr
  int32_t* tokens;      // [token_count * k], token of each row
  int32_t* experts;     // [token_count * k], expert of each row, idle rows included
  int32_t* offsets;     // [expert_count + 1], first row of each expert; the last is the first idle row
  int32_t* inverse;     // [token_count, k], row of each pair
  int64_t token_count;
  int64_t k;
  int64_t expert_count;
  DType dtype;  // of weights
};

// token_count * k must fit into int32. An id outside [0, expert_count) is kIndexOutOfRange on the CPU and a device
// assertion on CUDA.
namespace cpu {
Status plan(const PlanParams& params, const ParallelFor& parallel_for);
}

namespace cuda {
Status plan(const PlanParams& params, void* stream);
}

}  // namespace micro_kernels
