#include "moments/moments.cuh"

namespace micro_kernels::cuda {

Status moments(const MomentsParams& p, void* stream) {
  if (p.rows == 0 || p.experts == 0) return Status::kOk;
  const auto experts = static_cast<unsigned>(p.experts);
  const Status status = dispatch_device(p.dtype, [&]<class T>() {
    if (p.width == 0) return Status::kOk;
    return launch(moments_kernel<T>, dim3(static_cast<unsigned>(ceil_div(p.width, kWarp)), experts), dim3(kRowThreads),
                  sizeof(MomentsMemory), stream, p);
  });
  if (status != Status::kOk) return status;
  return launch(moments_count_kernel<kRowThreads>, dim3(1, experts), dim3(kRowThreads), sizeof(MomentsCountMemory),
                stream, p);
}

}  // namespace micro_kernels::cuda
