#pragma once
// The passes over a whole vocabulary, one set per instruction set. bfloat16 travels as its bits.

#include <cstdint>

namespace micro_kernels::cpu {

constexpr int64_t kSampleBlock = 1024;  // weights whose sum is kept: a draw looks for its block first

// T: as the logits lie in memory; Acc: as scores and weights are computed.
template <class T, class Acc>
struct SampleLoop {
  // The largest; NaN does not count; -inf where there is nothing.
  Acc (*largest)(const T* x, int64_t count);
  // The first i >= from with x[i] >= bound, or count.
  int64_t (*next)(const T* x, int64_t from, int64_t count, Acc bound);
  // The places of all x >= bound, ascending; ids has room for count. Returns how many.
  int64_t (*collect)(const T* x, int64_t count, Acc bound, int32_t* ids);
  // y = x / divisor.
  void (*divide)(const T* x, Acc divisor, Acc* y, int64_t count);
  // x = exp(x - largest) where x >= least, else 0, also for NaN; sums: one per kSampleBlock weights. largest is finite.
  void (*weigh)(Acc* x, int64_t count, Acc largest, Acc least, double* sums);
};

struct SampleLoops {
  SampleLoop<float, float> float32;
  SampleLoop<double, double> float64;
  SampleLoop<uint16_t, float> bfloat16;
};

extern const SampleLoops kSamplePlain;
extern const SampleLoops kSampleAvx2;
extern const SampleLoops kSampleAvx512;

}  // namespace micro_kernels::cpu
