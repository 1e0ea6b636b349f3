#include "adamw_step/adamw_factors_of.h"
#include "adamw_step/adamw_step_loop.h"
#include "common/cpu/blocks.h"
#include "micro_kernels/adamw_step.h"
#include "micro_kernels/isa.h"

namespace micro_kernels::cpu {

const AdamWLoops kAdamWPlain = kLoops;

namespace {

const AdamWLoops& loops_for_this_cpu() {
#if defined(__x86_64__)
  if (isa() >= Isa::kAvx512) return kAdamWAvx512;
  if (isa() >= Isa::kAvx2) return kAdamWAvx2;
#endif
  return kAdamWPlain;
}

template <class T>
T* at(void* base, int64_t index) {
  return static_cast<T*>(base) + index;
}
template <class T>
const T* at(const void* base, int64_t index) {
  return static_cast<const T*>(base) + index;
}

struct Step {
  const AdamWLoops& loops = loops_for_this_cpu();
  AdamWFactors<float> factors;
  AdamWFactors<double> wide_factors;

  explicit Step(const AdamWStepParams& p) : factors(adamw_factors<float>(p)), wide_factors(adamw_factors<double>(p)) {}

  void operator()(const AdamWTensor& t, int64_t i, int64_t size) const {
    switch (t.dtype) {
      case DType::kFloat32:
        return loops.float32(at<float>(t.gradient, i), at<float>(t.first_moment, i), at<float>(t.second_moment, i),
                             at<float>(t.parameter, i), size, factors);
      case DType::kFloat64:
        return loops.float64(at<double>(t.gradient, i), at<double>(t.first_moment, i), at<double>(t.second_moment, i),
                             at<double>(t.parameter, i), size, wide_factors);
      case DType::kBFloat16:
        return loops.bfloat16(at<uint16_t>(t.gradient, i), at<float>(t.first_moment, i), at<float>(t.second_moment, i),
                              at<float>(t.master, i), at<uint16_t>(t.parameter, i), size, factors);
      case DType::kFloat16:  // on CUDA only: refused by callers
        return;
    }
  }
};

}  // namespace

Status adamw_step(const AdamWStepParams& p, const ParallelFor& parallel_for) {
  const std::vector<Block> blocks = blocks_of(p.tensors, p.count);
  const Step step(p);
  parallel_for(static_cast<int64_t>(blocks.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      step(p.tensors[blocks[b].tensor], blocks[b].begin, blocks[b].end - blocks[b].begin);
  });
  return Status::kOk;
}

}  // namespace micro_kernels::cpu
