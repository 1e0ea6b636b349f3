#include <algorithm>
#include <cstring>

#include "micro_kernels/intervene.h"

namespace micro_kernels::cpu {
namespace {

constexpr int64_t kGrainElements = 16 * 1024;  // below this, handing work to another thread costs more than it saves
constexpr int64_t kColumns = 64;               // of a gradient of values that one thread adds up

bool touched(const InterveneParams& p, int64_t row) { return !p.touched || p.touched[row]; }
int64_t expert_of(const InterveneParams& p, int64_t row) { return p.expert ? p.expert[row] : 0; }
int64_t value_row(const InterveneParams& p, int64_t row) {
  return p.index ? p.index[row] : p.value_rows == 1 ? 0 : expert_of(p, row);
}
int64_t grain(const InterveneParams& p) { return kGrainElements / std::max<int64_t>(1, p.width) + 1; }

bool in_range(const InterveneParams& p) {
  for (int64_t row = 0; row < p.rows; ++row) {
    if (!touched(p, row)) continue;
    const int64_t expert = expert_of(p, row);
    if (p.columns && (expert < 0 || expert >= p.experts)) return false;
    if (p.change == Change::kZero) continue;
    const int64_t value = value_row(p, row);
    if (value < 0 || value >= p.value_rows) return false;
  }
  return true;
}

template <class T>
T cleared() {
  return T(accumulator_t<T>(0));
}

template <class T>
T changed(Change change, T x, T value) {
  using Acc = accumulator_t<T>;
  switch (change) {
    case Change::kZero:
      return cleared<T>();
    case Change::kScale:
      return T(static_cast<Acc>(x) * static_cast<Acc>(value));
    case Change::kShift:
      return T(static_cast<Acc>(x) + static_cast<Acc>(value));
    case Change::kReplace:
      break;
  }
  return value;
}

// y = change(x, value) in the named columns of a row; `step` is 0 where one value serves all columns.
template <Change kChange, class T>
void change_row(const T* x, T* y, const bool* columns, const T* value, int64_t step, int64_t width) {
  if (columns) {
    for (int64_t w = 0; w < width; ++w) y[w] = columns[w] ? changed(kChange, x[w], value[w * step]) : x[w];
  } else {
    for (int64_t w = 0; w < width; ++w) y[w] = changed(kChange, x[w], value[w * step]);
  }
}

template <class T>
void change_row(const InterveneParams& p, int64_t row) {
  static const T nothing = cleared<T>();
  const T* x = static_cast<const T*>(p.x) + row * p.width;
  T* y = static_cast<T*>(p.y) + row * p.width;
  const bool* columns = p.columns ? p.columns + expert_of(p, row) * p.width : nullptr;
  const bool zero = p.change == Change::kZero;
  const T* value = zero ? &nothing : static_cast<const T*>(p.value) + value_row(p, row) * p.value_width;
  const int64_t step = zero || p.value_width == 1 ? 0 : 1;
  switch (p.change) {
    case Change::kZero:
      return change_row<Change::kZero>(x, y, columns, value, step, p.width);
    case Change::kScale:
      return change_row<Change::kScale>(x, y, columns, value, step, p.width);
    case Change::kShift:
      return change_row<Change::kShift>(x, y, columns, value, step, p.width);
    case Change::kReplace:
      return change_row<Change::kReplace>(x, y, columns, value, step, p.width);
  }
}

template <class T>
void grad_row(const InterveneBackwardParams& b, int64_t row) {
  using Acc = accumulator_t<T>;
  const InterveneParams& p = b.forward;
  const T* grad_y = static_cast<const T*>(b.grad_y) + row * p.width;
  T* grad_x = static_cast<T*>(b.grad_x) + row * p.width;
  std::copy_n(grad_y, p.width, grad_x);
  if (!touched(p, row) || p.change == Change::kShift) return;
  const bool* columns = p.columns ? p.columns + expert_of(p, row) * p.width : nullptr;
  const bool scale = p.change == Change::kScale;
  const T* value = scale ? static_cast<const T*>(p.value) + value_row(p, row) * p.value_width : nullptr;
  for (int64_t w = 0; w < p.width; ++w) {
    if (columns && !columns[w]) continue;
    grad_x[w] =
        scale ? T(static_cast<Acc>(grad_y[w]) * static_cast<Acc>(value[p.value_width == 1 ? 0 : w])) : cleared<T>();
  }
}

// Columns first..last of the gradient of values, row after row.
template <class T>
void add_up_columns(const InterveneBackwardParams& b, int64_t first, int64_t last) {
  using Acc = accumulator_t<T>;
  const InterveneParams& p = b.forward;
  Acc* sums = static_cast<Acc*>(b.grad_value);
  for (int64_t r = 0; r < p.value_rows; ++r) std::fill(sums + r * p.width + first, sums + r * p.width + last, Acc(0));
  for (int64_t row = 0; row < p.rows; ++row) {
    if (!touched(p, row)) continue;
    const bool* columns = p.columns ? p.columns + expert_of(p, row) * p.width : nullptr;
    const T* grad_y = static_cast<const T*>(b.grad_y) + row * p.width;
    const T* x = p.change == Change::kScale ? static_cast<const T*>(p.x) + row * p.width : nullptr;
    Acc* sum = sums + value_row(p, row) * p.width;
    for (int64_t w = first; w < last; ++w) {
      if (columns && !columns[w]) continue;
      sum[w] += x ? static_cast<Acc>(grad_y[w]) * static_cast<Acc>(x[w]) : static_cast<Acc>(grad_y[w]);
    }
  }
}

}  // namespace

Status intervene(const InterveneParams& p, const ParallelFor& parallel_for) {
  if (!in_range(p)) return Status::kIndexOutOfRange;
  dispatch(p.dtype, [&]<class T>() {
    parallel_for(p.rows, grain(p), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        if (touched(p, row)) {
          change_row<T>(p, row);
        } else if (p.x != p.y) {
          std::copy_n(static_cast<const T*>(p.x) + row * p.width, p.width, static_cast<T*>(p.y) + row * p.width);
        }
      }
    });
  });
  return Status::kOk;
}

Status intervene_backward(const InterveneBackwardParams& b, const ParallelFor& parallel_for) {
  const InterveneParams& p = b.forward;
  if (!in_range(p)) return Status::kIndexOutOfRange;
  dispatch(p.dtype, [&]<class T>() {
    if (b.grad_x)
      parallel_for(p.rows, grain(p), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) grad_row<T>(b, row);
      });
    if (b.grad_value)
      parallel_for((p.width + kColumns - 1) / kColumns, 1, [&](int64_t begin, int64_t end) {
        add_up_columns<T>(b, begin * kColumns, std::min(end * kColumns, p.width));
      });
  });
  return Status::kOk;
}

}  // namespace micro_kernels::cpu
