#pragma once
// What all parts of the backward pass share: its state, and the launchers with the arguments that every call has.

#include <vector>

#include "block_train/buffers.h"
#include "micro_kernels/rope.h"

#define MICRO_RETURN_IF_FAILS(step) \
  if (const Status status = (step); status != Status::kOk) return status

namespace micro_kernels::cpu {

class BackwardSteps {
 protected:
  BackwardSteps(const BlockTrainBackwardParams& p, Arena arena, const ParallelFor& parallel_for);

  Status norm(const void* x, const void* gain, char* y, char* inverse_rms, int64_t width);

  // Of rows of the plan; nullptr: not wanted.
  Status norm_backward(const void* grad_y, const void* x, const void* gain, const char* inverse_rms, void* grad_x,
                       void* grad_gain, int64_t width);

  Status rotate(const void* x, const int32_t* positions, int64_t heads, void* y, int64_t rows, RopeDirection direction);

  // Rows first .. of the plan through one matrix.
  LinearPart product(const char* x, const Matrix& matrix, char* y, int64_t first, int64_t rows, int64_t in,
                     int64_t out) const;

  // grad_x = grad_y matrix, grad_weight = grad_y^T x, over the plan.
  Status input_gradient(const char* grad_y, const Matrix* matrices, char* grad_x, int64_t in, int64_t out);
  Status weight_gradient(const char* grad_y, const ConstRows& x, void* grad_weight, int64_t in, int64_t out);

  // Over all tokens, one matrix.
  Status plain_input_gradient(const LinearSource& source, void* grad_x, int64_t in, int64_t out);

  void add(const void* a, const void* b, void* y, int64_t rows) { add(a, b, y, rows, s_.hidden); }
  void add(const void* a, const void* b, void* y, int64_t rows, int64_t width);

  // From the accumulator type to the element type.
  void round(const void* x, void* y, int64_t count) const;

  static void clear(void* y, int64_t bytes);
  void clear_wide(char* y, int64_t count) const { clear(y, count * accumulator_bytes(s_.dtype)); }

  // No token went to an expert.
  void clear_experts();

  template <class Body>
  void each_used(const Body& body) const {
    for (const int64_t e : used_) body(e, saved_.offsets[e], saved_.offsets[e + 1] - saved_.offsets[e]);
  }

  template <class Body>
  Status each_slice(const Body& body) const {
    for (int64_t slice = 0; slice < slices(); ++slice) MICRO_RETURN_IF_FAILS(body(slice, used_[slice]));
    return Status::kOk;
  }

  int64_t slices() const { return static_cast<int64_t>(used_.size()); }
  template <class Item>
  static int64_t count(const std::vector<Item>& items) {
    return static_cast<int64_t>(items.size());
  }

  const char* at(const void* base, int64_t row, int64_t width) const {
    return static_cast<const char*>(base) + row * width * element_;
  }
  char* at(void* base, int64_t row, int64_t width) const { return static_cast<char*>(base) + row * width * element_; }
  char* wide_at(char* base, int64_t index) const { return base + index * accumulator_bytes(s_.dtype); }

  const BlockTrainBackwardParams& p_;
  const BlockShape& s_;
  const BlockGradients& g_;
  const BlockSaved& saved_;
  const Needs needs_;
  const TrainSizes size_;
  TrainBuffers m_;
  const ParallelFor& parallel_;
  const int64_t element_;
  const int64_t active_;       // rows of the plan that are computed
  std::vector<int64_t> used_;  // experts that have one
};

}  // namespace micro_kernels::cpu
