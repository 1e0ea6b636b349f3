#pragma once
// The small steps between the products: rows that are gathered, added, scaled or stored.

#include "micro_kernels/dtype.h"
#include "micro_kernels/expert_attention.h"
#include "micro_kernels/parallel.h"

namespace micro_kernels::cpu {

// y[y_index[r]] = (a[a_index[r]] + b[r]) * scale[y_index[r]], each step rounded; no index: r; no scale: 1.
struct AddRows {
  const void* a = nullptr;
  const int32_t* a_index = nullptr;
  const void* b = nullptr;
  const void* scale = nullptr;
  void* y = nullptr;
  const int32_t* y_index = nullptr;
  int64_t rows = 0, width = 0;
  DType dtype = DType::kFloat32;
};
void add_rows(const AddRows& params, const ParallelFor& parallel_for);

// y[index[i]] = 0.
void clear_rows(void* y, const int32_t* index, int64_t rows, int64_t width, DType dtype);

// bfloat16 <-> float32.
void widen(const void* x, void* y, int64_t count, const ParallelFor& parallel_for);
void narrow(const void* x, void* y, int64_t count);

// Row r of x [rows, groups, head_dim] becomes key or value of (batch[r], expert[r]) at slot[r].
struct StoreHeads {
  const void* x;
  const int32_t* batch;
  const int32_t* expert;
  const int32_t* slot;
  void* store;
  HeadStrides strides;
  int64_t rows, groups, head_dim;
  DType dtype;
};
void store_heads(const StoreHeads& params, const ParallelFor& parallel_for);

}  // namespace micro_kernels::cpu
