#pragma once
// One weight matrix per expert, rows in plan order (model.md 2.6):
//   y[n, o] = sum_i weight[e(n), o, i] * x[n, i],   offsets[e] <= n < offsets[e + 1]

#include <cstdint>

#include "micro_kernels/dtype.h"
#include "micro_kernels/parallel.h"
#include "micro_kernels/status.h"

namespace micro_kernels {

struct ExpertLinearParams {
  const void* x;           // [N, in]
  const void* weight;      // [E, out, in]
  const int32_t* offsets;  // [E + 1]; on the device of the tensors
  void* y;                 // [N, out]; idle rows are 0
  int64_t rows, experts, in, out;
  DType dtype;
};

struct ExpertLinearBackwardParams {
  const void* grad_y;      // [N, out]
  const void* x;           // [N, in]
  const void* weight;      // [E, out, in]
  const int32_t* offsets;  // [E + 1]
  void* grad_x;            // [N, in], or nullptr: not wanted
  void* grad_weight;       // [E, out, in], or nullptr: not wanted
  int64_t rows, experts, in, out;
  DType dtype;
};

// ---- the CPU's grouped product -------------------------------------------------------------------------------------
// A list of parts, each with its own matrix, rows and shape, is worked off as one list of panels (64 outputs of one
// part). Every output is one chain of additions in the order of the inputs, whatever the number of rows, parts and
// threads and however the weights are stored: prefill, chunked prefill and decode give the same bits.

// How a matrix [out, in] lies in memory.
enum class WeightFormat : int8_t {
  kPlain,   // [out, in], as the parameters of a model; panels are packed on the way
  kPacked,  // packed once by pack_weight
  kInt8,    // packed once by pack_weight_int8: integers, one scale per output
};

struct Matrix {
  const void* data = nullptr;
  const float* scales = nullptr;  // [out], kInt8 only
  WeightFormat format = WeightFormat::kPlain;
};

// Row r of a tensor begins at data + (index ? index[r] : r) * stride elements.
struct Rows {
  void* data = nullptr;
  const int32_t* index = nullptr;
  int64_t stride = 0;
};
struct ConstRows {
  const void* data = nullptr;
  const int32_t* index = nullptr;
  int64_t stride = 0;
};

// y = x matrix^T, and then what is asked for, each step rounded to the element type as the separate operators do:
//   up given:        y = swiglu(x matrix^T, x up^T)
//   residual given:  y = residual + y
//   scale given:     y = y * scale[r], where r counts the rows of the part, or is the index of y's row
struct LinearPart {
  ConstRows x;
  Matrix matrix;
  Matrix up;  // data == nullptr: none
  ConstRows residual;
  ConstRows scale;  // one element per row
  Rows y;
  int64_t rows = 0, in = 0, out = 0;
};

// grad_x[r, i] = sum_o weight[o, i] grad_y[r, o], one chain over o. Several sources add up in one chain, in their
// order: grad_x of a row that went through several matrices (keys and values of all experts).
struct LinearSource {
  ConstRows grad_y;
  const void* weight;  // [out, in], plain
};
struct LinearGradXPart {
  const LinearSource* sources;
  int64_t source_count;
  Rows grad_x;
  int64_t rows, in, out;
};

// grad_weight[o, i] = sum_r grad_y[r, o] x[r, i], one chain over the rows, in their order.
struct LinearGradWeightPart {
  ConstRows grad_y;
  ConstRows x;
  void* grad_weight;  // [out, in], element type; or, to be added to, accumulator type
  int64_t rows, in, out;
  bool accumulate;
};

namespace cpu {

// Elements of `dtype` (bytes and scales for int8) that a packed matrix takes. Zeros fill the last panel.
int64_t packed_elements(int64_t in, int64_t out);
Status pack_weight(const void* plain, int64_t in, int64_t out, DType dtype, void* packed,
                   const ParallelFor& parallel_for);
// data [packed_elements] of int8_t, scales [out]: weight ~ data * scale, scale = max |weight| / 127 per output.
Status pack_weight_int8(const void* plain, int64_t in, int64_t out, DType dtype, int8_t* data, float* scales,
                        const ParallelFor& parallel_for);

// The y of different parts must not overlap.
Status linear(const LinearPart* parts, int64_t count, DType dtype, const ParallelFor& parallel_for);
Status linear_grad_x(const LinearGradXPart* parts, int64_t count, DType dtype, const ParallelFor& parallel_for);
Status linear_grad_weight(const LinearGradWeightPart* parts, int64_t count, DType dtype,
                          const ParallelFor& parallel_for);
}  // namespace cpu

namespace cuda {
Status expert_linear(const ExpertLinearParams& params, void* stream);
Status expert_linear_backward(const ExpertLinearBackwardParams& params, void* stream);
}  // namespace cuda

}  // namespace micro_kernels
