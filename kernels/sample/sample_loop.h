#pragma once
// Compiled once per instruction set (simd.h says why nothing here may be shared). Behind the last full vector, the same
// arithmetic on a padded copy.

#include "common/cpu/simd.h"
#include "sample/sample_isa.h"

namespace micro_kernels::cpu {
namespace {

template <class T, class Acc>
inline Vec<Acc> load_wide(const T* from) {
  if constexpr (std::is_same_v<T, uint16_t>)
    return load_bfloat16(from);
  else
    return load<T>(from);
}

// The last elements, and minus infinity behind them.
template <class T, class Acc>
inline Vec<Acc> load_rest(const T* from, int64_t count) {
  Acc rest[kLanes<Acc>];
  for (int64_t i = 0; i < kLanes<Acc>; ++i) rest[i] = -__builtin_inf();
  T copy[kLanes<Acc>] = {};
  __builtin_memcpy(copy, from, static_cast<size_t>(count) * sizeof(T));
  const Vec<Acc> wide = load_wide<T, Acc>(copy);
  for (int64_t i = 0; i < count; ++i) rest[i] = wide[i];
  return load<Acc>(rest);
}

template <class T, class Acc>
Acc largest(const T* x, int64_t count) {
  constexpr int64_t kWidth = kLanes<Acc>;
  Vec<Acc> best[4];
  for (Vec<Acc>& b : best) b = broadcast<Acc>(0) - static_cast<Acc>(__builtin_inf());
  const auto take = [](Vec<Acc>& b, Vec<Acc> v) { b = v > b ? v : b; };  // false for NaN
  int64_t i = 0;
  for (; i + 4 * kWidth <= count; i += 4 * kWidth)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) take(best[j], load_wide<T, Acc>(x + i + j * kWidth));
  for (; i + kWidth <= count; i += kWidth) take(best[0], load_wide<T, Acc>(x + i));
  if (i < count) take(best[0], load_rest<T, Acc>(x + i, count - i));
  return max_lanes<Acc>(max<Acc>(max<Acc>(best[0], best[1]), max<Acc>(best[2], best[3])));
}

template <class Acc>
inline bool any_reaches(Vec<Acc> v, Acc bound) {
  using Mask = decltype(v >= v);
  const Mask reaches = v >= bound;
  int64_t any = 0;
  int64_t words[sizeof(Mask) / sizeof(int64_t)];
  __builtin_memcpy(words, &reaches, sizeof(words));
#pragma GCC unroll 8
  for (const int64_t word : words) any |= word;
  return any != 0;
}

template <class T, class Acc>
int64_t next(const T* x, int64_t from, int64_t count, Acc bound) {
  constexpr int64_t kWidth = kLanes<Acc>;
  for (int64_t i = from; i < count; i += kWidth) {
    const bool whole = i + kWidth <= count;
    const Vec<Acc> v = whole ? load_wide<T, Acc>(x + i) : load_rest<T, Acc>(x + i, count - i);
    if (!any_reaches<Acc>(v, bound)) continue;
    for (int64_t lane = 0; lane < kWidth; ++lane)
      if (v[lane] >= bound && i + lane < count) return i + lane;
  }
  return count;
}

template <class T, class Acc>
int64_t collect(const T* x, int64_t count, Acc bound, int32_t* ids) {
  constexpr int64_t kWidth = kLanes<Acc>;
  int64_t found = 0;
  for (int64_t i = 0; i < count; i += kWidth) {
    const bool whole = i + kWidth <= count;
    const Vec<Acc> v = whole ? load_wide<T, Acc>(x + i) : load_rest<T, Acc>(x + i, count - i);
    if (!any_reaches<Acc>(v, bound)) continue;
    for (int64_t lane = 0; lane < (whole ? kWidth : count - i); ++lane) {  // without a branch per element
      ids[found] = static_cast<int32_t>(i + lane);
      found += v[lane] >= bound;
    }
  }
  return found;
}

template <class T, class Acc>
void divide(const T* x, Acc divisor, Acc* y, int64_t count) {
  constexpr int64_t kWidth = kLanes<Acc>;
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) store<Acc>(y + i, load_wide<T, Acc>(x + i) / divisor);
  if (i == count) return;
  Acc rest[kWidth];
  store<Acc>(rest, load_rest<T, Acc>(x + i, count - i) / divisor);
  __builtin_memcpy(y + i, rest, static_cast<size_t>(count - i) * sizeof(Acc));
}

template <class Acc>
inline Vec<Acc> weight(Vec<Acc> x, Acc largest, Acc least) {
  return x >= least ? exp<Acc>(x - largest) : Vec<Acc>{};
}

template <class Acc>
void weigh(Acc* x, int64_t count, Acc largest, Acc least, double* sums) {
  constexpr int64_t kWidth = kLanes<Acc>;
  for (int64_t start = 0; start < count; start += kSampleBlock) {
    const int64_t end = start + kSampleBlock < count ? start + kSampleBlock : count;
    Vec<Acc> sum{};
    int64_t i = start;
    for (; i + kWidth <= end; i += kWidth) {
      const Vec<Acc> w = weight<Acc>(load<Acc>(x + i), largest, least);
      store<Acc>(x + i, w);
      sum += w;
    }
    if (i < end) {
      Acc rest[kWidth];
      const Vec<Acc> w = weight<Acc>(load_rest<Acc, Acc>(x + i, end - i), largest, least);
      store<Acc>(rest, w);
      __builtin_memcpy(x + i, rest, static_cast<size_t>(end - i) * sizeof(Acc));
      sum += w;
    }
    *sums++ = static_cast<double>(sum_lanes<Acc>(sum));
  }
}

template <class T, class Acc>
constexpr SampleLoop<T, Acc> kLoop = {largest<T, Acc>, next<T, Acc>, collect<T, Acc>, divide<T, Acc>, weigh<Acc>};

constexpr SampleLoops kLoops = {kLoop<float, float>, kLoop<double, double>, kLoop<uint16_t, float>};

}  // namespace
}  // namespace micro_kernels::cpu
