#pragma once
// Rotary position embedding, half-split pairing (model.md 2.2):
//   y[i] = x[i] cos[i] - x[i + D/2] sin[i],  y[i + D/2] = x[i + D/2] cos[i] + x[i] sin[i]
// computed in the accumulator type and rounded once.

#include <cstdint>

#include "micro_kernels/dtype.h"
#include "micro_kernels/parallel.h"
#include "micro_kernels/status.h"

namespace micro_kernels {

enum class RopeDirection : int8_t {
  kForward,
  kBackward,  // by the opposite angle: the gradient
};

struct RopeParams {
  const void* x;          // [rows, heads, head_dim]
  const void* cos;        // [positions, head_dim / 2], accumulator type
  const void* sin;        // [positions, head_dim / 2], accumulator type
  const int32_t* tokens;  // [rows], the position of each row, in [0, positions); nullptr: row % positions
  void* y;                // [rows, heads, head_dim]
  int64_t rows;
  int64_t positions;
  int64_t heads;
  int64_t head_dim;  // even
  RopeDirection direction;
  DType dtype;  // of x and y
};

// A position outside the table is kIndexOutOfRange on the CPU and a device assertion on CUDA.
namespace cpu {
Status rope(const RopeParams& params, const ParallelFor& parallel_for);
}

namespace cuda {
Status rope(const RopeParams& params, void* stream);
}

}  // namespace micro_kernels
