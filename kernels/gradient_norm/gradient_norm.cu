#include "gradient_norm/gradient_norm.cuh"
#include "micro_kernels/gradient_norm.h"

namespace micro_kernels::cuda {
namespace {

int64_t chunks_of(const GradientNormParams& p) {
  int64_t chunks = 0;
  for (int64_t t = 0; t < p.count; ++t) chunks += ceil_div(p.tensors[t].size, kChunkElements);
  return chunks;
}

template <class T>
GradientArray<T> array_of(const GradientTensor& t) {
  return {static_cast<const T*>(t.gradient), t.size, in_vectors<T>(0, {t.gradient})};
}

// Writes the sums of all chunks of one type from `parts` on, and moves it behind them.
template <class T>
Status sum_all(const GradientNormParams& p, DType dtype, double*& parts, void* stream) {
  return in_batches<TensorBatch<GradientArray<T>, kGradientNormTensors>>(
      p.tensors, p.count, dtype, array_of<T>, [&](const auto& batch) {
        double* const own = parts;
        parts += batch.chunks();
        return launch(square_sum_kernel<T>, dim3(static_cast<unsigned>(batch.chunks())), dim3(kGradientNormThreads),
                      sizeof(GradientNormMemory), stream, SquareSumLaunch<T>{batch, own});
      });
}

}  // namespace

int64_t gradient_norm_workspace(const GradientNormParams& p) {
  return ceil_div(chunks_of(p) * int64_t{sizeof(double)}, 16) * 16;
}

Status gradient_norm(const GradientNormParams& p, void* workspace, void* stream) {
  auto* const parts = static_cast<double*>(workspace);
  double* next = parts;
  const Status status = for_each_device_type([&](DType dtype) {
    return dispatch_device(dtype, [&]<class T>() { return sum_all<T>(p, dtype, next, stream); });
  });
  if (status != Status::kOk) return status;
  return launch(norm_kernel, dim3(1), dim3(kGradientNormThreads), sizeof(GradientNormMemory), stream,
                NormLaunch{parts, next - parts, p.norm});
}

}  // namespace micro_kernels::cuda
