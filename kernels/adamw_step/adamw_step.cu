#include "adamw_step/adamw_factors_of.h"
#include "adamw_step/adamw_step.cuh"

namespace micro_kernels::cuda {
namespace {

template <class T>
AdamWArrays<T> arrays_of(const AdamWTensor& t) {
  using Acc = accumulator_t<T>;
  return {
      .parameter = static_cast<T*>(t.parameter),
      .gradient = static_cast<const T*>(t.gradient),
      .first = static_cast<Acc*>(t.first_moment),
      .second = static_cast<Acc*>(t.second_moment),
      .value = static_cast<Acc*>(t.master ? t.master : t.parameter),
      .size = t.size,
      // Zero columns: only where the arrays begin matters, their ends go one by one.
      .in_vectors = in_vectors<T>(0, {t.parameter, t.gradient, t.first_moment, t.second_moment, t.master}),
  };
}

template <class T>
Status step_all(const AdamWStepParams& p, DType dtype, void* stream) {
  AdamWLaunch<T> parameters;
  parameters.factors = adamw_factors<accumulator_t<T>>(p);
  return in_batches<decltype(parameters.batch)>(p.tensors, p.count, dtype, arrays_of<T>, [&](const auto& batch) {
    parameters.batch = batch;
    return launch(adamw_step_kernel<T>, dim3(static_cast<unsigned>(batch.chunks())), dim3(kAdamWThreads), stream,
                  parameters);
  });
}

}  // namespace

Status adamw_step(const AdamWStepParams& p, void* stream) {
  return for_each_device_type(
      [&](DType dtype) { return dispatch_device(dtype, [&]<class T>() { return step_all<T>(p, dtype, stream); }); });
}

}  // namespace micro_kernels::cuda
