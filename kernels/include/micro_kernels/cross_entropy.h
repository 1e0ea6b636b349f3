#pragma once
// Row-wise part of the cross-entropy of a language-model head (model.md 7.1):
//   loss[r] = log sum_v exp(z[r, v]) - z[r, target[r]],    dz[r, v] = exp(z[r, v] - log sum) - [v = target[r]]
// The logits of a chunk of rows come from a matrix product; their gradient replaces them where they stand.

#include <cstdint>

#include "micro_kernels/dtype.h"
#include "micro_kernels/parallel.h"
#include "micro_kernels/status.h"

namespace micro_kernels {

struct CrossEntropyParams {
  void* logits;            // [rows, vocabulary]; overwritten by their gradient if write_gradient
  const int64_t* targets;  // [rows], values in [0, vocabulary)
  void* losses;            // [rows], accumulator type
  int64_t rows;
  int64_t vocabulary;
  bool write_gradient;
  DType dtype;  // of logits
  // CUDA only, on the device, or nullptr: only the first *count rows are there; of the others the loss is 0, target and
  // logits are not touched.
  const int32_t* count = nullptr;
};

// A target outside [0, vocabulary) is kIndexOutOfRange on the CPU and a device assertion on CUDA.
namespace cpu {
Status cross_entropy(const CrossEntropyParams& params, const ParallelFor& parallel_for);
}  // namespace cpu

namespace cuda {
Status cross_entropy(const CrossEntropyParams& params, void* stream);
}  // namespace cuda

}  // namespace micro_kernels
