#include "common/cuda/launch.cuh"
#include "cross_entropy/cross_entropy.cuh"

namespace micro_kernels::cuda {

Status cross_entropy(const CrossEntropyParams& p, void* stream) {
  if (p.rows == 0) return Status::kOk;
  return dispatch_device(p.dtype, [&]<class T>() {
    return launch(cross_entropy_kernel<T>, dim3(static_cast<unsigned>(p.rows)), dim3(kCrossEntropyThreads),
                  sizeof(CrossEntropyMemory<accumulator_t<T>>), stream,
                  CrossEntropyLaunch{p, in_vectors<T>(p.vocabulary, {p.logits})});
  });
}

}  // namespace micro_kernels::cuda
