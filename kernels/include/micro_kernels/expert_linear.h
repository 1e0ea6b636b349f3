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
  bool tf32 = false;  // CUDA only: factors of float32 may be rounded to 10 bits
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
  bool tf32 = false;  // CUDA only: factors of float32 may be rounded to 10 bits
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

// ---- CUDA's grouped product ----------------------------------------------------------------------------------------
// One launch serves a few groups: the same rows, or all rows, through the matrices of all experts. Pointers are the
// device's; the groups themselves lie on the host and travel in the kernel's parameters. Every output is one chain of
// additions in the order of the inputs, whatever the number of rows, groups and blocks: the same bits on every run.
//
// Which rows an expert has, in all three products:
//   offsets given    expert e has the rows n in [offsets[e], offsets[e + 1]); `rows` is their number in the worst case.
//                    Rows in [offsets[experts], rows) are idle: what would be written for them is 0.
//   offsets nullptr  expert e has the rows n in [0, rows), all of them; where `used` is given, experts with
//                    used[e] == used[e + 1] have none: what would be written for them is 0.
// Row n of expert e of a ConstRows or Rows r lies at r.data + e * expert_stride + (r.index ? r.index[n] : n) * r.stride
// (strides in elements). An index < 0 in what is read (not residual and scale) means a row of zeros.
// Anything is right; fast are pointers aligned to 16 bytes with widths and strides of multiples of 16 bytes.

inline constexpr int kMostGroups = 5;
inline constexpr int kMostSources = 4;

// y = x weight^T, and then what is asked for, each step rounded to the element type as the separate operators do:
//   up:       y = swiglu(x weight^T, x up^T)
//   cos:      y = rope(y)
//   residual: y = residual + y
//   scale:    y = y * scale[row]
// The rows y that different groups and experts write must not overlap; y may be residual.
struct LinearGroup {
  ConstRows x;                       // [., in]
  int64_t x_expert_stride = 0;       // 0: all experts read the same rows
  const void* weight = nullptr;      // [experts, out, in]
  int64_t weight_expert_stride = 0;  // out * in; 0: one matrix for all
  const void* up = nullptr;          // as weight; nullptr: none
  ConstRows residual;                // [., out]; data == nullptr: none
  ConstRows scale;                   // [., 1], stride counts; data == nullptr: none
  Rows y;                            // [., out]
  int64_t y_expert_stride = 0;
  int64_t y_head_stride = 0;  // 0: a row of y is in one piece; else column o lies o / head_dim * y_head_stride + o %
                              // head_dim behind the row's beginning (keys and values of a cache)
  const int32_t* offsets = nullptr;  // [experts + 1]
  const int32_t* used = nullptr;     // [experts + 1]
  int64_t rows = 0, experts = 1, in = 0, out = 0;
  // Norm of x on the way in (Llama's rounding): round(round(x * inverse_rms[r]) * gain[e]), r: the row of x without
  // the expert's stride.
  const void* gain = nullptr;         // [experts, in]; nullptr: no norm
  int64_t gain_expert_stride = 0;     // in; 0: one gain for all
  const void* inverse_rms = nullptr;  // [rows of x], accumulator type
  // Rotation on the way out, of heads of head_dim columns: 16, 32, 64 or 128, and not with up; else kUnsupported.
  const void* cos = nullptr;          // [positions, head_dim / 2], accumulator type; nullptr: no rotation
  const void* sin = nullptr;          //
  const int32_t* position = nullptr;  // [rows of x]; nullptr: r % positions
  int64_t positions = 0;
  int64_t head_dim = 0;  // for cos and y_head_stride
};

// grad_x[n] = sum over the sources s, one after the other, of grad_y_s[n] weight_s: one chain, rounded once.
struct LinearGradXSource {
  ConstRows grad_y;  // [., out]
  int64_t grad_y_expert_stride = 0;
  int64_t index_expert_stride = 0;   // elements between the experts' lists grad_y.index; 0: one list
  const void* weight = nullptr;      // [experts, out, in]
  int64_t weight_expert_stride = 0;  // out * in; 0: one matrix for all
  int64_t out = 0;
};

struct LinearGradXGroup {
  LinearGradXSource sources[kMostSources];
  int64_t source_count = 1;
  Rows grad_x;  // [., in]
  int64_t grad_x_expert_stride = 0;
  const int32_t* offsets = nullptr;  // [experts + 1]
  const int32_t* used = nullptr;     // [experts + 1]
  int64_t rows = 0, experts = 1, in = 0;
  // offsets == nullptr only: all experts read the same x. The chain goes on over the experts, ascending, and in each
  // over the sources; grad_x has no experts.
  bool sum_experts = false;
  // The gated unit behind grad_x (gate != nullptr): grad_x itself is rounded but not stored (grad_x.data is not used,
  // its index and strides are), and gives, at the same places of arrays of the same shape,
  //   grad_gate, grad_up  as swiglu_backward gives them
  //   activation          swiglu(gate, up); nullptr: not wanted
  const void* gate = nullptr;
  const void* up = nullptr;
  void* grad_gate = nullptr;  // may be gate
  void* grad_up = nullptr;    // may be up
  void* activation = nullptr;
};

// grad_weight[e, o, i] = sum over the expert's rows n, in their order, of grad_y[n, o] x[n, i]. Experts without rows:
// 0.
struct LinearGradWeightGroup {
  ConstRows grad_y;  // [., out]
  int64_t grad_y_expert_stride = 0;
  ConstRows x;  // [., in]
  int64_t x_expert_stride = 0;
  void* grad_weight = nullptr;  // [experts, out, in], element type; or, accumulate, to be added to, accumulator type
  const int32_t* offsets = nullptr;  // [experts + 1]
  const int32_t* used = nullptr;     // [experts + 1]
  int64_t rows = 0, experts = 1, in = 0, out = 0;
  bool accumulate = false;
};

// 0 < count <= kMostGroups. tf32: factors of float32 may be rounded to 10 bits, for tensor cores.
Status linear(const LinearGroup* groups, int64_t count, DType dtype, void* stream, bool tf32 = false);
Status linear_grad_x(const LinearGradXGroup* groups, int64_t count, DType dtype, void* stream, bool tf32 = false);
Status linear_grad_weight(const LinearGradWeightGroup* groups, int64_t count, DType dtype, void* stream,
                          bool tf32 = false);
}  // namespace cuda

}  // namespace micro_kernels
