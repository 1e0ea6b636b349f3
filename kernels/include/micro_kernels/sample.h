#pragma once
// The next token of each row, from logits z (the order of transformers' processors):
//   z'[v] = z[v] / penalty where z[v] >= 0, z[v] * penalty below, for the ids that the row has already
//   z'[v] = -inf for stop ids while the row has fewer than min_new_tokens
//   temperature 0: the largest z', of equal ones the lowest id
//   else s = z' / temperature; kept are the s that are not below the k-th largest, and of these, descending, as many as
//   it takes to reach the share top_p of sum exp(s); the draw is u in [0, 1) over the kept exp(s) in the order of ids
// NaN counts as -inf and, where nothing is above -inf, ranks below it.

#include <cstdint>

#include "micro_kernels/dtype.h"
#include "micro_kernels/parallel.h"
#include "micro_kernels/status.h"

namespace micro_kernels {

// The least temperature above 0: below it, quotients of ordinary logits leave the range of float32. Checked by callers.
constexpr double kColdest = 1e-5;

struct SampleParams {
  const void* logits;       // [rows, vocab]
  const int64_t* previous;  // [rows, previous_count] ids of the row so far; those outside [0, vocab) are skipped
  const int64_t* stop_ids;  // [stop_count]; those outside [0, vocab) are skipped
  const int64_t* seeds;     // [rows], key of a row's draws; read only where temperature > 0
  const int64_t* steps;     // [rows], tokens that the row has been given: counter of the draw; also for min_new_tokens
  int64_t* ids;             // [rows]
  int64_t rows;
  int64_t vocab;
  int64_t previous_count;
  int64_t stop_count;
  int64_t min_new_tokens;
  int64_t top_k;              // 0: all
  double top_p;               // 1: all
  double temperature;         // 0, or from kColdest on
  double repetition_penalty;  // 1: none
  DType dtype;
};

// u of a row: Philox 4x32-10 (Salmon et al. 2011), key = seed, counter = step; so no draw depends on the batch.
double sample_uniform(int64_t seed, int64_t step);

namespace cpu {
Status sample(const SampleParams& params, const ParallelFor& parallel_for);
}

namespace cuda {
int64_t sample_workspace(const SampleParams& params);  // bytes; depends on sizes and options only
Status sample(const SampleParams& params, void* workspace, void* stream);
}  // namespace cuda

}  // namespace micro_kernels
