#pragma once
// Tensors of a step of AdamW: their numbers, and the same where kernels can reach them.

#include <random>
#include <vector>

#include "elements.h"
#include "micro_kernels/adamw_step.h"
#include "offset.h"

namespace micro_kernels {

const AdamWStepParams kSettings{.tensors = nullptr,
                                .count = 0,
                                .step = 3,
                                .learning_rate = 1e-2,
                                .beta1 = 0.8,
                                .beta2 = 0.95,
                                .eps = 1e-8,
                                .weight_decay = 0.1,
                                .gradient_scale = 0.5};

template <class T>
constexpr bool kHasMaster = sizeof(T) == 2;

template <class T>
struct Tensors {
  using Acc = accumulator_t<T>;
  std::vector<T> parameter, gradient;
  std::vector<Acc> first, second, master;

  Tensors(int64_t size, unsigned seed) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < size; ++i) {
      master.push_back(normal(random));
      parameter.push_back(T(master.back()));
      gradient.push_back(T(static_cast<Acc>(normal(random) * 3)));
      first.push_back(normal(random) * 0.1f);
      second.push_back(first.back() * first.back() + Acc(1e-3));
    }
  }
};

template <class T>
struct OnDevice {
  using Acc = accumulator_t<T>;
  OffsetBuffer<T> parameter, gradient;
  OffsetBuffer<Acc> first, second, master;
  int64_t size;

  explicit OnDevice(const Tensors<T>& t, int64_t offset = 0)
      : parameter(t.parameter, offset),
        gradient(t.gradient, offset),
        first(t.first, offset),
        second(t.second, offset),
        master(t.master, offset),
        size(static_cast<int64_t>(t.parameter.size())) {}

  AdamWTensor view() const {
    return {
        parameter.data(), gradient.data(), first.data(), second.data(), kHasMaster<T> ? master.data() : nullptr, size,
        kDTypeOf<T>};
  }
};

}  // namespace micro_kernels
