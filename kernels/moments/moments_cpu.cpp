#include <algorithm>
#include <vector>

#include "micro_kernels/moments.h"

namespace micro_kernels::cpu {
namespace {

constexpr int64_t kColumns = 64;  // that one thread takes at a time

struct TakenRow {
  int64_t row, expert;
  double count;  // of its expert, this row included
};

template <class T>
void take_columns(const MomentsParams& p, const std::vector<TakenRow>& rows, int64_t first, int64_t last) {
  for (const TakenRow& taken : rows) {
    const T* x = static_cast<const T*>(p.x) + taken.row * p.width;
    double *mean = p.mean + taken.expert * p.width, *m2 = p.m2 + taken.expert * p.width;
    const double share = 1 / taken.count;
    for (int64_t w = first; w < last; ++w) {
      const double value = static_cast<double>(static_cast<accumulator_t<T>>(x[w])), before = value - mean[w];
      mean[w] += before * share;
      m2[w] += before * (value - mean[w]);
    }
  }
}

}  // namespace

Status moments(const MomentsParams& p, const ParallelFor& parallel_for) {
  std::vector<double> counts(p.count, p.count + p.experts);
  std::vector<TakenRow> rows;
  rows.reserve(static_cast<size_t>(p.rows));
  for (int64_t row = 0; row < p.rows; ++row) {
    if (p.touched && !p.touched[row]) continue;
    const int64_t expert = p.expert ? p.expert[row] : 0;
    if (expert < 0 || expert >= p.experts) return Status::kIndexOutOfRange;
    rows.push_back({row, expert, ++counts[static_cast<size_t>(expert)]});
  }
  dispatch(p.dtype, [&]<class T>() {
    parallel_for((p.width + kColumns - 1) / kColumns, 1, [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; ++chunk)
        take_columns<T>(p, rows, chunk * kColumns, std::min((chunk + 1) * kColumns, p.width));
    });
  });
  std::copy(counts.begin(), counts.end(), p.count);
  return Status::kOk;
}

}  // namespace micro_kernels::cpu
