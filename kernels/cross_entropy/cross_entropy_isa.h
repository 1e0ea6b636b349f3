#pragma once
// The row functions of the cross-entropy, one set per instruction set.

#include <cstdint>

namespace micro_kernels::cpu {

constexpr int64_t kCrossEntropyPadding = 16;  // numbers of the widest vector of the narrowest accumulator

static inline int64_t cross_entropy_scratch(int64_t vocabulary) {
  return (vocabulary + kCrossEntropyPadding - 1) / kCrossEntropyPadding * kCrossEntropyPadding;
}

// Each returns the loss of a row of logits [vocabulary] and, on demand, replaces the row by its gradient. `wide` has
// room for cross_entropy_scratch(vocabulary) numbers.
struct CrossEntropyRows {
  float (*float32)(float* logits, int64_t vocabulary, int64_t target, bool write_gradient, float* wide);
  double (*float64)(double* logits, int64_t vocabulary, int64_t target, bool write_gradient, double* wide);
  float (*bfloat16)(uint16_t* logits, int64_t vocabulary, int64_t target, bool write_gradient, float* wide);
};

extern const CrossEntropyRows kCrossEntropyPlain;
extern const CrossEntropyRows kCrossEntropyAvx2;
extern const CrossEntropyRows kCrossEntropyAvx512;

}  // namespace micro_kernels::cpu
