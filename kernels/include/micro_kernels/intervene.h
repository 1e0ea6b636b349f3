#pragma once
// One change of the rows at a point of a layer (micro/intervene.h). With a row n touched, column w of its expert named,
// and v the element of `value` that belongs to both:
//   zero: 0      scale: x * v      shift: x + v      replace: v         in the accumulator type, rounded once
// Everything else keeps its bits. The row of `value` is index[n], else the row's expert; a value with one row or one
// column serves all.

#include <cstdint>

#include "micro_kernels/dtype.h"
#include "micro_kernels/parallel.h"
#include "micro_kernels/status.h"

namespace micro_kernels {

enum class Change : int8_t { kZero, kScale, kShift, kReplace };

struct InterveneParams {
  const void* x;          // [rows, width]
  void* y;                // [rows, width], may be x
  const bool* touched;    // [rows]; nullptr: all
  const int32_t* expert;  // [rows], read where the row is touched; nullptr: 0
  const bool* columns;    // [experts, width]; nullptr: all
  const void* value;      // [value_rows, value_width]; unused by kZero
  const int64_t* index;   // [rows], read where the row is touched; nullptr: by expert
  int64_t rows, width, experts, value_rows, value_width;
  Change change;
  DType dtype;
};

//   grad_x = grad_y where nothing was changed, else 0, grad_y * v or grad_y
//   grad_value[r, w] = sum of grad_y (scale: times x) over the touched rows n that read row r, in a fixed order
struct InterveneBackwardParams {
  InterveneParams forward;  // y unused; x read by kScale alone
  const void* grad_y;       // [rows, width]
  void* grad_x;             // [rows, width]; nullptr: not wanted
  void* grad_value;         // [value_rows, width], accumulator type: one column per column of x; nullptr: not wanted
};

// An expert or index outside its range is kIndexOutOfRange on the CPU and a device assertion on CUDA.
namespace cpu {
Status intervene(const InterveneParams& params, const ParallelFor& parallel_for);
Status intervene_backward(const InterveneBackwardParams& params, const ParallelFor& parallel_for);
}  // namespace cpu

namespace cuda {
Status intervene(const InterveneParams& params, void* stream);
Status intervene_backward(const InterveneBackwardParams& params, void* stream);
}  // namespace cuda

}  // namespace micro_kernels
