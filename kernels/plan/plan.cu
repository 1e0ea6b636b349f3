#include <algorithm>

#include "common/cuda/launch.cuh"
#include "plan/plan.cuh"

namespace micro_kernels::cuda {

Status plan(const PlanParams& p, void* stream) {
  // As many blocks as have a pair for each thread; one where there is no token, for the offsets are written all the
  // same.
  const int64_t most_chunk = std::max<int64_t>(1, kPlanThreads / std::max<int64_t>(1, p.k));
  const int64_t blocks = std::clamp<int64_t>(ceil_div(p.token_count, most_chunk), 1, kPlanMostBlocks);
  const PlanLaunch params{p, ceil_div(p.token_count, blocks)};
  return dispatch_device(p.dtype, [&]<class T>() {
    return launch(plan_kernel<T>, dim3(static_cast<unsigned>(blocks)), dim3(kPlanThreads), sizeof(PlanShared), stream,
                  params);
  });
}

}  // namespace micro_kernels::cuda
