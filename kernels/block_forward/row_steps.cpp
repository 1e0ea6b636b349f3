#include "block_forward/row_steps.h"

#include <algorithm>
#include <cstring>

#include "block_forward/add_rows_loop.h"
#include "block_forward/buffers.h"
#include "micro_kernels/isa.h"

namespace micro_kernels::cpu {

const AddRowLoops kAddRowPlain = kLoops;

namespace {

constexpr int64_t kGrainElements = 16 * 1024;  // below this, handing work to another thread costs more than it saves

int64_t grain(int64_t width) { return kGrainElements / std::max<int64_t>(1, width) + 1; }

const AddRowLoops& loops_for_this_cpu() {
#if defined(__x86_64__)
  if (isa() >= Isa::kAvx512) return kAddRowAvx512;
  if (isa() >= Isa::kAvx2) return kAddRowAvx2;
#endif
  return kAddRowPlain;
}

// T: the element, Stored: as the loops see it, plain bits for bfloat16.
template <class T, class Stored>
void add_rows_with(const AddRows& p, const ParallelFor& parallel_for, AddRow<Stored, accumulator_t<T>> add) {
  using Acc = accumulator_t<T>;
  parallel_for(p.rows, grain(p.width), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t from = p.a_index ? p.a_index[row] : row, to = p.y_index ? p.y_index[row] : row;
      const Acc scale = p.scale ? static_cast<Acc>(static_cast<const T*>(p.scale)[to]) : Acc(1);
      add(static_cast<const Stored*>(p.a) + from * p.width, static_cast<const Stored*>(p.b) + row * p.width,
          p.scale ? &scale : nullptr, static_cast<Stored*>(p.y) + to * p.width, p.width);
    }
  });
}

}  // namespace

void add_rows(const AddRows& p, const ParallelFor& parallel_for) {
  const AddRowLoops& loops = loops_for_this_cpu();
  switch (p.dtype) {
    case DType::kFloat32:
      return add_rows_with<float>(p, parallel_for, loops.float32);
    case DType::kFloat64:
      return add_rows_with<double>(p, parallel_for, loops.float64);
    case DType::kBFloat16:
      return add_rows_with<BFloat16>(p, parallel_for, loops.bfloat16);
    case DType::kFloat16:  // on CUDA only: refused by callers
      return;
  }
}

void clear_rows(void* y, const int32_t* index, int64_t rows, int64_t width, DType dtype) {
  const int64_t bytes = width * element_bytes(dtype);
  for (int64_t i = 0; i < rows; ++i) std::memset(static_cast<char*>(y) + index[i] * bytes, 0, bytes);
}

void widen(const void* x, void* y, int64_t count, const ParallelFor& parallel_for) {
  parallel_for(count, kGrainElements, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      static_cast<float*>(y)[i] = static_cast<float>(static_cast<const BFloat16*>(x)[i]);
  });
}

void narrow(const void* x, void* y, int64_t count) {
  for (int64_t i = 0; i < count; ++i) static_cast<BFloat16*>(y)[i] = BFloat16(static_cast<const float*>(x)[i]);
}

void store_heads(const StoreHeads& p, const ParallelFor& parallel_for) {
  const int64_t element = element_bytes(p.dtype), bytes = p.head_dim * element;
  parallel_for(p.rows, grain(p.groups * p.head_dim), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t first =
          p.batch[row] * p.strides.batch + p.expert[row] * p.strides.expert + p.slot[row] * p.strides.key;
      for (int64_t g = 0; g < p.groups; ++g)
        std::memcpy(static_cast<char*>(p.store) + (first + g * p.strides.group) * element,
                    static_cast<const char*>(p.x) + (row * p.groups + g) * bytes, bytes);
    }
  });
}

}  // namespace micro_kernels::cpu
