#include <algorithm>
#include <cstring>

#include "block_forward/buffers.h"
#include "block_forward/row_steps.h"

namespace micro_kernels::cpu {
namespace {

constexpr int64_t kGrainElements = 16 * 1024;  // below this, handing work to another thread costs more than it saves

int64_t grain(int64_t width) { return kGrainElements / std::max<int64_t>(1, width) + 1; }

template <class T>
void add_row(const AddRows& p, int64_t row) {
  using Acc = accumulator_t<T>;
  const int64_t to = p.y_index ? p.y_index[row] : row;
  const T* a = static_cast<const T*>(p.a) + (p.a_index ? p.a_index[row] : row) * p.width;
  const T* b = static_cast<const T*>(p.b) + row * p.width;
  T* y = static_cast<T*>(p.y) + to * p.width;
  if (!p.scale) {
    for (int64_t h = 0; h < p.width; ++h) y[h] = T(static_cast<Acc>(a[h]) + static_cast<Acc>(b[h]));
    return;
  }
  const Acc scale = static_cast<Acc>(static_cast<const T*>(p.scale)[to]);
  for (int64_t h = 0; h < p.width; ++h) {
    const T sum = T(static_cast<Acc>(a[h]) + static_cast<Acc>(b[h]));
    y[h] = T(static_cast<Acc>(sum) * scale + Acc(0));  // + 0 as the sum over a token's experts begins
  }
}

}  // namespace

void add_rows(const AddRows& p, const ParallelFor& parallel_for) {
  dispatch(p.dtype, [&]<class T>() {
    parallel_for(p.rows, grain(p.width), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) add_row<T>(p, row);
    });
  });
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
